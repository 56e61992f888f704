"""Listens, serves, and goes in good order: at SIGTERM what runs is finished and what comes is refused.

The port is taken before the model is loaded, so that one that is in use is known at once.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from satchel.core.errors import UserError
from satchel.run.server.gate import App
from satchel.run.server.house import House

log = logging.getLogger("satchel.server")
GRACE_S = 5  # for what is on its way to clients when the engine has ended
POLL_S = 0.05
BACKLOG = 2048  # connections that wait to be taken


def bind(host: str, port: int) -> socket.socket:
    """A socket with this address, not listening yet; port 0 takes a free one. Raises UserError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except (OSError, OverflowError) as fault:
        taken.close()
        why = getattr(fault, "strerror", None) or str(fault)
        cure = "give another --port, 0 for any, or another --host"
        raise UserError(f"{host}:{port} cannot be listened on: {why}; {cure}") from None
    return taken


class Server(uvicorn.Server):
    """Drains at the first signal, and stops at the second."""

    def __init__(self, app: App, house: House) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="off",
            timeout_graceful_shutdown=GRACE_S,
        )
        super().__init__(config)
        self.house = house
        self._drain: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.leave()

    def leave(self) -> None:
        """Go in good order; asked once more, go at once. From any thread."""
        self._loop.call_soon_threadsafe(self._leave)

    async def listen(self, at: socket.socket, on_ready: Callable[[str], None]) -> None:
        """Serves until it is asked to leave, or until the engine dies; `on_ready` hears the address."""
        at.listen(BACKLOG)
        host, port = at.getsockname()[:2]
        serving = asyncio.create_task(self.serve(sockets=[at]))
        while not self.started and not serving.done():
            await asyncio.sleep(POLL_S)
        if self.started:
            on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        watching = asyncio.create_task(self._watch())
        try:
            await serving
        finally:
            watching.cancel()
            if self.house.worker.alive:
                await self.house.worker.stop()

    def _leave(self) -> None:
        if self.house.draining:
            self.should_exit = self.force_exit = True
            return
        self.house.draining = True
        self._drain = asyncio.create_task(self._drained())

    async def _drained(self) -> None:
        """Waits for what runs, as long as the terms say, and for the engine's death."""
        terms, worker = self.house.terms, self.house.worker
        log.info("draining", extra={"fields": {"open": worker.open, "limit_s": terms.drain_s}})
        try:
            async with asyncio.timeout(terms.drain_s):
                while not worker.idle and worker.alive:
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            log.warning("the time to drain is over", extra={"fields": {"open": worker.open}})
        await worker.stop()
        self.should_exit = True

    async def _watch(self) -> None:
        """A server without an engine is better gone, so that its keeper starts another."""
        while self.house.worker.alive:
            await asyncio.sleep(1.0)
        if not self.house.draining:
            self.should_exit = True
