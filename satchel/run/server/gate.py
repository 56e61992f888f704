"""What every request passes first: an id, the key, quotas, the size and time of its body; and its line in the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from satchel.run.server.bodies import Bodies, Message, Receive
from satchel.run.server.faults import Fault, broken
from satchel.run.server.house import House
from satchel.run.server.keys import Keys
from satchel.run.server.sending import ClientGone

log = logging.getLogger("satchel.server")
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
LINGER_S = 2.0  # for the rest of a body that is not wanted
REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")


class Gate:
    """An ASGI application in front of another."""

    def __init__(self, app: App, house: House, keys: Keys) -> None:
        self.app, self.house, self.keys, self.bodies = app, house, keys, Bodies(house.terms)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        id = given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state |= {"request_id": id, "client": None, "usage": {}}
        out, receive = _Out(send, id), _In(receive)
        begun_s = time.monotonic()
        try:
            if scope["path"].startswith("/v1/"):
                state["client"] = client = self.keys.client(headers.get(b"authorization", b"").decode("latin-1"))
                if scope["method"] == "POST":
                    client.begin()
            if scope["method"] != "POST":
                return await self.app(scope, receive, out)
            kind, length = headers.get(b"content-type", b""), headers.get(b"content-length", b"")
            async with self.bodies.whole(kind, length, receive) as whole:
                await self.app(scope, whole, out)
        except Fault as fault:
            await out.fault(fault, receive)
        except ClientGone:
            pass  # there is nobody to tell; the line in the log says so
        except Exception as error:
            log.exception("request failed", extra={"fields": {"request_id": id}})
            await out.fault(broken(f"{type(error).__name__}; the server's log has the request id {id}"), receive)
        finally:
            self._note(scope, state, out.status, time.monotonic() - begun_s)

    def _note(self, scope: MutableMapping[str, Any], state: dict[str, Any], status: int, seconds: float) -> None:
        client = state["client"].name if state["client"] else ""
        fields = {
            "request_id": state["request_id"],
            "client": client,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
        }
        level = logging.INFO if scope["path"].startswith("/v1/") else logging.DEBUG
        log.log(level, "request", extra={"fields": fields | state["usage"]})


class _In:
    """Passes a request's body on; remembers whether that was all of it."""

    def __init__(self, receive: Receive) -> None:
        self.receive, self.whole = receive, False

    async def __call__(self) -> Message:
        message = await self.receive()
        self.whole = not message.get("more_body", False)
        return message

    async def linger(self) -> None:
        """Throw away what is still on its way, for a while: a client that is sending when the connection is closed
        loses the answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while not self.whole:
                    await self()


class _Out:
    """Passes an answer on, with the request's id; remembers what became of it."""

    def __init__(self, send: Send, id: str) -> None:
        self.send, self.id = send, id
        self.status = 0  # 0: nothing was answered

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
        await self.send(message)

    async def fault(self, fault: Fault, receive: _In) -> None:
        """Answers with an error, unless an answer has begun."""
        if self.status:
            return
        body = json.dumps(fault.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **fault.headers}
        if fault.status in (408, 413):
            headers["connection"] = "close"  # the rest of the body is not read
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": fault.status, "headers": raw})
        await self({"type": "http.response.body", "body": body, "more_body": True})
        await receive.linger()
        await self({"type": "http.response.body", "body": b""})
