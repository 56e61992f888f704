"""The bench tells the truth about a job that fits, one that cannot, and one that holds more than it may."""

import random
import subprocess
import sys

import pytest

from bench import budget
from satchel.core.job import TuneJob

HOLD = "import time; held = bytearray(400 << 20); held[::4096] = b'x' * len(held[::4096]); time.sleep(60)"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    budget.toy(folder / "small", *budget.SHAPES["small"])
    budget.write_text(folder)
    return folder


@pytest.fixture
def job(work):
    return TuneJob(
        model=str(work / "small"), data=str(work / "text.jsonl"), out=str(work / "out"), device="cpu", merge=True,
        steps=2, context=64, batch=2, eval_share=0.1, memory="2GiB",
    )  # fmt: skip


def test_a_process_that_holds_more_than_its_limit_is_ended():
    child = subprocess.Popen([sys.executable, "-c", HOLD])
    assert "bytes of" in budget.watch(child, 200 << 20)
    assert child.wait() < 0


def test_the_same_seed_draws_the_same_jobs(work, monkeypatch):
    monkeypatch.setattr(budget, "SHAPES", {"small": budget.SHAPES["small"]})
    first, second = (budget.draw(work, random.Random(3), 0, 1 << 28) for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_a_job_that_fits_finishes_and_one_that_cannot_is_refused_rightly(job):
    fitting = budget.judge(job, 1 << 28)
    assert (fitting["verdict"], fitting["outputs"]) == ("finished", ["adapter", "checkpoint", "model"])
    assert 0 < fitting["share"] < 1
    assert budget.judge(job.replace(memory="300MiB"), 1 << 29)["verdict"] == "refused rightly"


@pytest.mark.parametrize(
    ("outcome", "error", "verdict"),
    [
        ("finished", "", "refused wrongly"),
        ("killed", "held 9 bytes of 8", "refused rightly"),
        ("killed", "exit code -9", "refused rightly"),
        ("killed", "no end within 1800 s", "refused, unknown"),
        ("failed", "JobError: out of memory of 1 MiB with one row at a time", "refused rightly"),
        ("failed", f"OutOfMemoryError: {budget.OVER_BUDGET}: 9 bytes more", "refused rightly"),
        ("failed", "ValueError: anything else", "refused, unknown"),
    ],
)
def test_a_refusal_is_right_if_memory_stops_the_run_that_insists(job, monkeypatch, outcome, error, verdict):
    def attempt(job, limit_bytes, *options):
        return {"outcome": outcome, "error": error} if options else {"outcome": "refused", "predicted_bytes": 3 << 30}

    monkeypatch.setattr(budget, "attempt", attempt)
    line = budget.judge(job, 1 << 28)
    assert (line["verdict"], line["share"]) == (verdict, 1.5)


def test_the_table_counts_every_job_once():
    lines = [{"verdict": "finished", "share": 0.9}, {"verdict": "killed"}, {"verdict": "refused rightly", "share": 1.1}]
    table = {row["what"]: row["value"] for row in budget.summary(lines)}
    assert (table["jobs"], table["accepted"], table["refused"], table["killed"]) == (3, 2, 1, 1)
    assert table["highest peak / budget of an accepted job"] == 0.9
