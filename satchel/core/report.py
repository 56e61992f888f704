"""Where a running job says what it does: the command line draws it, a library call keeps silent."""

from typing import Any


class Report:
    """Called by the loops as the job proceeds. This one says nothing; subclasses override what they show."""

    def rung(self, rung: Any) -> None:
        """One way to run the job was rehearsed, while the plan is being made."""

    def plan(self, plan: Any) -> None:
        """The ladder was climbed; `plan.chosen` is about to run."""

    def begin(self, total_steps: int) -> None:
        """The loop starts; also after a resume, whose `step` metrics then start past 0."""

    def step(self, metrics: dict[str, float]) -> None:
        """`step` is over: `loss`, `tokens_per_second`, `memory_bytes`, more; or only `held_out_loss`."""

    def note(self, text: str) -> None:
        """Something that the user should know: what the governor did, a checkpoint, records that were cut."""

    def end(self, receipt: Any) -> None:
        """The job is over and its output is on disk."""


SILENT = Report()
