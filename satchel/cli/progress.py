"""How a running job is shown: a live bar in a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from satchel.cli.console import out
from satchel.cli.plan import WAITING, Waiting, print_plan
from satchel.cli.receipt import print_receipt
from satchel.core.report import Report
from satchel.core.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from satchel.run.planner import Plan
    from satchel.run.rung import Rung


class _Talking(Report):
    """What both reports share: the plan before, the receipt after, notes between."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.limit_bytes: int | None = None

    def __enter__(self) -> _Talking:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def plan(self, plan: Plan) -> None:
        self.limit_bytes = plan.budget_bytes
        print_plan(plan)

    def note(self, text: str) -> None:
        self.console.print(Text(text, "dim"))

    def end(self, receipt: Any) -> None:
        print_receipt(receipt)

    def evaluated(self, metrics: dict[str, float]) -> None:
        """The line of an evaluation."""
        parts = {name.partition("/")[2]: loss for name, loss in metrics.items() if name.startswith("held_out_loss/")}
        each = f" ({', '.join(f'{name} {loss:.3f}' for name, loss in parts.items())})" if parts else ""
        self.note(f"step {metrics['step']:g}: held-out loss {metrics['held_out_loss']:.3f}{each}")

    def memory(self, metrics: dict[str, float]) -> str:
        """`612 MiB of 900 MiB`, or an empty text before the first measurement."""
        if "memory_bytes" not in metrics:
            return ""
        used = format_bytes(metrics["memory_bytes"])
        return f"{used} of {format_bytes(self.limit_bytes)}" if self.limit_bytes else used


class RichProgress(_Talking):
    """A bar with loss, tokens per second, time left, and memory against the budget."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"),
            console=console,
        )
        self.waiting = console.status(WAITING)
        self.planning = Waiting(self.waiting)

    def __enter__(self) -> RichProgress:
        self.waiting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.waiting.stop()
        self.bar.stop()

    def rung(self, rung: Rung) -> None:
        self.planning.rung(rung)

    def plan(self, plan: Plan) -> None:
        self.waiting.stop()
        super().plan(plan)

    def begin(self, total_steps: int) -> None:
        self.task = self.bar.add_task("train", total=total_steps, loss="-", rate="-", memory="")
        self.bar.start()

    def step(self, metrics: dict[str, float]) -> None:
        if "loss" not in metrics:
            return self.evaluated(metrics)
        self.bar.update(
            self.task,
            completed=metrics["step"],
            loss=f"{metrics['loss']:.3f}",
            rate=f"{metrics['tokens_per_second']:,.0f}",
            memory=self.memory(metrics),
        )

    def end(self, receipt: Any) -> None:
        self.bar.stop()
        super().end(receipt)


class PlainProgress(_Talking):
    """A line for the first step, the last, and at most one every `every_s` seconds between."""

    def __init__(self, console: Console, every_s: float = 5.0) -> None:
        super().__init__(console)
        self.every_s = every_s

    def __enter__(self) -> PlainProgress:
        self.note(WAITING)
        return self

    def begin(self, total_steps: int) -> None:
        self.total, self.first, self.last_s = total_steps, None, float("-inf")

    def step(self, metrics: dict[str, float]) -> None:
        if "loss" not in metrics:
            return self.evaluated(metrics)
        now = time.monotonic()
        step = int(metrics["step"])
        self.first = self.first or (step, now)
        if step < self.total and now - self.last_s < self.every_s:
            return
        self.last_s = now
        facts = [
            f"step {step}/{self.total}",
            f"loss {metrics['loss']:.3f}",
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
            self._left(step, now, *self.first),
            self.memory(metrics),
        ]
        self.console.print(Text("  ".join(filter(None, facts))))

    def _left(self, step: int, now: float, first_step: int, first_s: float) -> str:
        if step == first_step or step >= self.total:
            return ""
        return format_seconds((now - first_s) / (step - first_step) * (self.total - step)) + " left"


def progress() -> RichProgress | PlainProgress:
    """What suits where stdout goes; a context manager."""
    return RichProgress(out) if sys.stdout.isatty() else PlainProgress(out)
