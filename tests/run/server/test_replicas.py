"""Two engines behind one address: a beginning or an adapter goes where it is known."""

import json
import re
import signal
import subprocess
import sys
import time

import httpx
import pytest

from bench._adapter_files import adapters
from bench._storm_model import tiny
from satchel.core.errors import UserError
from satchel.core.serve import ServeJob
from satchel.run.server.replicas import name_of, share

LONG = "A beginning that is longer than what tells replicas apart. " * 6


def test_equal_models_and_beginnings_have_one_name_and_others_another():
    body = {"model": "a", "prompt": LONG + "x"}
    named = [name_of(json.dumps(one).encode()) for one in (body, body | {"prompt": LONG + "y"}, body | {"model": "b"})]
    assert named[0] == named[1] != named[2]
    assert name_of(json.dumps(body | {"prompt": "z" + LONG}).encode()) != named[0]
    assert name_of(b"{") == name_of(b"[1]") == ""
    assert name_of(b'{"messages": [{"role": "user", "content": "hi"}]}') != ""


def test_the_memory_is_divided_and_has_to_be_named():
    assert share(ServeJob(model="x", memory="4GiB"), 2).memory == f"{2 << 30}B"
    with pytest.raises(UserError, match="give --memory"):
        share(ServeJob(model="x"), 2)


@pytest.mark.slow
def test_two_replicas_share_the_work_and_each_keeps_what_it_knows(tmp_path):
    pytest.importorskip("ray")
    model, home = tiny(tmp_path / "tiny"), tmp_path / "adapters"
    adapters(home, str(model), (2, 4))
    command = [sys.executable, "-m", "satchel", "serve", "--model", str(model), "--memory", "2GiB", "--replicas", "2"]
    command += ["--context", "512", "--batch", "4", "--step-tokens", "64", "--adapters", str(home), "--port", "0"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    said = next((line for line in process.stdout if "are served at" in line), "")
    assert said, (tmp_path / "log").read_text()
    url = re.search(r"http://\S+", said)[0]
    try:
        with httpx.Client(base_url=url, timeout=120) as client:
            where = {name: ask(client, name) for name in [f"{i} {LONG}" for i in range(8)]}
            assert len(set(where.values())) == 2, "both work"
            for _ in range(2):
                again = {name: ask(client, name) for name in where}
                assert again == where, "a beginning goes where it is known"
            assert len({ask(client, f"{i}", model="adapter1") for i in [0] * 4}) == 1
            with client.stream("POST", "/v1/completions", json=asked("hello", stream=True)) as stream:
                text = stream.read().decode()
            assert text.endswith("data: [DONE]\n\n") and '"finish_reason": "length"' in text
            assert client.post("/v1/completions", content=b"{").status_code == 400
            assert client.post("/v1/completions", json=asked("x", model="nobody")).status_code == 404
            assert client.post("/v1/load_lora_adapter", json={}).status_code == 400
            assert client.get("/health").status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def asked(prompt, **more):
    return {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True} | more


def ask(client, prompt, **more):
    answer = client.post("/v1/completions", json=asked(prompt, **more))
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4, answer.text
    time.sleep(0.2)  # the router hears of what a replica knows a little later
    return answer.headers["x-replica"]
