"""What a job was predicted to take, beside what it took. Kept with the output as receipt.json."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from satchel.core.disk import writing
from satchel.model.disk import replace_text


@dataclass(frozen=True)
class Line:
    """One quantity, predicted and measured, in its unit."""

    name: str
    unit: str  # 'bytes' or 'seconds'
    predicted: float
    measured: float | None  # None: nothing measures it here

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured."""
        return (self.predicted - self.measured) / self.measured if self.measured else None


@dataclass(frozen=True)
class Receipt:
    """The end of a job."""

    job: dict[str, Any]
    device: str
    budget_bytes: int | None
    lines: tuple[Line, ...]  # memory by account, peaks, time
    losses: dict[str, float]  # held-out loss before and after, training loss at the end
    tokens: int
    seconds: float  # of the training loop
    outputs: dict[str, str] = field(default_factory=dict)  # what was written, by kind
    notes: tuple[str, ...] = ()  # what the governor did and what else the user should know

    def line(self, name: str) -> Line:
        """The line of that name."""
        return next(line for line in self.lines if line.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def write(self, folder: Path) -> Path:
        """Write receipt.json into `folder`, whole or not at all. Raises NoDisk."""
        path = folder / "receipt.json"
        with writing(folder):
            replace_text(path, json.dumps(self.to_dict(), indent=1) + "\n")
        return path
