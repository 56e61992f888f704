"""Bodies of requests: read whole before anything is done with them, within limits on each and on all together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from satchel.core.serve import TOGETHER, Terms
from satchel.run.server.faults import Fault, overloaded
from satchel.run.server.sending import ClientGone

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class Bodies:
    """What clients have sent and is not answered yet."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.held_bytes = 0

    @asynccontextmanager
    async def whole(self, kind: bytes, length: bytes, receive: Receive) -> AsyncGenerator[Receive, None]:
        """Gives the body at once, later on; it counts as held until then. Raises Fault for one that is too large or too
        slow, or that is JSON and no text. `kind`, `length`: of the headers."""
        if length.isdigit() and int(length) > self.terms.body_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(self.terms.read_s):
                    while await self._more(body, receive):
                        pass
            except TimeoutError:
                raise Fault(408, "the body did not arrive in time; send it at once", kind="timeout_error") from None
            if b"json" in kind:
                _require_text(body)
            yield _replay(bytes(body), receive)
        finally:
            self.held_bytes -= len(body)

    async def _more(self, body: bytearray, receive: Receive) -> bool:
        """Reads a part more; whether others follow."""
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGone
        part = message.get("body", b"")
        body += part
        self.held_bytes += len(part)
        if len(body) > self.terms.body_bytes:
            raise self._too_large()
        if self.held_bytes > TOGETHER * self.terms.body_bytes:
            raise overloaded("too many large bodies at once; come again", 1.0)
        return message.get("more_body", False)

    def _too_large(self) -> Fault:
        limit = self.terms.body_bytes
        return Fault(413, f"the body is larger than the {limit} bytes that this server reads", code="body_too_large")


def _require_text(body: bytearray) -> None:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise Fault(400, f"the body is not UTF-8: byte {body[error.start]:#04x} at {error.start}") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body once; after it what the client does, such as going away."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
