"""From a serve job to a server that answers: port, engine, routes.

Serving(ServeJob(model="demo", memory="1GiB"), port=8000).run()         # until SIGTERM or ctrl-C
with Serving(ServeJob(model="demo", memory="1GiB")) as url: ...         # in a thread, as long as the block lasts
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from satchel.core.errors import JobError
from satchel.core.serve import ServeJob, Terms
from satchel.core.units import format_bytes
from satchel.run.memory import tame_heap
from satchel.run.serve import Service, open_service
from satchel.run.server.app import build
from satchel.run.server.grammar import Grammar
from satchel.run.server.house import House
from satchel.run.server.keys import Keys, read_keys
from satchel.run.server.listen import Server, bind
from satchel.run.server.metrics import Metrics
from satchel.run.server.worker import Worker

Note = Callable[[str], None]
Ready = Callable[[Server, str], None]  # hears of the server and its address


@dataclass
class Serving:
    """A server of one job, to `run` until it is told to leave, or as a context in a thread of its own."""

    job: ServeJob
    host: str = "127.0.0.1"  # to listen on
    port: int = 0  # 0: a free one
    api_keys: str = ""  # a TOML file of clients; empty: everybody
    terms: Terms = field(default_factory=Terms)
    _begun: Future[tuple[Server, str]] = field(default_factory=Future, init=False, repr=False)
    _thread: threading.Thread = field(init=False, repr=False)

    def run(self, note: Note = lambda text: None) -> None:
        """Serves until SIGTERM or ctrl-C. Raises UserError before anything is loaded where something is wrong with it.

        `note` hears in one line where the memory goes, and in another the address.
        """
        with self._opened() as opened:
            note(_described(opened.service))
            name = public_name(self.job.model)
            ready = f"{name} is served at {{0}}; its OpenAI API at {{0}}/v1; ctrl-C ends it in good order"
            asyncio.run(self._serve(opened, lambda server, url: note(ready.format(url))))

    def __enter__(self) -> str:
        """The address, once requests are taken. Raises what `run` does."""
        self._thread = threading.Thread(target=self._run_aside, name="server")
        self._thread.start()
        return self._begun.result()[1]

    def __exit__(self, *_: object) -> None:
        self._begun.result()[0].leave()
        self._thread.join()
        self._begun = Future()

    def _run_aside(self) -> None:
        try:
            with self._opened() as opened:
                asyncio.run(self._serve(opened, lambda *found: self._begun.set_result(found)))
            if not self._begun.done():
                raise JobError("the server left before it took requests; the log says why")
        except BaseException as error:
            if self._begun.done():
                raise
            self._begun.set_exception(error)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[_Opened]:
        keys = read_keys(self.api_keys) if self.api_keys else Keys()
        tame_heap()
        with bind(self.host, self.port) as at:
            service = open_service(self.job, Grammar.ready, self.terms.reserve_bytes)
            try:
                yield _Opened(at, keys, service)
            finally:
                service.governor.end()

    async def _serve(self, opened: _Opened, on_ready: Ready) -> None:
        house = open_house(opened.service, self.terms)
        server = Server(build(house, opened.keys), house)
        await server.listen(opened.at, lambda url: on_ready(server, url))


@dataclass(frozen=True)
class _Opened:
    """What a server is made of."""

    at: socket.socket
    keys: Keys
    service: Service


def _described(service: Service) -> str:
    """Where the memory goes, in one line."""
    room = service.capacity
    spent = ", ".join(f"{account} {format_bytes(size)}" for account, size in room.accounts.items())
    return (
        f"{format_bytes(room.budget_bytes)}: {spent}; room for {room.tokens:,} tokens, "
        f"{room.limits.batch} answers at once of {room.limits.context:,} tokens at most"
    )


def open_house(service: Service, terms: Terms) -> House:
    """What the routes work with. Call it on the event loop that serves it."""
    name, capacity = public_name(service.job.model), service.capacity
    return House(
        Worker(service.engine),
        service.tokenizer,
        service.beside,
        name,
        capacity.limits,
        Metrics(name),
        terms,
        fixed={account: size for account, size in capacity.accounts.items() if account != "kv"},
        budget_bytes=capacity.budget_bytes,
        adapters=Path(service.job.adapters) if service.job.adapters else None,
    )


def public_name(model: str) -> str:
    """How clients call a model: a folder or file by its last name, anything else as it is."""
    path = Path(model).expanduser()
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model
