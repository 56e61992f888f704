"""`satchel pretrain`: plain text in a mixture, from random weights or on from a model, inside the budget."""

from satchel.cli.options import takes_job
from satchel.cli.progress import progress
from satchel.core.job import PretrainJob


@takes_job
def pretrain(job: PretrainJob) -> None:
    """Train a model on text, from scratch or on from where it is; leaves the model and a receipt in the output."""
    from satchel.run.pretrain import pretrain as run_pretrain

    with progress() as report:
        run_pretrain(job, report)
