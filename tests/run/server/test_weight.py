"""What open requests may come to is counted before they run, and given back whatever becomes of them."""

import asyncio

import pytest

from satchel.core.errors import UserError
from satchel.core.request import Request
from satchel.core.serve import Terms
from satchel.run.server.faults import Fault
from satchel.run.server.weight import Weight, weight
from tests.run.server.toy import client_of, toy_house

ONE = Request(prompt=(1, 2, 3), max_tokens=10)


def test_more_of_anything_weighs_more():
    heavier = [{"n": 2}, {"best_of": 3}, {"logprobs": 0}, {"prompt": (1,) * 9}]
    assert all(weight(Request(**({"prompt": (1, 2, 3), "max_tokens": 10} | more))) > weight(ONE) for more in heavier)
    assert weight(Request(prompt=(1,), max_tokens=90, n=2)) > weight(Request(prompt=(1,), max_tokens=9, n=2))
    assert weight(Request(prompt=(1,), max_tokens=9, logprobs=20)) > 10 * weight(Request(prompt=(1,), max_tokens=9)) / 3


def test_what_is_too_much_alone_is_refused_and_what_is_too_much_now_may_come_again():
    held = Weight(3 * weight(ONE))
    own = held.take([ONE, ONE])
    with pytest.raises(Fault) as now:
        held.take([ONE, ONE])
    with pytest.raises(Fault, match="keeps .* for all requests") as ever:
        held.take([ONE] * 4)
    assert (now.value.status, ever.value.status, held.held_bytes) == (429, 400, own)
    held.give_back(own)
    assert held.take([ONE] * 3) == 3 * weight(ONE)


def test_nothing_is_held_when_nothing_is_open_whatever_became_of_it():
    async def run():
        house = toy_house(terms=Terms(body_bytes=20_000))
        asked = {"prompt": "hello", "max_tokens": 100, "ignore_eos": True}
        async with client_of(house) as client:
            whole = await client.post("/v1/completions", json=asked)
            streamed = await client.post("/v1/completions", json=asked | {"stream": True})
            unfit = await client.post("/v1/completions", json=asked | {"max_tokens": 5000})
            heavy = await client.post("/v1/completions", json=asked | {"n": 100, "logprobs": 20})
            given_up = asyncio.create_task(client.post("/v1/completions", json=asked))
            while not house.weight.held_bytes:
                await asyncio.sleep(0)
            given_up.cancel()
            await asyncio.wait([given_up])
            while house.weight.held_bytes or not house.worker.idle:
                await asyncio.sleep(0.01)
        return [one.status_code for one in (whole, streamed, unfit, heavy)], heavy.json()["error"]["message"]

    statuses, message = asyncio.run(run())
    assert statuses == [200, 200, 400, 400] and "lower max_tokens, n or logprobs" in message


def test_a_text_that_is_too_long_whatever_its_tokens_are_is_never_tokenized(monkeypatch):
    async def run():
        house = toy_house()
        try:
            monkeypatch.setattr(type(house.tokenizer), "encode", None)
            with pytest.raises(UserError, match=r"tokens of prompt at least; this engine takes 256 together"):
                await house.encode("x" * 1_000_000, special=True)
        finally:
            await house.worker.stop()

    asyncio.run(run())
