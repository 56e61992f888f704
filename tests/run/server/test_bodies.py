"""Bodies count as held while they come and until they are answered, and all together have a limit."""

import asyncio

import pytest

from satchel.run.server.bodies import TOGETHER, Bodies
from satchel.run.server.faults import Fault
from satchel.run.server.house import Terms
from satchel.run.server.sending import ClientGone


def sender(*parts, gone=False):
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.disconnect"} if gone else {"type": "http.request", "body": b"", "more_body": False})
    left = iter(messages)

    async def receive():
        return next(left)

    return receive


def test_a_body_is_given_whole_and_counts_until_it_is_answered():
    async def run():
        bodies = Bodies(Terms(body_bytes=10))
        async with bodies.whole(b"", b"", sender(b"ab", b"cd")) as receive:
            held, message = bodies.held_bytes, await receive()
        return held, message["body"], bodies.held_bytes

    assert asyncio.run(run()) == (4, b"abcd", 0)


def test_all_together_have_a_limit_and_it_comes_free():
    async def run():
        bodies = Bodies(Terms(body_bytes=10))

        async def hold(deeper):
            async with bodies.whole(b"", b"", sender(b"x" * 10)):
                if deeper:
                    await hold(deeper - 1)

        await hold(TOGETHER - 1)
        with pytest.raises(Fault) as refused:
            await hold(TOGETHER)
        return refused.value.status, bodies.held_bytes

    assert asyncio.run(run()) == (429, 0)


@pytest.mark.parametrize(
    "kind, length, receive, error",
    [
        (b"", b"11", sender(), Fault),
        (b"", b"", sender(b"x" * 6, b"x" * 6), Fault),
        (b"application/json", b"", sender(b"\xff"), Fault),
        (b"", b"", sender(b"x", gone=True), ClientGone),
    ],
)
def test_what_is_refused_is_not_held(kind, length, receive, error):
    async def run():
        bodies = Bodies(Terms(body_bytes=10))
        with pytest.raises(error):
            async with bodies.whole(kind, length, receive):
                pass
        return bodies.held_bytes

    assert asyncio.run(run()) == 0
