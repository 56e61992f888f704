"""What a run measures, one JSON object a line in `out/metrics.jsonl`, each on the disk before the next step begins.

A line of a step has `step` (finished steps, from 1), `loss`, `grad_norm` (unless the optimizer never has the whole
gradient), `lr`, `tokens` (fed so far), `seconds` (since the run began, those before a resume included),
`tokens_per_second`, `micro_batch`, `memory_bytes` and the objective's own means; a line of an evaluation has `step` and
`held_out_loss`. TensorBoard gets the same where it is installed.
"""

from __future__ import annotations

import contextlib
import json
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from satchel.core.disk import writing
from satchel.model.disk import replace_text

Metrics = dict[str, float]

FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a metrics file, in order. A last line that a killed run left incomplete is dropped."""
    lines = path.read_text().split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]


class MetricsLog:
    """The metrics files of one run. A context manager: it closes them. Every method raises NoDisk on a full disk."""

    def __init__(self, out: Path, step: int = 0) -> None:
        """Goes on after `step` finished steps: lines of later ones, which a killed run left, are dropped."""
        self._out, path = out, out / FILE
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        with writing(out):
            replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = path.open("a", buffering=1, encoding="utf-8")
            self._board = _board(out / "tensorboard", step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # What could not be written stays in the buffers and fails once more: after an error that has been told.
        with contextlib.suppress(OSError) if error else writing(self._out):
            self._file.close()
        with contextlib.suppress(OSError) if error else writing(self._out):
            if self._board:
                self._board.close()

    def write(self, metrics: Metrics) -> None:
        """Append one line."""
        with writing(self._out):
            self._file.write(json.dumps(metrics) + "\n")
            if self._board:
                for name in metrics.keys() - {"step"}:
                    self._board.add_scalar(name, metrics[name], int(metrics["step"]))


def _board(folder: Path, step: int) -> Any:
    """A TensorBoard writer, if tensorboard is installed; it hides what an earlier run wrote behind `step`."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
