"""Whatever is sent, every request is answered once, and nothing is left behind: short here, long in the slow tier."""

import asyncio
import json
import random

import httpx
import pytest

from satchel.run.server.app import build
from satchel.run.server.house import Terms
from tests.run.server.toy import Running, toy_house

MALFORMED = [b"", b"{", b"[1]", b'{"prompt": 1}', b'{"prompt": "x", "n": 0}', b"\xff\xfe", b'{"promt": "x"}', b"null"]
CLIENTS = 24


def body(rng):
    """A request of any kind that the engine can run."""
    asked = {"prompt": "p" * rng.randint(1, 120), "max_tokens": rng.randint(1, 120), "seed": rng.randrange(99)}
    extras = {
        "n": rng.choice([1, 1, 1, 2, 3]),
        "stream": rng.random() < 0.6,
        "logprobs": rng.choice([None, 0, 3]),
        "echo": rng.random() < 0.2,
        "stop": rng.choice([None, "ab", ["x", "yz"]]),
        "priority": rng.randint(-3, 3),
        "presence_penalty": rng.choice([0, 1.5]),
        "temperature": rng.choice([0, 1.0]),
    }
    deadline = {"deadline_ms": rng.randint(1, 2000)} if rng.random() < 0.1 else {}
    return asked | extras | deadline


async def one(client, rng, seen):
    """One request, perhaps malformed, perhaps given up; how it ended."""
    kind = rng.random()
    if kind < 0.15:
        answer = await client.post("/v1/completions", content=rng.choice(MALFORMED), headers=JSON)
        assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"]
        return seen.append("malformed")
    sent = body(rng)
    if kind < 0.35:
        try:
            async with asyncio.timeout(rng.random() * 0.3):
                await client.post("/v1/completions", json=sent)
        except TimeoutError:
            return seen.append("given up")
        return seen.append("answered")
    answer = await client.post("/v1/completions", json=sent)
    if answer.status_code == 200:
        check(sent, answer)
    else:
        assert answer.status_code in (429, 408), answer.text
        assert answer.status_code == 429 or "deadline_ms" in sent
    seen.append(str(answer.status_code))


JSON = {"content-type": "application/json"}


def check(sent, answer):
    """Every choice is there, and ends once."""
    if not sent["stream"]:
        choices = answer.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(sent["n"]))
        assert all(choice["finish_reason"] for choice in choices)
        return
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    ends = [choice["index"] for choice in choices if choice["finish_reason"]]
    assert sorted(ends) == list(range(sent["n"]))


async def storm(client, count, seed):
    """So many requests from many clients at once."""
    seen, left = [], list(range(count))

    async def work():
        while left:
            await one(client, random.Random(seed * 10**6 + left.pop()), seen)

    await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return seen


SMALL = {"blocks": 24, "batch": 8, "step_tokens": 32, "context": 256}  # forces preemption


def test_a_storm_through_the_application_leaves_nothing_behind():
    async def run():
        house = toy_house(terms=Terms(queue=20), **SMALL)
        transport = httpx.ASGITransport(build(house), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://toy", timeout=60) as client:
            seen = await storm(client, 120, 1)
        while not house.worker.idle:
            await asyncio.sleep(0.01)
        await house.worker.ask(house.worker.engine.check_integrity)
        stats = house.worker.stats
        await house.worker.stop()
        return seen, stats

    seen, stats = asyncio.run(run())
    assert len(seen) == 120 and {"200", "malformed"} <= set(seen)
    assert stats["preemptions"] > 0 and stats["running"] == stats["waiting"] == stats["blocks_held"] == 0


@pytest.mark.slow
def test_a_long_storm_through_sockets_leaves_nothing_behind():
    async def run(url):
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            return await storm(client, 3000, 2)

    with Running(terms=Terms(queue=20), **SMALL) as server:
        seen = asyncio.run(run(server.url))
        metrics = httpx.get(f"{server.url}/metrics").text
    assert len(seen) == 3000 and {"200", "malformed", "given up", "429"} <= set(seen)
    assert 'vllm:num_requests_running{model_name="toy"} 0.0' in metrics
