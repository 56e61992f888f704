"""A server from Python: the same job as on the command line, in a thread, and gone when the block ends."""

import subprocess
import sys
from pathlib import Path

import pytest

import satchel
from bench._storm_model import tiny
from satchel.core.errors import UserError
from satchel.run.server.listen import bind

SCRIPT = """
import json, sys, urllib.request, urllib.error
import satchel
from satchel.run.server import start

opened, real = [], start.open_house
start.open_house = lambda service, terms: opened.append(service) or real(service, terms)
with satchel.Serving(satchel.ServeJob(model=sys.argv[1], memory="1GiB", context=128, batch=4, step_tokens=64)) as url:
    body = json.dumps({"prompt": "hello", "max_tokens": 5, "ignore_eos": True}).encode()
    asked = urllib.request.Request(url + "/v1/completions", body, {"content-type": "application/json"})
    print(json.load(urllib.request.urlopen(asked))["usage"]["completion_tokens"])
    print("_tokens" in vars(opened[0].beside))
try:
    urllib.request.urlopen(url + "/health")
except urllib.error.URLError:
    print("gone")
"""


def test_a_server_lives_as_long_as_its_block(tmp_path):
    """In a process of its own, since it takes over torch's allocator. The table for schemas is there from the start."""
    command = [sys.executable, "-c", SCRIPT, str(tiny(tmp_path / "tiny"))]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["5", "True", "gone"], done.stderr


def test_what_is_wrong_is_raised_where_the_block_begins():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        serving = satchel.Serving(satchel.ServeJob(model="demo"), port=taken.getsockname()[1])
        with pytest.raises(UserError, match="cannot be listened on"), serving:
            pass
