"""Zeroth-order tuning on a task of two classes: `satchel bench zeroth`, or `python -m bench.zeroth --help`.

SmolLM2-135M-Instruct is shown a sentence and asked where it is from: Python's own language reference, or the
documentation of a library of neural networks, both as they are installed here. The two answers are words that it would
say; what counts is which of them it finds the likelier behind the prompt. Accuracy on sentences that are held out,
without training and after as many steps by each method, for all weights and for LoRA; the peak of a step is given over
that of inference on the same rows. AdamW stands beside them: what a gradient would have done.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch

import satchel
from bench._harness import RESULTS, add_work, interleave, median, once, told, workplace, write
from bench._zeroth_run import CONTEXT
from satchel.model.source import find_source

PATIENCE_S = 3600
MIB = 1 << 20
PROMPT = "Sentence: {}\nQuestion: Is it about the Python language or about neural networks?\nAnswer: It is about"
ANSWERS = (" Python", " neural")
Case = tuple[str, str]  # what trains, by which method
SCHEMES = {"LoRA r=8": {"adapter": "lora:rank=8"}, "all weights": {"adapter": "none"}}
METHODS = (
    "adamw",
    "mezo",
    "mezo:update=sign",
    "mezo:update=adam",
    "mezo:blocks=8",
    "mezo:sparsity=0.9",
    "mezo_hybrid",
    "forward_gradient",
)
COLUMNS = ("lr", "accuracy before", "accuracy", "range", "first losses", "last losses")
COLUMNS += ("peak, MiB", "peak over inference", "rehearsed")
WORDS = (8, 30)  # of a sentence
TEST = 128  # sentences that are held out


def sentences(texts: list[str]) -> Iterator[str]:
    """Plain sentences of documentation: no code, no signatures, no markup."""
    for text in texts:
        for paragraph in text.split("\n\n"):
            for sentence in re.split(r"(?<=\.)\s+", " ".join(paragraph.split())):
                plain = re.fullmatch(r"[A-Z][A-Za-z0-9 ,;'()-]*\.", sentence)
                if plain and WORDS[0] <= len(sentence.split()) <= WORDS[1]:
                    yield sentence


def torch_texts() -> list[str]:
    """What torch says of its own modules, functions and optimizers."""
    homes = (torch.nn, torch.nn.functional, torch.optim, torch.nn.init, torch.optim.lr_scheduler, torch)
    members = {name: member for home in homes for name, member in vars(home).items() if callable(member)}
    return [inspect.getdoc(members[name]) or "" for name in sorted(members)]


def task(model: str, tokenizer: Any, examples: int) -> dict[str, Any]:
    """As many sentences of either class, shuffled, some of them held out; raises ValueError if there are too few."""
    classes = [sorted(set(sentences(texts))) for texts in (list(topics.values()), torch_texts())]
    rng, labelled = np.random.default_rng(0), []
    for label, found in enumerate(classes):
        prompts = [tokenizer.encode(PROMPT.format(found[i])) for i in rng.permutation(len(found))]
        short = [prompt for prompt in prompts if len(prompt) <= CONTEXT][: (examples + TEST) // 2]
        if len(short) < (examples + TEST) // 2:
            raise ValueError(f"class {label} has {len(short)} sentences; {(examples + TEST) // 2} are asked for")
        labelled += [(prompt, label) for prompt in short]
    labelled = [labelled[i] for i in rng.permutation(len(labelled))]
    answers = [tokenizer.encode(answer)[0] for answer in ANSWERS]
    return {"model": model, "train": labelled[TEST:], "test": labelled[:TEST], "answers": answers}


def row(scheme: str, method: str, runs: list[dict[str, Any]], peaks: dict[str, Any]) -> dict[str, Any]:
    """One line of the table: medians over the seeds; what was not measured is a dash."""
    cells: dict[str, Any] = {"trained": scheme, "optimizer": method} | dict.fromkeys(COLUMNS, "-")
    if peaks.get("inference_bytes"):
        training, inference = peaks["training_bytes"], peaks["inference_bytes"]
        cells |= {"peak, MiB": round(training / MIB), "peak over inference": round(training / inference, 3)}
        cells["rehearsed"] = f"{peaks['rehearsed_bytes'] / training - 1:+.1%}"
    failed = [run["error"] for run in (peaks, *runs) if "error" in run]
    if failed or not runs:
        return cells | {"accuracy": f"failed: {failed[0]}" if failed else "not measured"}
    middle = {name: median(run[name] for run in runs) for name in ("lr", "before", "after")}
    cells |= {"lr": f"{middle['lr']:.2g}", "accuracy before": middle["before"], "accuracy": middle["after"]}
    cells["range"] = f"{min(run['after'] for run in runs):.3f}-{max(run['after'] for run in runs):.3f}"
    first, last = (median(np.mean(run["losses"][part]) for run in runs) for part in (slice(10), slice(-10, None)))
    return cells | {"first losses": round(float(first), 3), "last losses": round(float(last), 3)}


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of a run")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each row")
    parser.add_argument("--factor", type=float, default=1.0, help="on each optimizer's usual learning rate")
    parser.add_argument("--examples", type=int, default=512, help="sentences to train on")
    parser.add_argument("--only", default="", help="methods, separated by spaces")
    parser.add_argument("--scheme", default="", help="schemes whose name holds this")
    add_work(parser)
    return parser.parse_args(given)


@dataclass(frozen=True)
class Bench:
    """The measurements of one call, by what trains and how."""

    work: Path
    asked: argparse.Namespace
    peaks: dict[Case, dict[str, Any]] = field(default_factory=dict)
    found: dict[Case, list[dict[str, Any]]] = field(default_factory=dict)

    def peak(self, case: Case) -> None:
        """What a step takes, and inference."""
        self.peaks[case] = self._once(case, {"what": "peaks"})

    def run(self, case: Case, seed: int) -> dict[str, Any]:
        """Some steps of training."""
        sizes = {"what": "learn", "steps": self.asked.steps, "seed": seed, "factor": self.asked.factor}
        run = self._once(case, sizes)
        self.found.setdefault(case, []).append(run)
        return run

    def _once(self, case: Case, sizes: dict[str, Any]) -> dict[str, Any]:
        settings = {"dtype": "bf16", "optimizer": case[1], "examples": self.asked.examples} | SCHEMES[case[0]] | sizes
        return once(self.work, "bench._zeroth_run", settings, PATIENCE_S, work=str(self.work))


def main(given: list[str] | None = None) -> Path:
    """Measure, and write bench/results/zeroth.json after every run."""
    asked = arguments(given)
    methods = asked.only.split() or list(METHODS)
    cases = [(scheme, method) for scheme in SCHEMES if asked.scheme in scheme for method in methods]
    path = RESULTS / "zeroth.json"
    with workplace(asked.work) as work:
        bench = Bench(work, asked)
        prepare(work, asked.examples)
        for case in cases:
            bench.peak(case)
            path = report(bench, cases)
        for number, case in enumerate(interleave(cases, asked.seeds)):
            run = bench.run(case, number // len(cases))
            print(f"[{number + 1}/{len(cases) * asked.seeds}] {', '.join(case)}: {said(run)}", flush=True)
            path = report(bench, cases)
    return path


def prepare(work: Path, examples: int) -> None:
    """Write the task of so many examples, once."""
    file = work / f"task-{examples}.json"
    if not file.exists():
        tokenizer = satchel.load_tokenizer(find_source("demo"))
        file.write_text(json.dumps(task("demo", tokenizer, examples)))


def said(run: dict[str, Any]) -> str:
    """A run in some words."""
    return run.get("error") or f"accuracy {run['before']:.3f} to {run['after']:.3f}, {run['wall_s']:.2f} s/step"


def report(bench: Bench, cases: list[Case]) -> Path:
    """Write what was found so far."""
    asked = bench.asked
    title = f"SmolLM2-135M, bf16, two classes of sentences, {asked.steps} steps of 8, seeds: {asked.seeds}"
    table = [row(*case, bench.found.get(case, []), bench.peaks.get(case, {})) for case in cases]
    runs = [{"trained": case[0], "optimizer": case[1], "runs": bench.found.get(case, [])} for case in cases]
    rest = {"arguments": told(asked), "peaks": list(bench.peaks.values()), "runs": runs}
    return write("zeroth", title, table, quiet=True, **rest)


if __name__ == "__main__":
    main()
