"""The routes of files and batches."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.responses import Response

from satchel.run.server.house import House
from satchel.run.server.shelf import Shelf
from satchel.run.server.wire import BatchBody


def add_batches(app: FastAPI, house: House) -> None:
    """Put the routes onto an application."""
    shelf = Shelf(house)
    _files(app, shelf)
    _batches(app, shelf)


def _files(app: FastAPI, shelf: Shelf) -> None:
    @app.post("/v1/files")
    async def upload(request: Request, file: Annotated[UploadFile, File()], purpose: Annotated[str, Form()]) -> Any:
        """Keep a file."""
        return shelf.put(_owner(request), file.filename or "", purpose, await file.read())

    @app.get("/v1/files")
    async def files(request: Request) -> Any:
        """Your files."""
        return _listed([one.facts for one in shelf.files.values() if one.owner == _owner(request)])

    @app.get("/v1/files/{id}", responses=NOT_FOUND)
    async def file(request: Request, id: str) -> Any:
        """One of them."""
        return shelf.file(_owner(request), id).facts

    @app.get("/v1/files/{id}/content", responses=NOT_FOUND)
    async def content(request: Request, id: str) -> Any:
        """What it holds."""
        return Response(shelf.file(_owner(request), id).path.read_bytes(), media_type="application/octet-stream")

    @app.delete("/v1/files/{id}", responses=NOT_FOUND)
    async def drop(request: Request, id: str) -> Any:
        """Forget it."""
        return shelf.drop(_owner(request), id)


def _batches(app: FastAPI, shelf: Shelf) -> None:
    @app.post("/v1/batches", responses=NOT_FOUND)
    async def begin(request: Request, body: BatchBody) -> Any:
        """Answer a file in the background."""
        return shelf.begin(_owner(request), body.input_file_id, body.endpoint, body.metadata)

    @app.get("/v1/batches")
    async def batches(request: Request) -> Any:
        """Your batches."""
        return _listed([one.facts for one in shelf.batches.values() if one.owner == _owner(request)])

    @app.get("/v1/batches/{id}", responses=NOT_FOUND)
    async def batch(request: Request, id: str) -> Any:
        """One of them."""
        return shelf.batch(_owner(request), id).facts

    @app.post("/v1/batches/{id}/cancel", responses=NOT_FOUND)
    async def cancel(request: Request, id: str) -> Any:
        """End it."""
        return shelf.cancel(_owner(request), id)


NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"description": "not found"}}


def _owner(request: Request) -> str:
    return request.state.client.name


def _listed(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": found, "has_more": False}
