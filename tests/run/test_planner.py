"""The ladder tries what might help, and only what the model admits."""

from bench._toy import toy
from satchel.core.job import TuneJob
from satchel.run.planner import plan


def test_a_method_that_suits_no_matrix_of_the_job_is_no_rung(tmp_path):
    model = str(toy(tmp_path / "model", width=192, layers=1))
    refused = plan(TuneJob(model=model, data="demo", device="cpu", context=64, batch=2, memory="1MiB"))
    changes = {change for rung in refused.rungs for change in rung.changes}
    assert refused.chosen is None
    assert "optimizer=adamw8bit" in changes
    assert not any("galore" in change for change in changes)  # its rank is above that of the adapter
