"""The picture of a run: loss and memory over its steps, from the lines of `metrics.jsonl`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from satchel.core.disk import writing
from satchel.run.metrics import Metrics

GIB = 1 << 30


def plot(lines: list[Metrics], path: Path, budget_bytes: int | None = None) -> bool:
    """Draw the metrics into a PNG file. False if matplotlib is not installed or there is nothing to draw.

    Raises NoDisk, leaving the file as it was, if it cannot be written.
    """
    steps = [line for line in lines if "loss" in line]
    if not steps or find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot([m["step"] for m in steps], [m["loss"] for m in steps], linewidth=1, label="training")
    held_out = [(m["step"], m["held_out_loss"]) for m in lines if "held_out_loss" in m]
    if held_out:
        above.plot(*zip(*held_out, strict=True), marker="o", label="held out")
    above.set_ylabel("loss, nats a token")
    above.legend()
    below.plot([m["step"] for m in steps], [m.get("memory_bytes", 0) / GIB for m in steps], linewidth=1, label="memory")
    if budget_bytes:
        below.axhline(budget_bytes / GIB, color="red", linestyle="--", label="budget")
    below.set_ylim(bottom=0)
    below.set_xlabel("step")
    below.set_ylabel("GiB")
    below.legend()
    draft = path.with_name(f".{path.name}.part")
    try:
        with writing(path.parent):
            figure.savefig(draft, dpi=110, format="png")
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return True
