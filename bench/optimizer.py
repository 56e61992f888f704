"""Every optimizer on the same jobs: `satchel bench optimizer`, or `python -m bench.optimizer --help`.

Two jobs that train all parameters in bf16 on Python's own language reference, 2 rows of 128 tokens a step: tuning
SmolLM2-135M-Instruct, and a model of 10M parameters from scratch on the 4096 most frequent tokens, three times as long.
Blocks are recomputed, so that weights, gradients and state are what a peak is made of. An optimizer's learning rate is
the best of its usual one, twice and half of that, and on from there for as long as doubling or halving helps, with a
seed that is not among those reported; AdamW's too. For that a model that is tuned runs a quarter of its steps, and one
from scratch all of them: it is soonest better with steps that are too small in the end. Seeds change the order of the
rows and the noise of rounding. The loss is held out; its ratio is to AdamW's of the same seed. Peaks are bytes of
tensors, measured beside rehearsed; state is what is left of it after the last step, where a method that trains layers
in turn has let go of some.

Losses and bytes may be measured on a busy machine. Processor seconds may not: they are taken last, in short runs in
rounds, and --timings 0 leaves them out. With --work a bench that was stopped goes on from the runs that are there, and
a second process may help with --backwards: it begins at the list's end. With --resume it goes on from the results of an
earlier one, timings left out: some 200 runs take hours, and need not be of one day or one machine. --report writes what
there is.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from bench import tune
from bench._harness import RESULTS, add_work, interleave, median, once, told, workplace, write
from bench._optimizer_jobs import BASE, JOBS, LISA, WIDER_LISA, Job, planned
from bench._toy import toy
from bench._tune_loop import Tokens
from bench._tune_satchel import rows
from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.model.source import find_source
from satchel.run.rehearse import Rehearsal, rehearse

PATIENCE_S = 7200
MIB = 1 << 20
BATCH, CONTEXT = 2, 128
PLAIN = {"dtype": "bf16", "adapter": "none", "activations": "full"}
PLAIN |= {"batch": BATCH, "micro_batch": BATCH, "context": CONTEXT}
VOCABULARY = 4096  # of the model from scratch; rarer tokens are one
STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided, by the number of seeds
SWEEP_SEED = 100
CEILING = 1.12  # of the loss ratios that are drawn where they lie
MOST = 4  # doublings of a usual learning rate, and halvings
TIMED = 6  # steps of a run that is timed


def prepare(folder: Path, job: Job, steps: int, seeds: list[int], quick: bool) -> None:
    """Write the job's model and, for each seed, the tokens in that seed's order; once."""
    source = folder / "source"
    if not (source / "tokens.npz").exists():
        source.mkdir(parents=True, exist_ok=True)
        write_source(source, job, quick)
    tokens = Tokens.read(source / "tokens.npz")
    if (source / "random").exists():
        tokens = fewer(tokens, VOCABULARY)
    stream = rows(tokens.train_MC)
    for seed in seeds:
        home = folder / order(steps, seed)
        if not home.exists():
            order_SB = np.stack([stream.step_rows(step, BATCH, seed, steps * BATCH) for step in range(steps)])
            home.mkdir()
            (home / "model").symlink_to(source / "model")
            Tokens(tokens.train_MC, tokens.held_out_MC, order_SB).write(home / "tokens.npz")


def write_source(source: Path, job: Job, quick: bool) -> None:
    """The job's model, its tokenizer's tokens."""
    if job is JOBS[0] and not quick:
        tune.prepare(source, steps=1, context=CONTEXT)
        return
    sizes = {"width": 192, "layers": 1} if quick else {"width": 384, "layers": 5}
    toy(source / "random", **sizes, vocabulary=VOCABULARY)
    tune.prepare(source, steps=1, model=str(source / "random"), tokenizer="demo", context=CONTEXT)


def order(steps: int, seed: int) -> str:
    """The folder of a seed's order of rows."""
    return f"seed {seed}, {steps} steps"


def fewer(tokens: Tokens, vocabulary: int) -> Tokens:
    """The same text in ids below `vocabulary`: the most frequent tokens of the training rows, and one for the rest."""
    ids, counts = np.unique(tokens.train_MC, return_counts=True)
    kept = ids[np.argsort(-counts, kind="stable")][: vocabulary - 1]
    renamed = np.full(int(max(tokens.train_MC.max(), tokens.held_out_MC.max())) + 1, vocabulary - 1, np.int32)
    renamed[kept] = np.arange(len(kept), dtype=np.int32)
    return Tokens(renamed[tokens.train_MC], renamed[tokens.held_out_MC], tokens.order_SB)


@dataclass(frozen=True)
class Earlier:
    """The results that a bench goes on with."""

    table: tuple[dict[str, Any], ...] = ()
    runs: tuple[dict[str, Any], ...] = ()  # but for timings and failures

    @classmethod
    def read(cls) -> Earlier:
        """Of bench/results/optimizer.json, if it is there."""
        path = RESULTS / "optimizer.json"
        found = json.loads(path.read_text()) if path.exists() else {"table": [], "runs": []}
        good = (line for line in found["runs"] if "seed" in line and "error" not in line)
        return cls(tuple(found["table"]), tuple(good))


@dataclass(frozen=True)
class Bench:
    """The measurements of one call: runs by job, optimizer, learning rate and seed."""

    work: Path
    steps: int
    earlier: Earlier = Earlier()
    fresh: bool = True  # whether anything is measured that is not kept
    runs: list[dict[str, Any]] = field(default_factory=list)

    def run(self, job: Job, optimizer: str, lr: float, seed: int) -> dict[str, Any]:
        """One training run; with the sweep's seed it may be short."""
        steps = self.length(job) if seed != SWEEP_SEED else max(int(self.length(job) * job.sweep), 1)
        same = {"job": job.name, "optimizer": optimizer, "lr": lr, "seed": seed, "steps": steps}
        for line in self.earlier.runs:
            if same.items() <= line.items():
                self.runs.append(line)
                return line
        settings = PLAIN | {"optimizer": optimizer, "lr": lr, "seed": seed, "steps": steps}
        home = self.folder(job) / order(self.length(job), seed)
        found = once(self.folder(job), "bench._tune_satchel", settings, PATIENCE_S, fresh=self.fresh, work=str(home))
        if not self.fresh and "error" in found:
            return found
        return self.note(same | found)

    def time(self, job: Job, optimizer: str, lr: float, number: int) -> None:
        """A few steps on a quiet machine."""
        settings = PLAIN | {"optimizer": optimizer, "lr": lr, "seed": 0, "steps": min(TIMED, self.length(job))}
        home = self.folder(job) / order(self.length(job), 0)
        timed = self.folder(job) / "timed"
        found = once(timed, "bench._tune_satchel", settings, PATIENCE_S, number, fresh=self.fresh, work=str(home))
        if self.fresh or "error" not in found:
            self.note({"job": job.name, "optimizer": optimizer, "lr": lr, "timing": number} | found)

    def note(self, line: dict[str, Any]) -> dict[str, Any]:
        """Keep a run for the report, and say so."""
        self.runs.append(line)
        what = f"seed {line['seed']}" if "seed" in line else "timed"
        print(f"{line['job']}, {line['optimizer']}, lr {line['lr']:.3g}, {what}: {said(line)}", flush=True)
        return line

    def length(self, job: Job) -> int:
        """Steps of a reported run."""
        return self.steps * job.length

    def folder(self, job: Job) -> Path:
        """Where a job's model, tokens and runs lie."""
        return self.work / str(JOBS.index(job))

    def best_rate(self, job: Job, optimizer: str, most: int) -> float:
        """The best of the usual learning rate, twice and half of it; and on from there for as long as the loss of a
        run that looks for it falls, `most` times in all."""

        @cache
        def loss(power: int) -> float:
            return finite(self.run(job, optimizer, job.rate(optimizer) * 2.0**power, SWEEP_SEED).get("held_out"))

        best = direction = min((0, 1, -1), key=loss) if most else 0
        while direction and abs(best) < most and loss(best + direction) < loss(best):
            best += direction
        return job.rate(optimizer) * 2.0**best

    def of(self, job: Job, optimizer: str, seeds: list[int]) -> list[dict[str, Any]]:
        """The reported runs of one row that did not fail, in the order of the seeds."""
        mine = [line for line in self.runs if self._is(line, job, optimizer)]
        return [line for seed in seeds for line in mine if line.get("seed") == seed]

    def seconds(self, job: Job, optimizer: str) -> float | None:
        """Processor seconds of a step; None if no run was timed."""
        timed = [line["cpu_s"] for line in self.runs if self._is(line, job, optimizer) and "timing" in line]
        return median(timed) if timed else None

    @staticmethod
    def _is(line: dict[str, Any], job: Job, optimizer: str) -> bool:
        return (line["job"], line["optimizer"]) == (job.name, optimizer) and "error" not in line


def said(found: dict[str, Any]) -> str:
    """A run in some words."""
    if "error" in found:
        return found["error"]
    return f"held out {found['held_out']:.4f}, {found['tensor_bytes'] / MIB:.0f} MiB, {found['cpu_s']:.2f} CPU s"


def finite(loss: float | None) -> float:
    """The loss; infinity if there is none."""
    return loss if loss is not None and math.isfinite(loss) else math.inf


def interval(values: list[float]) -> str:
    """Mean and half-width of its 95% interval; no width from one value."""
    width = f" ± {STUDENT_95[len(values)] * stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{width}"


def row(job: Job, optimizer: str, bench: Bench, seeds: list[int], rehearsed: Rehearsal) -> dict[str, Any]:
    """One line of the table; what was not measured is a dash."""
    lines, base = (bench.of(job, name, seeds) for name in (optimizer, BASE))
    cells: dict[str, Any] = {"job": job.name, "optimizer": optimizer}
    if not lines:
        return cells | {"lr": "not measured"}
    ours, theirs = ({line["seed"]: line["held_out"] for line in some} for some in (lines, base))
    ratios = [ours[seed] / theirs[seed] for seed in ours if seed in theirs]
    peak, peaks = (median(line["tensor_bytes"] for line in some) for some in (lines, base or lines))
    train = next(phase for phase in rehearsed.phases if phase.name == "train")
    cpu = bench.seconds(job, optimizer)
    return cells | {
        "lr": f"{lines[0]['lr']:.2g}",
        "held-out loss": interval(list(ours.values())),
        "loss ratio": interval(ratios or [math.nan]),
        "seeds": len(lines),
        "steps": lines[0]["steps"],
        "peak, MiB": round(peak / MIB),
        "peak ratio": round(peak / peaks, 3),
        "rehearsed": f"{train.peak_bytes / peak - 1:+.1%}",
        "by account, MiB": ", ".join(f"{name} {size / MIB:.0f}" for name, size in train.accounts.items()),
        "state, MiB": round(median(line["state_bytes"] for line in lines) / MIB, 1),
        "CPU s/step": "-" if cpu is None else round(cpu, 3),
    }


def rehearsal(bench: Bench, job: Job, optimizer: str) -> Rehearsal:
    """What the plan predicts of a run."""
    model = str(bench.folder(job) / "source" / "model")
    config: ModelConfig = find_source(model).config
    return rehearse(TuneJob.from_dict(PLAIN | {"model": model, "data": "demo", "optimizer": optimizer}), config)


def quality(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the planner knows of the optimizers: of each form that was measured, its ratios to AdamW, tuning."""
    job, found = JOBS[0], []
    lines = {line["optimizer"]: line for line in table if line["job"] == job.name and "loss ratio" in line}
    spelled = {name: planned(job, name) for name in lines if name != BASE and BASE in lines}
    for name, line in ((name, lines[name]) for name, spelling in spelled.items() if spelling):
        ours, plain = (each["peak, MiB"] - account_at_peak(each, "weights") for each in (line, lines[BASE]))
        ratios = {"memory": round(ours / plain, 4), "loss": float(line["loss ratio"].split()[0])}
        found.append({"slot": "optimizer", "method": spelled[name], "steps": line["steps"]} | ratios)
    return found


def findings(table: list[dict[str, Any]]) -> dict[str, Any]:
    """What the table shows in all: who is lean and good, and how far rehearsals were off."""
    measured = [line for line in table if "peak ratio" in line]
    errors = [abs(float(line["rehearsed"].rstrip("%"))) for line in measured]
    found: dict[str, Any] = {"rehearsed peaks off by, median and worst, %": errors and [median(errors), max(errors)]}
    for job in JOBS:
        good = [line for line in measured if line["job"] == job.name and float(line["loss ratio"].split()[0]) <= 1.02]
        found[f"{job.name}: loss <= 1.02 at peak <= 0.45"] = [x["optimizer"] for x in good if x["peak ratio"] <= 0.45]
        state = {line["optimizer"]: account_at_peak(line, "optimizer") for line in measured if line["job"] == job.name}
        if {LISA, WIDER_LISA} <= state.keys():
            outside = 2 * state[LISA] - state[WIDER_LISA]  # two layers' state less
            found[f"{job.name}: share of LISA's state that lies outside of the layers"] = outside / state[LISA]
    return found


def account_at_peak(line: dict[str, Any], name: str) -> int:
    """An account of a row, MiB. Of state: after the last step a method in turns has let go of some of it."""
    return int(dict(re.findall(r"(\w+) (\d+)", line["by account, MiB"])).get(name, 0))


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Peak against held-out loss, a panel a job, points by number; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 9), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, job in zip(figure.subplots(1, len(JOBS)), JOBS, strict=True):
        points = {}
        for line in table:
            if line["job"] == job.name and "loss ratio" in line:
                points[line["optimizer"]] = line["peak ratio"], float(line["loss ratio"].split()[0])
        front = sorted(point for point in points.values() if best_of_its_size(point, points.values()))
        panel.plot(*zip(*front, strict=True), color="grey", linewidth=1) if front else None
        for number, (name, (peak, loss)) in enumerate(points.items(), 1):
            above, fused = loss > CEILING, "layerwise=true" in name or name.startswith("lomo")
            at, marker = (peak, min(loss, CEILING)), "^" if above else "s" if fused else "o"
            panel.plot(*at, marker, color="tab:blue" if fused else "tab:orange", label=f"{number}  {name}")
            said = f"{number}: {loss:.2f}" if above else str(number)
            panel.annotate(said, at, xytext=(4, 4), textcoords="offset points", fontsize=8)
        panel.axhline(1.02, color="grey", linestyle=":")
        panel.axvline(0.45, color="grey", linestyle=":")
        panel.set_ylim(top=CEILING + 0.01)
        panel.set(title=job.name, xlabel="peak of tensors, AdamW's = 1", ylabel="held-out loss, AdamW's = 1")
        if points:
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, fontsize=7, frameon=False)
    figure.text(
        0.5, 1.0, "squares update within the backward pass; triangles lie above", ha="center", va="top", fontsize=8
    )
    figure.savefig(path, dpi=110)


def best_of_its_size(point: tuple[float, float], points: Any) -> bool:
    """Whether no other point is lower on both axes."""
    return not any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a run that tunes")
    parser.add_argument("--seeds", type=int, default=3, help="runs that are reported, 1 to 5")
    parser.add_argument("--sweep", type=int, default=MOST, help="doublings and halvings of a learning rate at most")
    parser.add_argument("--timings", type=int, default=2, help="short runs of each that are timed; 0: none")
    parser.add_argument("--only", default="", help="words; optimizers whose spelling holds one, and AdamW")
    parser.add_argument("--job", default="", help="jobs whose name holds this")
    parser.add_argument("--backwards", action="store_true", help="from the end of the list, beside another process")
    parser.add_argument("--resume", action="store_true", help="go on from the runs in bench/results/optimizer.json")
    parser.add_argument("--report", action="store_true", help="measure nothing: write what --work and --resume hold")
    parser.add_argument("--quick", action="store_true", help="2 steps of tiny models, one seed: a test of the bench")
    add_work(parser)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> Path:
    """Measure, and write bench/results/optimizer.json and .png, also where it is interrupted."""
    asked = arguments(given)
    if asked.quick:
        asked.steps, asked.seeds, asked.sweep, asked.timings = 2, 1, 0, 1
    seeds, jobs = list(range(asked.seeds)), [job for job in JOBS if asked.job in job.name]
    with workplace(None if asked.quick else asked.work) as work:
        bench = Bench(work, asked.steps, Earlier.read() if asked.resume else Earlier(), not asked.report)
        for job in jobs:
            prepare(bench.folder(job), job, bench.length(job), [*seeds, SWEEP_SEED], asked.quick)
        try:
            train(bench, jobs, seeds, asked)
        finally:
            path = report(bench, jobs, seeds, asked)
    return path


def train(bench: Bench, jobs: list[Job], seeds: list[int], asked: argparse.Namespace) -> None:
    """Every run, seed by seed, each optimizer's learning rate before its first; then what is timed."""
    cases = [(job, name) for job in jobs for name in chosen(job, asked)]
    rates: dict[tuple[Job, str], float] = {}
    for seed in seeds:
        for job, name in reversed(cases) if asked.backwards else cases:
            if (job, name) not in rates:
                rates[job, name] = bench.best_rate(job, name, asked.sweep)
            bench.run(job, name, rates[job, name], seed)
    for number, (job, name) in enumerate(interleave(rates, asked.timings)):
        bench.time(job, name, rates[job, name], number // len(rates))


def chosen(job: Job, asked: argparse.Namespace) -> list[str]:
    """The optimizers that are asked for."""
    words = asked.only.split() or [""]
    return [name for name in job.optimizers() if name == BASE or any(word in name for word in words)]


def report(bench: Bench, jobs: list[Job], seeds: list[int], asked: argparse.Namespace) -> Path:
    """Write what was found; of a bench that this one goes on with, the rows of other jobs and all runs stay."""
    table, runs = [], [line for line in bench.earlier.runs if line not in bench.runs]
    for job in JOBS:
        if job in jobs:
            table += [row(job, name, bench, seeds, rehearsal(bench, job, name)) for name in chosen(job, asked)]
        else:
            table += [line for line in bench.earlier.table if line["job"] == job.name]
    title = f"All parameters in bf16, {BATCH} x {CONTEXT} tokens a step, {asked.steps} steps, from scratch 3 times that"
    rest = {"arguments": told(asked), "findings": findings(table), "quality": quality(table)}
    rest |= {"runs": bench.runs + runs}
    path = write("optimizer", title, table, quiet=True, **rest)
    draw(table, RESULTS / "optimizer.png")
    return path


if __name__ == "__main__":
    main()
