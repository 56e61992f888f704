"""The one thread that calls the engine. Requests go in through a queue, events come out on the event loop.

    stream = await worker.submit([request, ...])
    async for number, event in stream: ...          # of requests[number]; ends when all have ended
    await stream.close()                            # ends them early, if they have not

Between two steps the thread does what was asked of it; the events of a step reach the event loop in one call. A step
that fails ends the requests that were open, each with an `error`; the engine goes on if its books are in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from satchel.core.errors import SatchelError
from satchel.core.request import Event, Request, Usage
from satchel.run.engine import Engine
from satchel.run.memory import trim_heap

log = logging.getLogger("satchel.server")
T = TypeVar("T")
IDLE_S = 0.5  # without a request, after which the engine's books are checked
Task = tuple[Future[Any], Callable[[], Any]]
Told = tuple[int, Event]  # which of a stream's requests, what


@dataclass(eq=False)
class Stream:
    """The events of requests that were submitted together."""

    worker: Worker
    requests: Sequence[Request]
    left: int  # requests that have not ended
    told: list[Told] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # the engine's thread alone uses them
    waker: asyncio.Event = field(default_factory=asyncio.Event)
    on_close: Callable[[], None] = lambda: None

    async def __aiter__(self) -> AsyncIterator[Told]:
        async for told in self.batches():
            for number, event in told:
                yield number, event

    async def batches(self) -> AsyncIterator[list[Told]]:
        """The events as they come, all at once that have come since the last time."""
        while self.left or self.told:
            await self.waker.wait()
            self.waker.clear()
            told, self.told = self.told, []
            self.left -= sum(event.usage is not None for _, event in told)
            if told:
                yield told

    def close(self) -> None:
        """Ends what has not ended; its events are dropped."""
        on_close, self.on_close = self.on_close, lambda: None
        on_close()
        if self.left:
            self.left = 0
            self.told = []
            self.worker.cancel(self)

    def hear(self, told: list[Told]) -> None:
        """Events came."""
        self.told += told
        self.waker.set()


class Worker:
    """Runs an engine. Made and used on an event loop, but for what is said to belong to the thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.open = 0  # requests that were submitted and have not ended
        self.stats = engine.stats()
        self.checks = 0  # times that the idle engine's books were found in order
        self.failure: BaseException | None = None  # what ended the thread before its time
        self.stepped_s = time.monotonic()  # when the engine last made progress, or had nothing to do
        self._loop = asyncio.get_running_loop()
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._streams: dict[int, tuple[Stream, int]] = {}  # by request; the thread's
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are served."""
        return self._thread.is_alive() and self.failure is None

    @property
    def idle(self) -> bool:
        """Whether no request is open."""
        return self.open == 0

    async def submit(self, requests: Sequence[Request]) -> Stream:
        """Gives requests to the engine, all or none. Raises UserError for one that can never run."""
        self._require_life()
        stream = Stream(self, requests, len(requests))
        self.open += len(requests)
        try:
            await self.ask(lambda: self._submit(stream))
        except asyncio.CancelledError:
            stream.close()
            raise
        return stream

    def cancel(self, stream: Stream) -> None:
        """Ends what has not ended of a stream."""
        self._tasks.put((Future(), lambda: self._cancel(stream)))

    async def ask(self, task: Callable[[], T]) -> T:
        """The result of a function that the engine's thread calls between two steps."""
        self._require_life()
        answer: Future[T] = Future()
        self._tasks.put((answer, task))
        if not self.alive:
            self._refuse()  # the thread may have ended before it saw the task
        return await asyncio.shield(asyncio.wrap_future(answer))  # a task that was begun is finished

    async def stop(self) -> None:
        """Ends what is open, and the thread. Its last step is waited for."""
        self._tasks.put(None)
        await asyncio.to_thread(self._thread.join)

    def _require_life(self) -> None:
        if not self.alive:
            raise SatchelError(f"the engine has stopped: {self.failure}")

    # From here on: the thread.

    def _run(self) -> None:
        try:
            while self._work():
                pass
            self._publish([event for id in list(self._streams) for event in self.engine.cancel(id)])
        except BaseException as error:
            log.exception("the engine has stopped")
            self.failure = error
            self._fail(f"the engine has stopped: {error}")
        self._refuse()

    def _work(self) -> bool:
        """Does what was asked, and one step; waits where there is neither. False at the end."""
        wait = self.engine.idle
        while wait or not self._tasks.empty():
            self.stepped_s = time.monotonic()
            task = self._next()
            if task is None:
                return False
            _fulfil(*task)
            wait = self.engine.idle and self._tasks.empty()
        self._step()
        return True

    def _next(self) -> Task | None:
        """The next task. Who finds none for a while looks through the books, and gives back what nobody needs. Raises
        SatchelError if the books are wrong."""
        with contextlib.suppress(queue.Empty):
            return self._tasks.get(timeout=IDLE_S)
        self.engine.check_integrity()
        trim_heap()
        self.checks += 1
        return self._tasks.get()

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception as error:
            log.exception("a step failed; the open requests end")
            for id in list(self._streams):
                self.engine.cancel(id)
            self._fail(f"{type(error).__name__}: {error}")
            self.engine.check_integrity()
        else:
            self._publish(events)
        self.stepped_s = time.monotonic()

    def _submit(self, stream: Stream) -> None:
        try:
            for number, request in enumerate(stream.requests):
                id = self.engine.submit(request)
                stream.ids.append(id)
                self._streams[id] = stream, number
        except SatchelError:
            for id in stream.ids:
                self.engine.cancel(id)
                del self._streams[id]
            self._loop.call_soon_threadsafe(self._count, -len(stream.requests))
            raise

    def _cancel(self, stream: Stream) -> None:
        self._publish([event for id in stream.ids for event in self.engine.cancel(id)])

    def _refuse(self) -> None:
        """Tells those whose tasks will never be done."""
        while not self._tasks.empty():
            if task := self._tasks.get():
                task[0].set_exception(SatchelError(f"the engine has stopped: {self.failure}"))

    def _fail(self, why: str) -> None:
        self._publish([Event(id, finish="error", error=why, usage=Usage(0, 0)) for id in self._streams])

    def _publish(self, events: Sequence[Event]) -> None:
        told: dict[Stream, list[Told]] = {}
        ended = 0
        for event in events:
            stream, number = self._streams[event.id]
            told.setdefault(stream, []).append((number, event))
            if event.usage is not None:
                del self._streams[event.id]
                ended += 1
        self._loop.call_soon_threadsafe(self._deliver, list(told.items()), ended, self.engine.stats())

    # On the event loop again.

    def _count(self, change: int) -> None:
        self.open += change

    def _deliver(self, told: list[tuple[Stream, list[Told]]], ended: int, stats: dict[str, int]) -> None:
        self.stats = stats
        self.open -= ended
        for stream, events in told:
            stream.hear(events)


def _fulfil(answer: Future[T], task: Callable[[], T]) -> None:
    """The task's result, or what it raised, is the answer."""
    try:
        answer.set_result(task())
    except Exception as error:
        answer.set_exception(error)
