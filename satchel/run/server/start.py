"""From a serve job to a server that answers: port, engine, routes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from satchel.core.serve import ServeJob
from satchel.core.units import format_bytes
from satchel.run.serve import Service, open_service
from satchel.run.server.app import build
from satchel.run.server.house import House, Terms
from satchel.run.server.keys import Keys, read_keys
from satchel.run.server.listen import Server, bind
from satchel.run.server.metrics import Metrics
from satchel.run.server.worker import Worker

Note = Callable[[str], None]


@dataclass(frozen=True)
class Address:
    """Where to listen, and for whom."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    api_keys: str = ""  # a TOML file; empty: everybody


def serve(job: ServeJob, address: Address, terms: Terms, note: Note = lambda text: None) -> None:
    """Serves until SIGTERM or ctrl-C. Raises UserError before anything is loaded where something is wrong with it."""
    keys = read_keys(address.api_keys) if address.api_keys else Keys()
    at = bind(address.host, address.port)
    with at:
        service = open_service(job)
        note(_described(service))
        try:
            asyncio.run(_serve(service, at, keys, terms, note))
        finally:
            service.governor.end()


async def _serve(service: Service, at: socket.socket, keys: Keys, terms: Terms, note: Note) -> None:
    house = open_house(service, terms)
    ready = f"{house.name} is served at {{}}; its OpenAI API at {{}}/v1; ctrl-C ends it in good order"
    await Server(build(house, keys), house).listen(at, lambda url: note(ready.format(url, url)))


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
