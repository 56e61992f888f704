"""The verb refuses what is wrong before it loads anything, and serves a folder's model until it is told to end."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

from satchel.cli.extras import needs
from satchel.cli.main import main
from satchel.core.errors import UserError
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.save import save
from tests.run.server.toy import byte_tokenizer

LLAMA = {"model_type": "llama", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "rms_norm_eps": 1e-5}
LLAMA |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
LLAMA |= {"max_position_embeddings": 256}
ROOT = Path(__file__).parents[2]


def complaint(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--model", "demo", *arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_port_in_use_is_told_at_once(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "give another --port" in complaint(capsys, "--port", str(taken.getsockname()[1]))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--api-keys", "none.toml"], "none.toml: cannot be read"),
        (["--memory", "1"], "no amount of memory"),
        (["--timeout", "10"], "no length of time"),
        (["--max-body", "x"], "no amount of memory"),
        (["--admission", "fcsf"], "did you mean 'fcfs'"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_loaded(capsys, arguments, said):
    assert said in complaint(capsys, *arguments)


def test_a_missing_package_names_the_extra():
    with (
        pytest.raises(UserError, match=r"no_such_package is not installed; pip install 'satchel\[serve\]'"),
        needs("serve"),
    ):
        import no_such_package  # noqa: F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    decoder = Decoder(ModelConfig.from_hf(LLAMA))
    decoder.init_weights(torch.Generator().manual_seed(0))
    save(decoder, path)
    byte_tokenizer().save(path)
    return path


def test_a_folder_is_served_by_its_name_until_sigterm(folder):
    command = [sys.executable, "-m", "satchel", "serve", "--model", str(folder), "--memory", "1GiB", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--dtype", "fp32"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    room, ready = process.stdout.readline(), process.stdout.readline()
    url = ready.partition(" is served at ")[2].partition(";")[0]
    said = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 3}, timeout=60).json()
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert "room for" in room and said["model"] == "tiny" and said["usage"]["completion_tokens"] == 3
    assert process.returncode == 0
    (request,) = [line for line in lines if line["message"] == "request"]
    assert request["status"] == 200 and request["completion_tokens"] == 3 and request["request_id"]
