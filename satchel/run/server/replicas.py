"""Several engines behind one address, on Ray Serve: each replica is a process with its share of the memory and cores.

    front       takes the request, and gives it to Ray's router under a name: adapter and beginning of the prompt
    router      Ray's own, for multiplexed models: a name goes where it went before, as long as that replica has room,
                and to the less busy of two otherwise; so adapters and known beginnings are found where they lie
    replica     the application that `satchel serve` runs alone, over an engine of its own

What Ray needs itself (its daemons, the front) lies beside the budget. What would have to be told to all replicas, or is
kept by one of them, is not there: loading adapters over the API, files and batches, keys with quotas.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
from collections.abc import AsyncGenerator, Callable, MutableMapping
from hashlib import blake2b
from typing import Any

import torch

from satchel.core.errors import JobError, UserError
from satchel.core.serve import ServeJob, Terms
from satchel.core.units import format_bytes, parse_bytes
from satchel.run.memory import tame_heap
from satchel.run.serve import open_service
from satchel.run.server.app import build
from satchel.run.server.bodies import Bodies
from satchel.run.server.faults import Fault
from satchel.run.server.grammar import Grammar
from satchel.run.server.listen import bind
from satchel.run.server.start import open_house

Message = MutableMapping[str, Any]
ALONE = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/files", "/v1/batches")  # of one replica's own
BEGINNING = 256  # characters of a prompt by which its replica is chosen
NAMES = 512  # of beginnings that a replica is known for
HELD = 64  # pieces of an answer that wait for the client
NAME = "satchel"


def share(job: ServeJob, replicas: int) -> ServeJob:
    """The job of one of several replicas. Raises UserError where no memory is named that could be divided."""
    if job.memory == "auto":
        raise UserError("replicas share the memory that is named; give --memory, such as 4GiB")
    return job.replace(memory=f"{parse_bytes(job.memory) // replicas}B")


def name_of(body: bytes) -> str:
    """By which a replica is known to have seen this model and beginning; empty for what is no request."""
    try:
        found = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(found, dict):
        return ""
    said = found.get("messages") or found.get("prompt") or found.get("input") or ""
    text = said if isinstance(said, str) else json.dumps(said)
    return blake2b(f"{found.get('model')}\0{text[:BEGINNING]}".encode(errors="replace"), digest_size=8).hexdigest()


class Replica:
    """One engine and its application, in a process of Ray's."""

    def __init__(self, job: ServeJob, terms: Terms, threads: int) -> None:
        torch.set_num_threads(threads)
        tame_heap()
        self.service = open_service(job, Grammar.ready, terms.reserve_bytes)
        self.terms, self.id = terms, f"{os.getpid()}".encode()
        self.house = None
        self.app: Any = None

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
        """The messages of ASGI that answer a request; the engine forgets it when nobody takes them any more."""
        self._begin()
        told: asyncio.Queue[Message | None] = asyncio.Queue(HELD)
        gone, given = asyncio.Event(), False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self.app(scope, receive, told.put)
            finally:
                await told.put(None)

        task = asyncio.create_task(run())
        try:
            while (message := await told.get()) is not None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"x-replica", self.id)]
                yield message
        finally:
            gone.set()
            while not task.done():
                with contextlib.suppress(asyncio.QueueEmpty):
                    told.get_nowait()
                await asyncio.sleep(0.01)

    def check_health(self) -> None:
        """Asked by Ray; raises SatchelError where the replica is better begun anew."""
        if self.house is not None and not self.house.healthy:
            raise JobError("the engine makes no progress")

    def _begin(self) -> None:
        """On the event loop that serves the requests."""
        if self.house is None:
            self.house = open_house(self.service, self.terms)
            self.app = build(self.house)


class Front:
    """An ASGI application that passes requests on to replicas."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.bodies: Bodies | None = None  # made where it is used: it is sent to another process before

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            try:
                await self._answer(scope, receive, send)
            except Fault as fault:
                headers = [(b"content-type", b"application/json")]
                await send({"type": "http.response.start", "status": fault.status, "headers": headers})
                await send({"type": "http.response.body", "body": json.dumps(fault.body).encode()})

    async def _answer(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["path"].startswith(ALONE):
            raise Fault(400, "this is one server's own, and here are several; leave --replicas out for it")
        self.bodies = self.bodies or Bodies(self.terms)
        headers = dict(scope["headers"])
        kind, length = headers.get(b"content-type", b""), headers.get(b"content-length", b"")
        async with self.bodies.whole(kind, length, receive) as whole:
            body = (await whole())["body"]
            told = _replicas(name_of(body)).answer.remote(_plain(scope), body)
            try:
                async for message in told:
                    await send(message)
            finally:
                told.cancel()


def serve_replicas(
    job: ServeJob,
    replicas: int,
    host: str,
    port: int,
    api_keys: str,
    terms: Terms,
    note: Callable[[str], None],
) -> None:
    """Serves with so many engines until SIGTERM or ctrl-C. Raises UserError for what replicas cannot share."""
    if api_keys:
        raise UserError("quotas are counted by one server; leave --api-keys or --replicas out")
    own, ray, serve = share(job, replicas), *_ray()
    with bind(host, port) as at:
        port = at.getsockname()[1]
    cores = os.cpu_count() or 1
    ray.init(num_cpus=2 * replicas + 2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port, "access_log": False})
        how = {"num_cpus": 1}
        replica = serve.deployment(_multiplexed(serve)).options(
            name="replica",
            num_replicas=replicas,
            max_ongoing_requests=terms.queue,
            graceful_shutdown_timeout_s=terms.drain_s,
            ray_actor_options=how,
        )
        front = serve.deployment(serve.ingress(Front(terms))(type("Ingress", (), {}))).options(
            name="front", max_ongoing_requests=replicas * terms.queue, ray_actor_options=how
        )
        serve.run(replica.bind(own, terms, max(1, cores // replicas)), name="engines", route_prefix=None)
        serve.run(front.bind(), name=NAME, route_prefix="/")
        note(f"{replicas} replicas of {format_bytes(parse_bytes(own.memory))} are served at http://{host}:{port}")
        _until_told()
    finally:
        serve.shutdown()
        ray.shutdown()


def _multiplexed(serve: Any) -> type:
    """The replica, which tells Ray's router what names it answered to."""

    class Known(Replica):
        async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
            if name := serve.get_multiplexed_model_id():
                await self.remember(name)
            async for message in super().answer(scope, body):
                yield message

        @serve.multiplexed(max_num_models_per_replica=NAMES)
        async def remember(self, name: str) -> str:
            return name

    return Known


def _replicas(name: str) -> Any:
    """The replicas as Ray's router chooses among them for a name."""
    from ray import serve  # pyright: ignore[reportMissingImports]

    return serve.get_deployment_handle("replica", "engines").options(stream=True, multiplexed_model_id=name)


def _plain(scope: Message) -> dict[str, Any]:
    """What of a request's scope can be sent to another process."""
    names = ("type", "http_version", "method", "path", "raw_path", "query_string", "scheme", "client", "server")
    headers = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
    return {name: scope[name] for name in names if name in scope} | {"headers": headers, "root_path": ""}


def _until_told() -> None:
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    told.wait()


def _ray() -> tuple[Any, Any]:
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray import serve  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise UserError("replicas need Ray Serve; pip install 'satchel[replicas]'") from None
    return ray, serve
