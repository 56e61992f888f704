"""What the learning-rate schedules share: warm-up, and the fall to a final share of the peak."""

from dataclasses import dataclass

from satchel.core.seams import Schedule


@dataclass(frozen=True, kw_only=True)
class Warmed(Schedule):
    """A schedule that climbs linearly over its first steps; subclasses say what follows."""

    warmup: float = 0.03  # share of the steps that climb to the peak, [0, 1)

    def __post_init__(self) -> None:
        self.require(0 <= self.warmup < 1, f"warmup={self.warmup} is outside [0, 1); 0.03 is usual")

    def at(self, step: int, steps: int) -> float:
        """The factor on the peak learning rate; the climb's first step is above 0, its last is below 1."""
        climb = round(self.warmup * steps)
        if step < climb:
            return self.climbing((step + 1) / (climb + 1))
        return self.after(min((step - climb) / max(steps - climb, 1), 1.0))

    def climbing(self, progress: float) -> float:
        """The factor during warm-up; `progress` runs from above 0 to below 1."""
        return progress

    def after(self, progress: float) -> float:
        """The factor after warm-up; `progress` runs from 0 to just below 1."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Falling(Warmed):
    """A warmed schedule that ends near `final`."""

    final: float = 0.0  # share of the peak that is left at the end, [0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.final <= 1, f"final={self.final} is outside [0, 1]; 0.1 keeps a tenth of the peak")
