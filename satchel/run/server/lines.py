"""Batches as OpenAI writes them: one request a line in, one answer a line out. The same for files and for the server.

{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
{"id": ..., "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}}, "error": null}
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from satchel.core.errors import DataError, UserError, nearest
from satchel.run.server.chats import chat
from satchel.run.server.completions import complete
from satchel.run.server.embeddings import embed
from satchel.run.server.faults import Fault, malformed, refused
from satchel.run.server.house import House
from satchel.run.server.wire import ChatBody, CompletionBody, EmbeddingBody

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
FIELDS = ("custom_id", "method", "url", "body")
Answer = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One request of a batch."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read_lines(raw: Iterable[bytes], where: str, url: str = "") -> list[Line]:
    """The requests of a batch, empty lines left out; `url`: the one that all of them have. Raises DataError with all
    that is wrong: nothing is answered of a batch that is not whole."""
    lines: list[Line] = []
    problems: list[str] = []
    seen: set[str] = set()
    for number, text in enumerate(raw, 1):
        if not text.strip():
            continue
        try:
            lines.append(_line(text, url, seen))
        except ValueError as problem:
            problems.append(f"{where}:{number}: {problem}")
    if not lines and not problems:
        problems.append(f"{where}: holds no request")
    if problems:
        raise DataError(problems)
    return lines


def _line(text: bytes, url: str, seen: set[str]) -> Line:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("a JSON object is expected")
    for name in found:
        if name not in FIELDS:
            raise ValueError(f"no field '{name[:80]}' here; {nearest(name[:80], FIELDS)}")
    id, body, to = found.get("custom_id"), found.get("body"), found.get("url")
    if not isinstance(id, str) or not id:
        raise ValueError("custom_id: a text is expected, by which the answer is known")
    if id in seen:
        raise ValueError(f"custom_id: '{id[:80]}' came before; each line has its own")
    if found.get("method", "POST") != "POST":
        raise ValueError("method: POST is expected")
    if not isinstance(to, str) or to not in ((url,) if url else URLS):
        raise ValueError(f"url: {url or ' or '.join(URLS)} is expected, not {str(to)[:80]!r}")
    if not isinstance(body, dict):
        raise ValueError("body: a JSON object is expected")
    seen.add(id)
    return Line(id, to, body)


async def answer_lines(
    house: House, lines: Sequence[Line], tenant: str, write: Callable[[Answer], None], width: int
) -> None:
    """Answers every line, `width` at a time, and writes each answer as it comes; a wrong line's is its error.

    Raises a group of Faults if the server leaves; what was written stands.
    """
    left = iter(lines)

    async def work() -> None:
        for line in left:
            write(await answer_line(house, line, tenant))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(width, len(lines))):
            group.create_task(work())


async def answer_line(house: House, line: Line, tenant: str) -> Answer:
    """The answer to one line; it waits while the server is busy."""
    request_id = uuid.uuid4().hex
    while True:
        try:
            status, body = 200, await _answer(house, line, tenant, request_id)
        except Fault as fault:
            if fault.status == 503:
                raise
            if fault.status == 429:
                await asyncio.sleep(fault.retry_after_s or 1.0)
                continue
            status, body = fault.status, fault.body
        except UserError as error:
            status, body = 400, refused(error).body
        response = {"status_code": status, "request_id": request_id, "body": body}
        return {"id": f"batch_req_{request_id}", "custom_id": line.custom_id, "response": response, "error": None}


async def _answer(house: House, line: Line, tenant: str, request_id: str) -> dict[str, Any]:
    try:
        if line.url == "/v1/embeddings":
            return await embed(house, EmbeddingBody.model_validate(line.body), tenant)
        if line.url == "/v1/completions":
            completion = CompletionBody.model_validate(line.body)
            _refuse_stream(completion.stream)
            return await (await complete(house, completion, tenant, request_id)).whole()
        body = ChatBody.model_validate(line.body)
        _refuse_stream(body.stream)
        return await (await chat(house, body, tenant, request_id)).whole()
    except ValidationError as error:
        raise malformed(error.errors(include_context=False)) from None


def _refuse_stream(stream: bool | None) -> None:
    if stream:
        raise Fault(400, "a batch has no streams; leave stream out", param="stream")
