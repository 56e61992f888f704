"""Run as `python -m tests.run.killed FOLDER JOBS-JSON`: train each job undisturbed, then killed again and again.

Prints one JSON object by job: the hashes of both final checkpoints, the steps at which kill -9 struck, both runs'
losses. Children are forked before any thread has started, so that torch is imported only once.
"""

import contextlib
import hashlib
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from satchel.core.job import PretrainJob
from satchel.run import trainer
from satchel.run.assemble import assemble
from satchel.run.data import read_dataset
from satchel.run.folder import CLAIM
from satchel.run.metrics import read_metrics
from satchel.run.sources import read_sources
from satchel.run.trainer import train
from tests.run.toys import CharTokenizer, toy_decoder, toy_job, toy_pretraining

SLOW_IMPORTS = ("torch._dynamo", "torch.utils.tensorboard", "matplotlib.figure")  # done once, before the forks


def run(job):
    """Train in a child process; its process id."""
    if child := os.fork():
        return child
    try:
        torch.set_num_threads(1)
        trainer.plot = lambda *_: False  # half a second each
        decoder = toy_decoder(torch.bfloat16 if job.dtype == "bf16" else torch.float32)
        read = read_sources if isinstance(job, PretrainJob) else read_dataset
        train(job, assemble(job, decoder), read(job, CharTokenizer()))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def outcome(out):
    """Hashes of the last checkpoint's tensors, and the loss of every step."""
    folder = out / "checkpoints" / (out / "checkpoints/latest").read_text()
    files = ("parameters", "optimizer")
    hashes = {file: hashlib.sha256((folder / f"{file}.safetensors").read_bytes()).hexdigest() for file in files}
    return hashes | {"losses": [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]}


def compare(folder, seed, changes):
    """One job undisturbed and killed at up to three steps."""
    folder.mkdir()
    make = toy_pretraining if changes.pop("pretrain", False) else toy_job
    job = make(folder, **changes)
    assert os.waitpid(run(job), 0)[1] == 0
    chance, killed = random.Random(seed), []
    again = job.replace(out=str(folder / "killed"))
    out = Path(again.out)
    finished = False
    while not finished:
        child = run(again.replace(resume=(out / CLAIM).exists()))
        wanted = lines(out) + chance.randint(1, 4) if len(killed) < 3 else 10**9
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and lines(out) < wanted:
            time.sleep(0.001)
        if ended[0]:
            assert ended[1] == 0, "a resumed run failed"
            finished = True
        else:
            time.sleep(chance.random() * 0.03)  # anywhere in the step, or in its checkpoint
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed.append(lines(out))
    return {"whole": outcome(Path(job.out)), "resumed": outcome(out), "killed": killed}


def lines(out):
    """Lines of metrics so far."""
    return len(read_metrics(out / "metrics.jsonl"))


def main(folder, jobs):
    """All jobs; see the file's docstring."""
    for name in SLOW_IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    told = {name: compare(folder / str(i), i, changes) for i, (name, changes) in enumerate(jobs.items())}
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
