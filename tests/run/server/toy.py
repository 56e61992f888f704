"""A server of a toy model with a real tokenizer, a request through its ASGI application, and a uvicorn of it."""

import asyncio
import contextlib
import socket
import threading
import time

import httpx
import torch

from bench import _toy
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits
from satchel.run.server.app import build
from satchel.run.server.grammar import Grammar
from satchel.run.server.house import House, Terms
from satchel.run.server.listen import Server, bind
from satchel.run.server.metrics import Metrics
from satchel.run.server.worker import Worker
from tests.run.toys import toy_decoder

TEMPLATE = (
    "{% if tools %}<s>tools {{ tools | tojson }} write <tool_call></s>{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def byte_tokenizer(template=TEMPLATE):
    """One token a byte, and a template that writes tools and their calls."""
    return _toy.byte_tokenizer(template)


def toy_house(template=TEMPLATE, terms=None, **limits):
    """Made on the event loop that serves it."""
    torch.set_num_threads(1)
    limits = Limits(**({"blocks": 64, "batch": 8, "step_tokens": 64, "context": 256} | limits))
    tokenizer = byte_tokenizer(template)
    engine = Engine(toy_decoder(vocab=258), limits, tokenizer)
    return House(Worker(engine), tokenizer, Grammar(tokenizer, 258), "toy", limits, Metrics("toy"), terms or Terms())


@contextlib.asynccontextmanager
async def client_of(house, keys=None):
    """An httpx client that talks to the application without a network."""
    transport = httpx.ASGITransport(build(house, keys), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://toy") as client:
        yield client
    with contextlib.suppress(Exception):
        await house.worker.ask(house.worker.engine.check_integrity)
    await house.worker.stop()


class Running:
    """A toy server on a free port, in a thread of its own: `with Running() as server: server.url`."""

    def __init__(self, keys=None, send_buffer=0, **house):
        self.send_buffer = send_buffer
        self.keys, self.house_settings = keys, house
        self.ready, self.url, self.server, self.house = threading.Event(), "", None, None
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self):
        self.house = toy_house(**self.house_settings)
        self.server = Server(build(self.house, self.keys), self.house)
        with bind("127.0.0.1", 0) as at:
            if self.send_buffer:
                at.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.send_buffer)
            await self.server.listen(at, self._note)

    @contextlib.contextmanager
    def held(self):
        """No step of the engine ends until the block does."""
        go = threading.Event()
        with self._stepping(lambda: go.wait(30)):
            try:
                yield
            finally:
                go.set()

    def slowed(self, seconds=0.01):
        """Every step of the engine takes so long at least, as long as the block lasts."""
        return self._stepping(lambda: time.sleep(seconds))

    @contextlib.contextmanager
    def _stepping(self, before):
        engine, step = self.house.worker.engine, self.house.worker.engine.step
        engine.step = lambda: (before(), step())[1]
        try:
            yield
        finally:
            engine.step = step

    def _note(self, url):
        self.url = url
        self.ready.set()

    def __enter__(self):
        self.thread.start()
        assert self.ready.wait(30)
        return self

    def __exit__(self, *_):
        self.server.leave()
        self.thread.join(30)
        assert not self.thread.is_alive()
        self.house.worker.engine.check_integrity()
        assert self.house.worker.engine.idle and self.house.worker.idle and not self.house.weight.held_bytes


async def _alone():
    """A server in this process, ended by a signal; prints its address. Slow enough to be caught at work."""
    house = toy_house()
    engine, step = house.worker.engine, house.worker.engine.step
    engine.step = lambda: (time.sleep(0.005), step())[1]
    with bind("127.0.0.1", 0) as at:
        await Server(build(house), house).listen(at, lambda url: print(url, flush=True))


if __name__ == "__main__":
    asyncio.run(_alone())
