"""A real server on a free port: the official client, clients that go away or stop reading, overload, a good end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from satchel.core.errors import UserError
from satchel.run.server.house import Terms
from satchel.run.server.keys import Keys
from satchel.run.server.listen import bind
from tests.run.server.toy import Running

ROOT = Path(__file__).parents[3]
LONG = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def server():
    with Running() as running:
        yield running


def until(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def connected(running, receive_buffer=0):
    raw = socket.socket()
    if receive_buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
    return raw


def posted(body):
    sent = json.dumps(body).encode()
    lines = [
        "POST /v1/completions HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(sent)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + sent


def test_the_official_client_chats_completes_streams_and_understands_errors(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    asked = {"model": "toy", "messages": [{"role": "user", "content": "hello"}], "max_completion_tokens": 6, "seed": 3}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=1)
    parts = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    said = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert said == whole.choices[0].message.content and parts[-1].usage.completion_tokens == 6
    assert [model.id for model in client.models.list()] == ["toy"]
    text = client.completions.create(model="toy", prompt="hello", max_tokens=4, logprobs=1, extra_body={"priority": 2})
    assert len(text.choices[0].logprobs.tokens) == 4
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("tyo")
    assert missing.value.code == "model_not_found" and missing.value.request_id
    with pytest.raises(openai.BadRequestError, match="takes 256 together") as long:
        client.completions.create(model="toy", prompt="x" * 400)
    assert long.value.code == "context_length_exceeded"
    parsed = client.chat.completions.create(
        **(asked | {"max_completion_tokens": 60}),
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["ab", "cd"]}}},
    )
    assert json.loads(parsed.choices[0].message.content) in ("ab", "cd")


def test_an_id_is_kept_or_given(server):
    given = httpx.get(f"{server.url}/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"]
    made = httpx.get(f"{server.url}/v1/models", headers={"x-request-id": "no good"}).headers["x-request-id"]
    assert given == "mine-1" and len(made) == 32


@pytest.mark.parametrize("body", [LONG, LONG | {"stream": False}, LONG | {"prompt": ["a", "b"], "n": 2}])
def test_a_client_that_goes_away_frees_the_engine(server, body):
    answers = body.get("n", 1) * (len(body["prompt"]) if isinstance(body["prompt"], list) else 1)
    said = server.house.worker.stats["answered"]
    with server.slowed():
        with connected(server) as raw:
            raw.sendall(posted(body))
            until(lambda: server.house.worker.stats["answered"] > said)
        until(lambda: server.house.worker.idle)
    assert server.house.worker.stats["blocks_held"] == 0
    assert server.house.worker.stats["answered"] - said < 200 * answers


def test_a_client_that_does_not_read_is_left_after_a_while():
    with (
        Running(terms=Terms(read_s=0.3), send_buffer=4096) as running,
        connected(running, receive_buffer=4096) as raw,
        running.slowed(),
    ):
        raw.sendall(posted(LONG | {"n": 8, "logprobs": 20, "max_tokens": 250, "prompt": "h"}))
        until(lambda: running.house.worker.open == 1)
        until(lambda: running.house.worker.idle)
        assert running.house.worker.stats["answered"] < 8 * 250


def test_a_body_that_does_not_arrive_is_given_up():
    with Running(terms=Terms(read_s=0.2)) as running, connected(running) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = b"".join(iter(lambda: raw.recv(4096), b""))
    assert b" 408 " in answer and b"did not arrive in time" in answer


@pytest.mark.parametrize("keys", [None, Keys({"x": None})])
def test_who_still_sends_a_body_that_is_not_wanted_hears_why(keys):
    with Running(keys, terms=Terms(body_bytes=1000)) as running, connected(running) as raw:
        body = b"x" * 5_000_000
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(
            body
        )
        raw.sendall(head + body)
        time.sleep(0.2)  # the answer is read late
        answer = b"".join(iter(lambda: raw.recv(4096), b""))
    assert (b" 401 " if keys else b" 413 ") in answer[:20] and answer.endswith(b"}")


def test_too_many_requests_are_told_when_to_come_again():
    with Running(terms=Terms(queue=2), batch=1) as running:
        threads = [threading.Thread(target=_read_all, args=(running.url,)) for _ in range(2)]
        with running.held():
            for thread in threads:
                thread.start()
            until(lambda: running.house.worker.open == 2)
            refused = httpx.post(f"{running.url}/v1/completions", json=LONG)
        for thread in threads:
            thread.join()
        accepted = httpx.post(f"{running.url}/v1/completions", json=LONG | {"max_tokens": 2})
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert "takes 2 at once" in refused.json()["error"]["message"] and accepted.status_code == 200


def _read_all(url):
    return httpx.post(f"{url}/v1/completions", json=LONG, timeout=60).text


def test_at_the_end_what_runs_is_finished_and_what_comes_is_refused():
    with Running() as running, httpx.Client(base_url=running.url, timeout=60) as client:
        client.get("/ready")
        texts = []
        thread = threading.Thread(target=lambda: texts.append(_read_all(running.url)))
        with running.held():
            thread.start()
            until(lambda: running.house.worker.open == 1)
            running.server.leave()
            until(lambda: running.house.draining)
            refused = client.post("/v1/completions", json=LONG)
            ready, health = client.get("/ready"), client.get("/health")
        thread.join()
    assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
    assert ready.status_code == 503 and health.status_code == 200
    assert texts[0].endswith("data: [DONE]\n\n") and '"finish_reason": "length"' in texts[0]


def test_what_is_not_finished_in_time_is_told_so():
    with Running(terms=Terms(drain_s=0.1)) as running:
        texts = []
        thread = threading.Thread(target=lambda: texts.append(_read_all(running.url)))
        with running.held():
            thread.start()
            until(lambda: running.house.worker.open == 1)
            running.server.leave()
            until(lambda: not running.house.worker._tasks.empty())  # it was told to stop
        thread.join()
    assert texts[0].endswith("data: [DONE]\n\n") and "ended this answer; ask again" in texts[0]


def test_a_port_in_use_is_told_before_anything_is_loaded():
    with bind("127.0.0.1", 0) as taken, pytest.raises(UserError, match="give another --port"):
        taken.listen()
        bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="cannot be listened on"):
        bind("127.0.0.1", 70000)


def test_sigterm_ends_the_process_in_good_order():
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.run.server.toy"], cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    url = process.stdout.readline().strip()
    texts = []
    thread = threading.Thread(target=lambda: texts.append(_read_all(url)))
    thread.start()
    until(lambda: httpx.get(f"{url}/stats").json()["open"] == 1)
    process.send_signal(signal.SIGTERM)
    thread.join()
    assert process.wait(20) == 0
    assert texts[0].endswith("data: [DONE]\n\n") and '"finish_reason": "length"' in texts[0]
