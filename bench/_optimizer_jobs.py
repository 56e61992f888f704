"""The two jobs of bench/optimizer, and the forms of the optimizers that are tried on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from satchel.core import book

BASE = "adamw"
LEAN = "moments=8bit"
LISA, WIDER_LISA = "lisa:period=5", "lisa:gamma=4,period=5"
OF_THE_RUN = ("gap", "period")  # knobs that a longer run has larger
RANKED = ("galore", "natural_galore", "apollo", "gradnormlorp")  # a quarter of the model's width


@dataclass(frozen=True)
class Job:
    """What all optimizers are tried on."""

    name: str
    base: float  # AdamW's usual learning rate
    rank: int  # a quarter of the model's width
    turn: int  # steps in which BAdam trains one layer
    length: int = 1  # factor on the steps
    sweep: float = 0.25  # share of them in a run that looks for a learning rate

    def rate(self, optimizer: str) -> float:
        """The learning rate around which an optimizer is tried: as far from AdamW's as its usual one."""
        return book.make("optimizer", optimizer).usual_lr(self.base, adapted=False)

    def optimizers(self) -> list[str]:
        """All of the book with knobs that suit a short run, and the leanest forms of some."""
        knobs = {name: f"{name}:rank={self.rank},gap=40" for name in RANKED}
        knobs |= {"badam": f"badam:period={self.turn}", "lisa": LISA}
        knobs |= {"owlore": f"owlore:rank={self.rank},period=10", "frugal": "frugal:gap=40"}
        found = [knobs.get(entry.name, entry.name) for entry in book.entries() if entry.slot == "optimizer"]
        lean = [f"{knobs[name]},{LEAN}" for name in ("lisa", "owlore")]
        half = [f"{name}:rank={self.rank // 2},gap=40" for name in ("galore", "apollo")]
        half += ["frugal:density=0.125,gap=40", "apollo_mini:gap=40"]
        fused = [*half, *(knobs[name] for name in ("apollo", "frugal", "gradnormlorp"))]
        lean += [f"{spelling},{LEAN},layerwise=true" for spelling in fused]
        lean += [f"{name}:layerwise=true" for name in (BASE, "adamw8bit", "adafactor")]
        return [*found, "lomo:form=ada", WIDER_LISA, *lean]


JOBS = (
    Job("tuning SmolLM2-135M", 1e-4, rank=144, turn=2),
    Job("10M from scratch", 2e-3, rank=96, turn=12, length=3, sweep=1.0),
)


def planned(job: Job, spelling: str) -> str | None:
    """How the planner spells a form: without what suits the length of a run and the model's width; None if that makes
    it another form."""
    method = book.make("optimizer", spelling)
    usual = type(method)()
    changed = {name: getattr(usual, name) for name in OF_THE_RUN if hasattr(method, name)}
    if getattr(method, "rank", None) == job.rank:
        changed["rank"] = usual.rank
    plain = replace(method, **changed)
    return str(plain) if getattr(plain, "rank", None) == getattr(usual, "rank", None) else None
