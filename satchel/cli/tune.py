"""`satchel tune`: plan, train inside the budget, save, and hand back the receipt."""

from satchel.cli.options import takes_job
from satchel.cli.progress import progress
from satchel.core.job import TuneJob


@takes_job
def tune(job: TuneJob) -> None:
    """Tune a model on data, inside the budget; leaves an adapter or a model and a receipt in the output folder."""
    from satchel.run.tune import tune as run_tune

    with progress() as report:
        run_tune(job, report)
