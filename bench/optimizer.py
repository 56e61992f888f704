"""Every optimizer on the same jobs: `satchel bench optimizer`, or `python -m bench.optimizer --help`.

Two jobs that train all parameters in bf16 on Python's own language reference, 4 rows of 256 tokens a step: tuning
SmolLM2-135M-Instruct, and a model of 10M parameters from scratch on the 4096 most frequent tokens. An optimizer's
learning rate is the best of a few around its own usual one, found with a seed that is not among those reported. Seeds
change the order of the rows and the noise of rounding. The loss is held out; its ratio is to AdamW's of the same seed.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from bench import tune
from bench._harness import RESULTS, interleave, measure, median, write
from bench._toy import toy
from bench._tune_loop import BATCH, CONTEXT, Tokens
from bench._tune_satchel import rows
from satchel.core import book
from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.model.source import find_source
from satchel.run.rehearse import rehearse

PATIENCE_S = 3600
MIB = 1 << 20
BASE = "adamw"
VOCABULARY = 4096  # of the model from scratch; rarer tokens are one
STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided, by the number of seeds
SWEEP_SEED = 100
RANKED = ("galore", "apollo", "owlore", "gradnormlorp")  # a quarter of the model's width
EVERY_LAYER = {"badam": "badam:period=5"}  # of 30 has its turn within 150 steps


@dataclass(frozen=True)
class Job:
    """What all optimizers are tried on; `factors` are tried on each one's usual learning rate."""

    name: str
    base: float  # AdamW's learning rate
    settings: dict[str, str]  # optimizers with knobs that suit this model

    def rate(self, optimizer: str) -> float:
        """The learning rate around which an optimizer is tried: as far from AdamW's as its usual one."""
        return book.make("optimizer", self.spelled(optimizer)).usual_lr(self.base, adapted=False)

    def spelled(self, optimizer: str) -> str:
        """The optimizer with its knobs."""
        return self.settings.get(optimizer, optimizer)


JOBS = (
    Job(
        "tuning SmolLM2-135M",
        1e-4,
        {name: f"{name}:rank=144" for name in RANKED} | EVERY_LAYER,
    ),
    Job(
        "10M from scratch",
        2e-3,
        {name: f"{name}:rank=96" for name in RANKED} | EVERY_LAYER,
    ),
)


def measured() -> list[str]:
    """The optimizers that the bench tries: all of the book."""
    return [entry.name for entry in book.entries() if entry.slot == "optimizer"]


def prepare(folder: Path, job: Job, steps: int, seeds: list[int], quick: bool) -> None:
    """Write the job's model once and, for each seed, the tokens in that seed's order."""
    folder.mkdir()
    if job is JOBS[0] and not quick:
        tune.prepare(folder, steps)
    else:
        sizes = {"width": 192, "layers": 1} if quick else {"width": 384, "layers": 5}
        toy(folder / "random", **sizes, vocabulary=VOCABULARY)
        tune.prepare(folder, steps, model=str(folder / "random"), tokenizer="demo")
    tokens = Tokens.read(folder / "tokens.npz")
    if (folder / "random").exists():
        tokens = fewer(tokens, VOCABULARY)
    stream = rows(tokens.train_MC)
    for seed in seeds:
        home = folder / str(seed)
        home.mkdir()
        (home / "model").symlink_to(folder / "model")
        order_SB = np.stack([stream.step_rows(step, BATCH, seed, steps * BATCH) for step in range(steps)])
        Tokens(tokens.train_MC, tokens.held_out_MC, order_SB).write(home / "tokens.npz")


def fewer(tokens: Tokens, vocabulary: int) -> Tokens:
    """The same text in ids below `vocabulary`: the most frequent tokens of the training rows, and one for the rest."""
    ids, counts = np.unique(tokens.train_MC, return_counts=True)
    kept = ids[np.argsort(-counts, kind="stable")][: vocabulary - 1]
    renamed = np.full(int(max(tokens.train_MC.max(), tokens.held_out_MC.max())) + 1, vocabulary - 1, np.int32)
    renamed[kept] = np.arange(len(kept), dtype=np.int32)
    return Tokens(renamed[tokens.train_MC], renamed[tokens.held_out_MC], tokens.order_SB)


@dataclass(frozen=True)
class Bench:
    """The measurements of one call: runs by job, optimizer and learning rate."""

    work: Path
    steps: int
    runs: list[dict[str, Any]] = field(default_factory=list)

    def run(self, job: Job, optimizer: str, lr: float, seed: int) -> dict[str, Any]:
        """One training run in a process of its own."""
        settings = {"optimizer": job.spelled(optimizer), "lr": lr, "seed": seed, "dtype": "bf16", "adapter": "none"}
        argument = {"work": str(self.folder(job) / str(seed)), "steps": self.steps} | settings
        found = measure("bench._tune_satchel", argument, PATIENCE_S)
        line = {"job": job.name, "method": optimizer, "lr": lr, "seed": seed} | found
        self.runs.append(line)
        print(f"{job.name}, {job.spelled(optimizer)}, lr {lr:g}, seed {seed}: {said(found)}", flush=True)
        return line

    def folder(self, job: Job) -> Path:
        """Where a job's model and tokens lie."""
        return self.work / str(JOBS.index(job))

    def best_rate(self, job: Job, optimizer: str, factors: list[float]) -> float:
        """The learning rate with the least held-out loss of one run each."""
        if len(factors) == 1:
            return job.rate(optimizer) * factors[0]
        found = [self.run(job, optimizer, job.rate(optimizer) * factor, SWEEP_SEED) for factor in factors]
        return min(found, key=lambda line: finite(line.get("held_out")))["lr"]

    def of(self, job: Job, optimizer: str, seeds: list[int]) -> list[dict[str, Any]]:
        """The reported runs of one row, in the order of the seeds."""
        wanted = (job.name, optimizer)
        lines = [run for run in self.runs if (run["job"], run["method"]) == wanted and run["seed"] in seeds]
        return sorted(lines, key=lambda line: line["seed"])


def said(found: dict[str, Any]) -> str:
    """A run in some words."""
    if "error" in found:
        return found["error"]
    return f"held out {found['held_out']:.4f}, {found['above_model_bytes'] / MIB:.0f} MiB, {found['cpu_s']:.2f} CPU s"


def finite(loss: float | None) -> float:
    """The loss; infinity if there is none."""
    return loss if loss is not None and math.isfinite(loss) else math.inf


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95% interval; no width from one value."""
    if len(values) == 1:
        return values[0], 0.0
    return mean(values), STUDENT_95[len(values)] * stdev(values) / len(values) ** 0.5


def taken(line: dict[str, Any]) -> int:
    """Bytes that a run took at its peak: the model, and all above it."""
    return line["model_bytes"] + line["above_model_bytes"]


def row(job: Job, optimizer: str, lines: list[dict[str, Any]], base: list[dict[str, Any]], accounts: dict) -> dict:
    """One line of the table."""
    cells: dict[str, Any] = {"job": job.name, "optimizer": job.spelled(optimizer)}
    failed = [line["error"] for line in lines if "error" in line]
    if failed or not lines:
        return cells | {"peak": f"failed: {failed[0] if failed else 'not measured'}"}
    loss, width = interval([line["held_out"] for line in lines])
    paired = [line for line in zip(lines, base, strict=False) if "held_out" in line[1]]
    ratio, spread = interval([ours["held_out"] / adamw["held_out"] for ours, adamw in paired]) if paired else (0.0, 0.0)
    peak, peaks = median(map(taken, lines)), median(taken(line) for line in base if "model_bytes" in line)
    return cells | {
        "lr": f"{lines[0]['lr']:.2g}",
        "held-out loss": f"{loss:.4f} ± {width:.4f}",
        "loss ratio": f"{ratio:.4f} ± {spread:.4f}",
        "peak, MiB": round(peak / MIB),
        "peak ratio": round(peak / peaks, 3),
        "state, MiB": round(median(line["state_bytes"] for line in lines) / MIB, 1),
        "CPU s/step": round(median(line["cpu_s"] for line in lines), 3),
        "rehearsed peak by account, MiB": ", ".join(f"{name} {size / MIB:.0f}" for name, size in accounts.items()),
    }


def accounts(bench: Bench, job: Job, optimizer: str) -> dict[str, int]:
    """Bytes by account at the peak of training, as the plan predicts them."""
    model = str(bench.folder(job) / "model")
    settings = {"optimizer": job.spelled(optimizer), "context": CONTEXT, "batch": BATCH, "micro_batch": BATCH}
    fields = {"model": model, "data": "demo", "dtype": "bf16", "adapter": "none", "lr": 1e-4}
    config: ModelConfig = find_source(model).config
    phases = rehearse(TuneJob.from_dict(fields | settings), config).phases
    return next(phase.accounts for phase in phases if phase.name == "train")


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Peak against held-out loss, a panel a job; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, job in zip(figure.subplots(1, len(JOBS)), JOBS, strict=True):
        for line in table:
            if line["job"] == job.name and "loss ratio" in line:
                point = line["peak ratio"], float(line["loss ratio"].split()[0])
                panel.plot(*point, "o")
                panel.annotate(line["optimizer"].partition(":")[0], point)
        panel.set(title=job.name, xlabel="peak, AdamW's = 1", ylabel="held-out loss, AdamW's = 1")
    figure.savefig(path, dpi=110)


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of a run")
    parser.add_argument("--seeds", type=int, default=3, help="runs that are reported, 1 to 5")
    parser.add_argument("--factors", default="0.3,1,3", help="on each optimizer's usual learning rate")
    parser.add_argument("--only", default="", help="optimizers, separated by commas; AdamW always runs")
    parser.add_argument("--quick", action="store_true", help="2 steps of tiny models, one seed: a test of the bench")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> Path:
    """Measure, and write bench/results/optimizer.json and .png; what was measured before an interruption is kept."""
    asked = arguments(given)
    if asked.quick:
        asked.steps, asked.seeds, asked.factors = 2, 1, "1"
    seeds, factors = list(range(asked.seeds)), [float(factor) for factor in asked.factors.split(",")]
    chosen = [name for name in measured() if not asked.only or name in {BASE, *asked.only.split(",")}]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), asked.steps)
        try:
            for job in JOBS:
                prepare(bench.folder(job), job, asked.steps, [*seeds, SWEEP_SEED], asked.quick)
                rates = {name: bench.best_rate(job, name, factors) for name in chosen}
                for number, name in enumerate(interleave(chosen, len(seeds))):
                    bench.run(job, name, rates[name], number // len(chosen))
        finally:
            path = report(bench, chosen, seeds, asked)
    return path


def report(bench: Bench, chosen: list[str], seeds: list[int], asked: argparse.Namespace) -> Path:
    """Write what was found."""
    table = []
    for job in (job for job in JOBS if bench.of(job, BASE, seeds)):
        base = bench.of(job, BASE, seeds)
        table += [row(job, name, bench.of(job, name, seeds), base, accounts(bench, job, name)) for name in chosen]
    title = f"All parameters in bf16, {BATCH} x {CONTEXT} tokens a step, {asked.steps} steps, {asked.seeds} seeds"
    path = write("optimizer", title, table, arguments=vars(asked), runs=bench.runs)
    draw(table, RESULTS / "optimizer.png")
    return path


if __name__ == "__main__":
    main()
