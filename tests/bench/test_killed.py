"""The bench of killed runs sees a checkpoint that is not whole, and a run that ends otherwise."""

import json
import subprocess
import sys

import pytest

from bench import killed
from bench._harness import ROOT
from bench._toy import toy
from satchel.core.job import TuneJob

DAMAGED = """
import json, sys
from bench import _killed_run
_killed_run.damage = lambda folder: "a hash is wrong"
print(json.dumps(_killed_run.main(**json.loads(sys.argv[1]))))
"""


def test_every_job_is_one_that_can_be_run():
    for name in killed.JOBS:
        assert TuneJob.from_dict(killed.job(name) | {"model": "toy"}).save_every == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-m", "bench._killed_run"], ["-c", DAMAGED]], ids=["whole", "damaged"])
def test_a_run_is_killed_resumed_and_compared(tmp_path, command):
    toy(tmp_path / "model", width=192, layers=2, vocabulary=killed.VOCABULARY)
    argument = {"out": str(tmp_path), "model": str(tmp_path / "model"), "job": killed.job(next(iter(killed.JOBS)))}
    argument |= {"kills": 2, "vocabulary": killed.VOCABULARY, "seed": 0}
    done = subprocess.run([sys.executable, *command, json.dumps(argument)], cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    if "-c" in command:
        assert found["whole"] == 0 and "a hash is wrong" in found["faults"][0]
    else:
        assert found["whole"] == found["kills"] == 2 and found["identical"] == found["runs"] >= 1
