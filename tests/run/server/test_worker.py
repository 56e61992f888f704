"""Requests go through the thread and come back, once each, whatever happens on the way."""

import asyncio

import pytest

from satchel.core.errors import SatchelError, UserError
from satchel.core.request import Request
from tests.run.server.toy import toy_house

HELLO = Request(prompt=(5, 6, 7), max_tokens=10)


def on(worker_test, **house):
    """Runs a coroutine with the worker of a fresh house; at the end nothing is open and the books are in order."""

    async def run():
        worker = toy_house(**house).worker
        try:
            await worker_test(worker)
            if worker.alive:
                while not worker.idle:
                    await asyncio.sleep(0.01)
                await worker.ask(worker.engine.check_integrity)
                assert worker.engine.idle
        finally:
            await worker.stop()

    asyncio.run(run())


async def tokens_of(stream):
    said = {}
    async for told in stream.batches():
        for number, event in told:
            said.setdefault(number, []).extend(event.tokens)
    return said


def test_an_answer_is_the_engines():
    async def test(worker):
        together = await tokens_of(await worker.submit([HELLO, HELLO]))
        alone = await tokens_of(await worker.submit([HELLO]))
        assert together == {0: alone[0], 1: alone[0]} and len(alone[0]) == 10

    on(test)


def test_of_a_group_all_are_taken_or_none():
    async def test(worker):
        with pytest.raises(UserError, match="takes 256 together"):
            await worker.submit([HELLO, Request(prompt=(5,) * 300)])
        assert worker.idle and worker.engine.idle

    on(test)


def test_a_stream_that_is_closed_frees_its_blocks():
    async def test(worker):
        stream = await worker.submit([Request(prompt=(5,) * 40, max_tokens=200)])
        async for _ in stream.batches():
            break
        stream.close()
        stream.close()
        while not worker.idle:
            await asyncio.sleep(0.01)
        assert worker.stats["blocks_held"] == 0 and worker.stats["answered"] < 200

    on(test)


def test_a_submission_that_is_given_up_is_cancelled():
    async def test(worker):
        tasks = [asyncio.create_task(worker.submit([Request(prompt=(5,), max_tokens=200)])) for _ in range(5)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    on(test)


def test_a_step_that_fails_ends_what_was_open_and_nothing_else():
    async def test(worker):
        step, failing = worker.engine.step, [True]

        def fail():
            if failing:
                failing.clear()
                raise RuntimeError("no memory")
            return step()

        worker.engine.step = fail
        stream = await worker.submit([HELLO])
        events = [event async for told in stream.batches() for _, event in told]
        assert [event.finish for event in events] == ["error"] and "no memory" in events[0].error
        assert len((await tokens_of(await worker.submit([HELLO])))[0]) == 10

    on(test)


def test_an_engine_whose_books_are_wrong_stops_and_says_so():
    async def test(worker):
        def fail():
            raise RuntimeError("no memory")

        def wrong():
            raise SatchelError("block 3 is lost")

        worker.engine.step, worker.engine.check_integrity = fail, wrong
        stream = await worker.submit([HELLO])
        assert [event.finish async for told in stream.batches() for _, event in told] == ["error"]
        while worker.alive:
            await asyncio.sleep(0.01)
        with pytest.raises(SatchelError, match="block 3 is lost"):
            await worker.submit([HELLO])
        assert worker.idle

    on(test)


def test_stopping_ends_what_is_open():
    async def run():
        worker = toy_house().worker
        stream = await worker.submit([Request(prompt=(5,), max_tokens=200)])
        await worker.stop()
        finishes = [event.finish async for told in stream.batches() for _, event in told if event.finish]
        assert finishes in (["cancelled"], ["length"], ["stop"])

    asyncio.run(run())
