"""What a job may use: the argument of every job."""

from dataclasses import dataclass

from satchel.core.errors import UserError
from satchel.core.units import format_bytes, format_seconds, parse_bytes, parse_seconds


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits on a job; None is no limit. `auto` is the machine's business and is resolved before it comes here."""

    memory_bytes: int | None = None  # peak of the whole process on the device that computes
    seconds: float | None = None  # wall-clock time of the whole job

    def __post_init__(self) -> None:
        for name, limit in (("memory_bytes", self.memory_bytes), ("seconds", self.seconds)):
            if limit is not None and limit <= 0:
                raise UserError(f"budget: {name}={limit} leaves nothing; give a positive limit, or none")

    @classmethod
    def parse(cls, memory: str = "", time: str = "") -> "Budget":
        """`Budget.parse(memory="1.5GiB", time="10min")`; an empty text is no limit. Raises UserError."""
        return cls(
            memory_bytes=parse_bytes(memory) if memory else None,
            seconds=parse_seconds(time) if time else None,
        )

    def exceeded(self, memory_bytes: float = 0, seconds: float = 0.0) -> tuple[str, ...]:
        """Which limits a job of this peak and duration breaks: of `memory` and `time`."""
        over_memory = self.memory_bytes is not None and memory_bytes > self.memory_bytes
        over_time = self.seconds is not None and seconds > self.seconds
        return ("memory",) * over_memory + ("time",) * over_time

    def __str__(self) -> str:
        limits = [format_bytes(self.memory_bytes)] if self.memory_bytes is not None else []
        limits += [format_seconds(self.seconds)] if self.seconds is not None else []
        return " and ".join(limits) or "no limit"
