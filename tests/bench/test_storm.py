"""The storm of bench/storm.py in small: a real process, real sockets, a budget that answers and adapters overflow."""

import asyncio
import random

import pytest

from bench._storm_client import Answer, Storm, Wrong, _checked, _parsed, answered, one
from bench._storm_model import tiny
from bench.storm import Case, storm


def test_a_storm_in_a_tight_budget_leaves_nothing_behind(tmp_path):
    small = {"requests": 90, "pauses": 2, "clients": 24, "queue": 16, "adapters": 8, "spare_blocks": 8}
    found = storm(Case(str(tiny(tmp_path / "tiny")), **small))
    assert sum(found["outcomes"].values()) - found["outcomes"].get("told to come again", 0) == 90
    assert found["preemptions"] > 0 and found["adapter_loads"] > 8
    assert found["peak_bytes"] <= found["budget_bytes"] and found["checks"] >= 2


BODY = {"prompt": "x", "n": 2, "stream": True}
WHOLE = b"".join(b'data: {"choices": [{"index": %d, "finish_reason": "stop"}]}\n\n' % i for i in (1, 0))


@pytest.mark.parametrize(
    "body",
    [
        WHOLE,  # no end
        WHOLE[: len(WHOLE) // 2] + b"data: [DONE]\n\n",  # one answer is lost
        WHOLE + WHOLE + b"data: [DONE]\n\n",  # told twice
        WHOLE + b'data: {"error": {"message": "x"}}\n\ndata: [DONE]\n\n',
    ],
)
def test_the_storm_notices_what_is_wrong_with_a_stream(body):
    assert _checked("/v1/completions", BODY, Answer(200, WHOLE + b"data: [DONE]\n\n")) == "whole"
    with pytest.raises(Wrong):
        _checked("/v1/completions", BODY, Answer(200, body))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 X\r\ncontent-length: 2\r\n\r\nxxHTTP/1.1 200 X\r\ncontent-length: 2\r\n\r\nxx",
        b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n2\r\nxx\r\n",
    ],
)
def test_the_storm_notices_what_is_wrong_with_a_connection(raw):
    assert _parsed(b"HTTP/1.1 200 X\r\ncontent-length: 2\r\n\r\nxx", "/").body == b"xx"
    with pytest.raises(Wrong):
        _parsed(raw, "/")


def test_the_storm_notices_a_server_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("bench._storm_client.STUCK_S", 0.1)

    async def run():
        silent = await asyncio.start_server(lambda reader, writer: asyncio.sleep(60), "127.0.0.1", 0)
        port = silent.sockets[0].getsockname()[1]
        with pytest.raises(Wrong, match="no whole answer"):
            await one(Storm(port, [], 128), random.Random(0), answered)
        silent.close()

    asyncio.run(run())
