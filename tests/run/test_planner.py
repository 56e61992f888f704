"""The plan of a real, tiny model: what it refuses, what would do, how long it takes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench._toy import toy
from satchel.core.errors import DoesNotFit
from satchel.core.job import TuneJob
from satchel.core.report import Report
from satchel.core.units import format_bytes
from satchel.run import device
from satchel.run.planner import plan
from satchel.run.rung import Extent

PAGE = Path(__file__).parents[2] / "docs" / "PLAN.md"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    model = str(toy(tmp_path_factory.mktemp("toy") / "model", width=192, layers=1))
    return TuneJob(model=model, data="demo", device="cpu", context=64, batch=2, steps=10, memory="1MiB")


@pytest.fixture(scope="module")
def refused(job):
    return plan(job.replace(adapter="none", activations="full"))


def test_a_refusal_names_the_smallest_budget_of_this_kind_and_apart_from_it_another_kind(refused):
    with pytest.raises(DoesNotFit) as caught:
        refused.require()
    said, smallest = str(caught.value), refused.smallest
    assert smallest.job.adapter == "none" and not smallest.advice and refused.advice.job.adapter == "lora"
    assert f"smallest budget that would do for it is {format_bytes(refused.smallest_bytes)}" in said
    assert f"Another kind of job would need {format_bytes(refused.advice_bytes)}: adapter=lora" in said


def test_the_smallest_budget_fits_when_it_is_typed_as_it_is_printed(refused):
    budget = format_bytes(refused.smallest_bytes)
    again = plan(refused.job.replace(memory=budget), look_for_smallest=False).require()
    assert again.job.adapter == "none" and again.peak_bytes <= refused.smallest_bytes


def test_a_report_is_told_of_every_rung_while_the_plan_is_made(job):
    class Told(Report):
        def rung(self, rung):
            told.append(rung)

    told = []
    made = plan(job.replace(adapter="none", optimizer="lion"), look_for_smallest=False, report=Told())
    assert {rung.changes for rung in made.rungs} <= {rung.changes for rung in told} and len(told) >= len(made.rungs) > 1


def test_what_is_free_now_is_a_budget_and_the_job_as_given_its_only_rung(job):
    made = plan(job.replace(memory="auto"))
    assert made.budget.endswith("(free now)") and len(made.rungs) == 1
    assert made.chosen.changes == () and made.smallest_bytes < made.budget_bytes


def test_the_time_of_a_run_counts_every_evaluation(job, monkeypatch):
    monkeypatch.setattr(device, "gauge", lambda kind: 1.0)  # the machine's speed moves from plan to plan
    seconds = {}
    for every, rows in ((0, 4), (0, 8), (2, 4)):
        changed = job.replace(memory="auto", eval_every=every)
        seconds[every, rows] = plan(changed, extent=Extent((64,), 10, rows), look_for_smallest=False).chosen.seconds
    few, many, often = seconds.values()
    assert few["evaluate"] > 0 and many["evaluate"] == pytest.approx(2 * few["evaluate"])
    assert often["evaluate"] == pytest.approx(3 * few["evaluate"])  # at 0, 2, 4, 6, 8 and 10 instead of 0 and 10
    assert few["train"] > few["evaluate"] and {"load", "save"} < few.keys()


def test_every_key_of_the_json_is_documented(refused):
    shown = json.loads(json.dumps(refused.to_dict()))
    documented = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.M))
    assert documented == shown.keys() | shown["rungs"][0].keys()


NEAR = """
import sys
from satchel.core.job import TuneJob
from satchel.run import planner
from satchel.run.planner import SETTLED, plan
from satchel.run.rung import GROWTH
settled, settle = [], planner.settle  # the jobs for which the process was made to grow
planner.settle = lambda job, *rest: (settled.append(job), settle(job, *rest))
job = TuneJob(model=sys.argv[1], data="demo", device="cpu", context=64, batch=2, steps=10, memory="auto")
"""

FITS = """
as_given = plan(job, look_for_smallest=False).chosen
assert not settled
made = plan(job.replace(memory=f"{as_given.peak_bytes + GROWTH // 2}B"), look_for_smallest=False)
assert settled and made.chosen.peak_bytes <= made.budget_bytes
assert plan(job.replace(memory=f"{as_given.peak_bytes + 2 * GROWTH}B"), look_for_smallest=False).chosen
assert len(settled) == 1
"""

MISSES = """
tight = job.replace(memory="1MiB", activations="full", format="int4", micro_batch=1)
missing = lambda size: plan(tight.replace(memory=f"{plan(tight).smallest.peak_bytes - size}B"))
missing(GROWTH // 2)  # whatever it says, this process has grown then
made = missing(GROWTH // 2)
assert made.chosen and made.chosen == made.smallest, made.smallest.peak_bytes - made.budget_bytes
assert made.budget_bytes - GROWTH < made.chosen.peak_bytes <= made.budget_bytes
assert missing(GROWTH - SETTLED // 2).chosen is None
assert missing(GROWTH + 1).chosen is None
"""


def alone(script, job):
    """In a process of its own, as a command is: one that ran other jobs before grows and shrinks as it likes."""
    command = [sys.executable, "-c", NEAR + script, job.model]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_job_that_fits_by_less_than_a_process_may_grow_is_not_taken_on_a_guess(job):
    alone(FITS, job)


def test_a_job_that_misses_by_less_than_a_process_may_grow_is_priced_anew_once_it_has_grown(job):
    alone(MISSES, job)
