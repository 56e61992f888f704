"""The routes, as a FastAPI application over a `House`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

import satchel
from satchel.core.errors import SatchelError, UserError
from satchel.run.server.batches import add_batches
from satchel.run.server.chats import chat
from satchel.run.server.completions import complete
from satchel.run.server.embeddings import embed
from satchel.run.server.faults import Fault, broken, malformed, refused, unavailable
from satchel.run.server.gate import App, Gate
from satchel.run.server.house import House
from satchel.run.server.keys import Keys
from satchel.run.server.reference import reference
from satchel.run.server.replies import Reply
from satchel.run.server.sending import ClientGone, EventStream, while_there
from satchel.run.server.wire import (
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    Generating,
    LoadAdapterBody,
    UnloadAdapterBody,
)

PAGE = Path(__file__).with_name("page.html")
METRICS_TYPE = "text/plain; version=1.0.0; charset=utf-8"
GONE = 499  # nginx's number for a client that closed its connection
KINDS = {400: "malformed", 429: "too much", 503: "not now"}
ERRORS: dict[int | str, dict[str, Any]] = {status: {"description": text} for status, text in KINDS.items()}


def build(house: House, keys: Keys | None = None) -> App:
    """The whole application, with what every request passes first."""
    app = FastAPI(title="satchel", version=satchel.__version__, redoc_url=None, docs_url=None)
    _faults(app)
    _models(app, house)
    _answers(app, house)
    add_batches(app, house)
    _watching(app, house)
    return Gate(app, house, keys or Keys())


def _answers(app: FastAPI, house: House) -> None:
    @app.post("/v1/chat/completions", responses=ERRORS)
    async def chat_completions(body: ChatBody, request: Request) -> Any:
        """Answer a conversation."""
        return await _send(house, request, body, await chat(house, body, **_who(request)))

    @app.post("/v1/completions", responses=ERRORS)
    async def completions(body: CompletionBody, request: Request) -> Any:
        """Continue texts or tokens."""
        return await _send(house, request, body, await complete(house, body, **_who(request)))

    @app.post("/v1/embeddings", responses=ERRORS)
    async def embeddings(body: EmbeddingBody, request: Request) -> Any:
        """Texts or tokens as vectors."""
        found = await while_there(request, embed(house, body, request.state.client.name))
        _charge(request, found["usage"])
        return JSONResponse(found)


def _models(app: FastAPI, house: House) -> None:
    @app.get("/v1/models")
    async def models() -> Any:
        """What `model` may be."""
        return {"object": "list", "data": [_model(house, name) for name in house.models]}

    @app.get("/v1/models/{name:path}", responses={404: {"description": "no such model"}})
    async def model(name: str) -> Any:
        """One of them."""
        house.adapter(name)
        return _model(house, name)

    @app.post("/v1/load_lora_adapter", responses=ERRORS)
    async def load(body: LoadAdapterBody) -> Any:
        """Serve an adapter more."""
        await house.load_adapter(body.lora_name, body.lora_path)
        return {"status": "loaded", "id": body.lora_name}

    @app.post("/v1/unload_lora_adapter", responses=ERRORS)
    async def unload(body: UnloadAdapterBody) -> Any:
        """Serve an adapter less."""
        await house.unload_adapter(body.lora_name)
        return {"status": "unloaded", "id": body.lora_name}


def _watching(app: FastAPI, house: House) -> None:
    @app.get("/health", responses={503: {"description": "no progress"}})
    async def health() -> Any:
        """Whether the engine makes progress."""
        return _state(house.healthy, "ok", "the engine makes no progress")

    @app.get("/ready", responses={503: {"description": "not now"}})
    async def ready() -> Any:
        """Whether requests are taken now."""
        return _state(house.healthy and not house.draining, "ready", "not ready")

    @app.get("/metrics")
    async def metrics() -> Any:
        """Figures for Prometheus."""
        return Response(house.metrics.text(), media_type=METRICS_TYPE)

    @app.get("/stats")
    async def stats() -> Any:
        """What the page shows."""
        return house.snapshot()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Any:
        """The routes, for people."""
        return HTMLResponse(reference(app.openapi()))

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Any:
        """Chat, memory, queue."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))


def _faults(app: FastAPI) -> None:
    """What becomes of each kind of error."""
    become: dict[type[Exception], Callable[[Any], Fault]] = {
        Fault: lambda error: error,
        RequestValidationError: lambda error: malformed(error.errors()),
        UserError: refused,
        SatchelError: lambda error: unavailable(str(error)),
        HTTPException: lambda error: Fault(error.status_code, str(error.detail)),
        ClientGone: lambda error: Fault(GONE, "the client went away"),
        Exception: lambda error: broken(f"{type(error).__name__}; see the server's log"),
    }
    for kind, make in become.items():
        app.add_exception_handler(kind, _handler(make))


def _handler(make: Callable[[Any], Fault]) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(request: Request, error: Exception) -> Response:
        fault = make(error)
        return JSONResponse(fault.body, fault.status, fault.headers)

    return handle


async def _send(house: House, request: Request, body: Generating, reply: Reply) -> Any:
    """The reply whole, or as a stream of events; what it cost is charged and noted when it ends."""

    def note(ended: Reply) -> None:
        _charge(request, ended.usage)
        request.state.usage["first_token_s"] = ended.timer.first_s

    reply.on_end = note
    if not body.stream:
        return JSONResponse(await while_there(request, reply.whole()))
    options = body.stream_options
    return EventStream(reply.chunks(options is not None and options.include_usage), house.terms.read_s)


def _charge(request: Request, usage: dict[str, Any]) -> None:
    request.state.client.end(usage["total_tokens"])
    request.state.usage |= {name: usage[name] for name in ("prompt_tokens", "completion_tokens") if name in usage}


def _who(request: Request) -> dict[str, str]:
    return {"tenant": request.state.client.name, "request_id": request.state.request_id}


def _model(house: House, name: str) -> dict[str, Any]:
    parent = None if name == house.name else house.name
    return {"id": name, "object": "model", "created": house.created, "owned_by": "satchel", "parent": parent}


def _state(holds: bool, good: str, bad: str) -> Response:
    return JSONResponse({"status": good if holds else bad}, 200 if holds else 503)
