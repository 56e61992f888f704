"""The stability gap: how far a loss rises when the data change, when it is back, and what lies between.

    depth      = max(0, highest loss - first loss)
    recovered  = first evaluation behind the highest at which the loss is no more than the first
    area       = integral over steps of max(0, loss - first loss), by trapezoids

Paper: https://arxiv.org/abs/2406.14833
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Gap:
    """One loss over a run."""

    depth: float  # nats a token
    peak_step: int  # where it is highest
    recovered_step: int | None  # None: not within the run
    area: float  # nats a token times steps
    final: float  # last loss minus the first


def gap(points: Sequence[tuple[int, float]]) -> Gap:
    """The gap in (step, loss) of a run's evaluations, in order; the first is before the first step."""
    first = points[0][1]
    peak_step, highest = max(points, key=lambda point: point[1])
    back = (step for step, loss in points if step > peak_step and loss <= first)
    above = [(step, max(0.0, loss - first)) for step, loss in points]
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(above))
    recovered = peak_step if highest <= first else next(back, None)
    return Gap(max(0.0, highest - first), peak_step, recovered, area, points[-1][1] - first)


def said(name: str, found: Gap) -> str:
    """A gap in one sentence."""
    until = f"back at step {found.recovered_step}" if found.recovered_step is not None else "not back within the run"
    return (
        f"{name}: the held-out loss rose by {found.depth:.3f} at step {found.peak_step}, {until}; "
        f"area {found.area:.3g} nats x steps"
    )
