"""Tuning against the libraries that are used for it: `satchel bench tune`, or `python -m bench.tune --help`.

SmolLM2-135M-Instruct on Python's own language reference, 4 rows of 256 tokens a step. Both sides get the same weights,
the same tokens in the same order, the same learning rate and clip. Each measurement is a process of its own; the main
comparisons are repeated in rounds of changing order, and medians are reported. Ratios are ours to theirs.

`quality` holds each method that the planner may choose, as it would choose it, against the plain job of its slot: our
side alone, ratios of held-out loss, CPU seconds a step and memory. `make docs` hands it to the planner. Optimizers are
compared by bench/optimizer.py.

An interrupted bench goes on with `--resume`: what its results file holds is kept, what is missing is measured. Every
single measurement says of which commit it is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch

import satchel
from bench._harness import RESULTS, commit, interleave, measure, median, write
from bench._tune_loop import BATCH, CONTEXT, HELD_OUT, Tokens
from bench._tune_satchel import rows
from satchel.core import book
from satchel.model.source import find_source
from satchel.run.rung import DEFAULTS

PATIENCE_S = 2400  # galore-torch's first step decomposes 210 matrices
LORA = {"adapter": "lora:rank=8,alpha=16", "lr": 1e-3}
FULL = {"adapter": "none", "lr": 1e-4}
GALORE = {"adapter": "none", "lr": 1e-3, "optimizer": "galore:rank=128,gap=200,scale=0.25"}
PEFT, PEER_FULL = {"adapter": "lora", "lr": 1e-3}, {"adapter": "none", "lr": 1e-4}
WITH_PEFT, WITH_TORCH = "transformers + PEFT", "transformers + torch AdamW"
MIB = 1 << 20
RATIOS = {"memory": "above_model_bytes", "CPU": "cpu_s", "loss": "held_out"}  # column: what is compared
PLAIN = {"activations": LORA, "format": LORA}  # slots that the planner fills, but for optimizers: their plain jobs
CELLS = {  # column: quantity, its unit, digits
    "MiB above the model": ("above_model_bytes", MIB, 0),
    "CPU s/step": ("cpu_s", 1, 2),
    "s/step": ("wall_s", 1, 2),
    "first step, s": ("first_wall_s", 1, 2),
    "held-out loss": ("held_out", 1, 4),
    "state, MiB": ("state_bytes", MIB, 1),
    "weights, MiB": ("model_bytes", MIB, 0),
}


Side = tuple[str, dict[str, Any]]  # the module that measures, and what it is given


@dataclass(frozen=True)
class Pair:
    """One row: a job of ours, and the peer that does the same or comes nearest."""

    name: str
    ours: dict[str, Any]  # fields of the job
    peer: dict[str, Any]  # what bench/_tune_peer.py knows
    against: str  # the peer, in words
    main: bool = field(default=False, kw_only=True)  # repeated, and run for more steps


MAIN = (
    Pair("LoRA r=8, bf16", LORA, PEFT, WITH_PEFT, main=True),
    Pair("full tuning, bf16", FULL, PEER_FULL, f"{WITH_TORCH}, bf16", main=True),
    Pair("full tuning, bf16", FULL, PEER_FULL | {"dtype": "fp32"}, f"{WITH_TORCH}, fp32", main=True),
    Pair(
        "full tuning, bf16, rounding=fp32",
        FULL | {"optimizer": "adamw:rounding=fp32"},
        PEER_FULL | {"dtype": "fp32"},
        f"{WITH_TORCH}, fp32",
        main=True,
    ),
)
SLOTS = (
    Pair("LoRA r=8, fp32", LORA | {"dtype": "fp32"}, PEFT | {"dtype": "fp32"}, f"{WITH_PEFT}, fp32"),
    Pair(
        "full tuning, bf16, rounding=nearest",
        FULL | {"optimizer": "adamw:rounding=nearest"},
        PEER_FULL,
        f"{WITH_TORCH}, bf16",
    ),
    Pair("full tuning, fp32", FULL | {"dtype": "fp32"}, PEER_FULL | {"dtype": "fp32"}, f"{WITH_TORCH}, fp32"),
    Pair("GaLore r=128, bf16", GALORE, {"lr": 1e-3, "optimizer": "galore"}, "galore-torch"),
    Pair(
        "GaLore r=128, bf16, 8-bit moments, selective",
        GALORE | {"optimizer": GALORE["optimizer"] + ",moments=8bit", "activations": "selective"},
        {"lr": 1e-3, "optimizer": "galore"},
        "galore-torch",
    ),
    Pair(
        "AdamW 8 bit, bf16",
        FULL | {"optimizer": "adamw8bit"},
        PEER_FULL | {"optimizer": "adamw8bit"},
        "bitsandbytes AdamW8bit",
    ),
    Pair(
        "full tuning, bf16, 8-bit moments, selective",
        FULL | {"optimizer": "adamw8bit", "activations": "selective"},
        PEER_FULL,
        f"{WITH_TORCH}, bf16",
    ),
    Pair("rsLoRA r=8", LORA | {"adapter": "rslora:rank=8,alpha=16"}, PEFT | {"adapter": "rslora"}, WITH_PEFT),
    Pair("DoRA r=8", LORA | {"adapter": "dora:rank=8,alpha=16"}, PEFT | {"adapter": "dora"}, WITH_PEFT),
    Pair("LoRA on int8", LORA | {"format": "int8"}, PEFT | {"quantized": "int8"}, "PEFT on bitsandbytes int8"),
    Pair("LoRA on nf4", LORA | {"format": "nf4"}, PEFT | {"quantized": "nf4"}, "PEFT on bitsandbytes nf4"),
    Pair("LoRA on stored", LORA | {"format": "stored"}, PEFT, WITH_PEFT),
    Pair("LoRA on int4", LORA | {"format": "int4"}, PEFT | {"quantized": "nf4"}, "PEFT on bitsandbytes nf4"),
    Pair("LoRA, activations=selective", LORA | {"activations": "selective"}, PEFT, f"{WITH_PEFT}, keeping all"),
    Pair(
        "LoRA, activations=full",
        LORA | {"activations": "full"},
        PEFT | {"checkpointing": True},
        f"{WITH_PEFT}, checkpointing",
    ),
    *(
        Pair(f"LoRA, {name}", LORA | {"schedule": f"{name}:warmup=0"}, PEFT | {"schedule": name}, WITH_PEFT)
        for name in ("constant", "cosine", "linear", "wsd")
    ),
)


def prepare(work: Path, steps: int, model: str = "demo", tokenizer: str = "", context: int = CONTEXT) -> None:
    """Write the model and the tokens that all measurements read; `tokenizer` is a model with the one to use."""
    source = find_source(tokenizer or model)
    satchel.save(satchel.load(model, torch.bfloat16), work / "model", tokenizer_from=source)
    ids = satchel.load_tokenizer(source).encode("\n\n".join(topics[name] for name in sorted(topics)))
    count = (len(ids) - 1) // context
    blocks_MC = np.stack([ids[i * context : (i + 1) * context + 1] for i in range(count)]).astype(np.int32)
    shuffled_MC = blocks_MC[np.random.default_rng(0).permutation(count)]
    held_out_MC, train_MC = shuffled_MC[:HELD_OUT], shuffled_MC[HELD_OUT:]
    stream = rows(train_MC)
    order_SB = np.stack([stream.step_rows(step, BATCH, 0, steps * BATCH) for step in range(steps)])
    Tokens(train_MC, held_out_MC, order_SB).write(work / "tokens.npz")


@dataclass(frozen=True)
class Bench:
    """The measurements of one call, each made once however many rows it is in."""

    work: Path
    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def run(self, wanted: list[Side], steps: int, repetitions: int, keep: Callable[[], object]) -> None:
        """Measure the sides in rounds until each was `repetitions` times; `keep` is called after each measurement."""
        sides = {self.key(side, steps): side for side in wanted}
        had = Counter({key: len(self.found.get(key, ())) for key in sides})
        order = [key for number, key in numbered(interleave(sides, repetitions)) if number > had[key]]
        for number, key in enumerate(order, 1):
            module, settings = sides[key]
            argument = {"work": str(self.work), "steps": steps} | settings
            result = {"commit": commit()} | measure(f"bench.{module}", argument, PATIENCE_S)
            self.found.setdefault(key, []).append(result)
            said = (
                result.get("error") or f"{result['above_model_bytes'] / MIB:.0f} MiB, {result['cpu_s']:.2f} CPU s/step"
            )
            print(f"[{number}/{len(order)}] {key}: {said}", flush=True)
            keep()

    def has(self, side: Side, steps: int) -> bool:
        """Whether it was measured."""
        return self.key(side, steps) in self.found

    def result(self, side: Side, steps: int) -> dict[str, Any]:
        """The medians of one side; `error` if any of its measurements failed."""
        results = self.found.get(self.key(side, steps), [{"error": "not measured"}])
        for result in results:
            if "error" in result:
                return result
        plain = [{k: v for k, v in result.items() if not isinstance(v, (list, str))} for result in results]
        return {name: median(result[name] for result in plain) for name in plain[0]}

    @staticmethod
    def key(side: Side, steps: int) -> str:
        """What makes a measurement the same as another."""
        return f"{side[0].removeprefix('_tune_')} {steps} {json.dumps(side[1], sort_keys=True)}"


def numbered(keys: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Each key with the number of times that it has come up so far."""
    seen: Counter[str] = Counter()
    for key in keys:
        seen[key] += 1
        yield seen[key], key


def kept() -> dict[str, list[dict[str, Any]]]:
    """The measurements of the last bench that did not fail; none if there is no results file."""
    path = RESULTS / "tune.json"
    found = json.loads(path.read_text())["runs"] if path.exists() else {}
    whole = {key: [result for result in results if "error" not in result] for key, results in found.items()}
    return {key: results for key, results in whole.items() if results}


def both(pair: Pair) -> Iterator[Side]:
    """Our side, then the peer's."""
    yield ours(pair.ours)
    yield "_tune_peer", {"dtype": "bf16"} | pair.peer


def ours(settings: dict[str, Any]) -> Side:
    """Our side of a job."""
    return "_tune_satchel", {"dtype": "bf16"} | settings


def choices() -> dict[tuple[str, str], Side]:
    """What the planner may choose, by slot and method: the plain job of the slot with that method at its defaults."""
    found = (e for e in book.entries() if e.slot in PLAIN and e.name != DEFAULTS[e.slot] and e.card.fidelity != "study")
    return {(entry.slot, entry.name): ours(PLAIN[entry.slot] | {entry.slot: entry.name}) for entry in found}


def quality(bench: Bench, steps: int) -> list[dict[str, Any]]:
    """One line for each choice that was measured: ratios to the plain job of its slot after as many steps."""
    lines = []
    for (slot, method), side in choices().items():
        mine, plain = bench.result(side, steps), bench.result(ours(PLAIN[slot]), steps)
        if "error" not in mine and "error" not in plain:
            ratios = {column: round(mine[name] / plain[name], 4) for column, name in RATIOS.items()}
            lines.append({"slot": slot, "method": method, "steps": steps} | ratios)
    return lines


def row(pair: Pair, ours: dict[str, Any], theirs: dict[str, Any], steps: int) -> dict[str, Any]:
    """One line of the table, `ours / peer` in each cell; a side that failed leaves a dash and says why."""
    line: dict[str, Any] = {"method": pair.name, "peer": _peer(pair, ours, theirs), "steps": steps}
    for column, name in RATIOS.items():
        line[f"{column} ratio"] = round(ours[name] / theirs[name], 3) if name in ours and name in theirs else "-"
    for column, (name, unit, digits) in CELLS.items():
        line[column] = " / ".join(f"{side[name] / unit:.{digits}f}" if name in side else "-" for side in (ours, theirs))
    return line


def _peer(pair: Pair, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    failed = [f"{who} failed: {side['error']}" for who, side in (("ours", ours), ("it", theirs)) if "error" in side]
    return "; ".join([pair.against, *failed])


def unmeasured(pairs: tuple[Pair, ...]) -> list[str]:
    """Methods of the book that no pair and no bench of their own slot runs: nothing is added without a measurement."""
    named = {(slot, str(value).partition(":")[0]) for pair in pairs for slot, value in pair.ours.items()}
    named |= {("adapter", "lora"), ("optimizer", "adamw"), ("objective", "causal_lm")}
    named |= {("schedule", "rewarm"), ("schedule", "infinite")}  # bench/continual runs them
    slots = ("adapter", "format", "schedule", "objective")  # bench/optimizer and bench/activations run all of theirs
    return [f"{e.slot} {e.name}" for e in book.entries() if e.slot in slots and (e.slot, e.name) not in named]


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of the main comparisons")
    parser.add_argument("--slot-steps", type=int, default=6, help="optimizer steps of one row per method; 0: none")
    parser.add_argument("--repetitions", type=int, default=3, help="of the main comparisons")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--resume", action="store_true", help="keep the measurements of the last results file")
    parser.add_argument("--quick", action="store_true", help="2 steps, once, for a test of the bench itself")
    return parser.parse_args(given)


@dataclass(frozen=True)
class Round:
    """What is measured for as many steps."""

    pairs: list[Pair]
    alone: list[Side]  # ours without a peer, for `quality`
    steps: int
    repetitions: int

    @property
    def sides(self) -> list[Side]:
        """Everything that runs."""
        return [side for pair in self.pairs for side in both(pair)] + self.alone


def rounds(asked: argparse.Namespace) -> list[Round]:
    """The main comparisons, then one row a method with the plain job of its slot."""
    counts = [(2, 1), (2, 1)] if asked.quick else [(asked.steps, asked.repetitions), (asked.slot_steps, 1)]
    chosen = [key for key in choices() if asked.only in " ".join(key)]
    alone = [ours(PLAIN[slot]) for slot in PLAIN if chosen] + [choices()[key] for key in chosen]
    pairs = [[pair for pair in some if asked.only in pair.name] for some in (MAIN, SLOTS)]
    plan = [Round(some, side, *count) for some, side, count in zip(pairs, ([], alone), counts, strict=True)]
    return [each for each in plan if each.steps and each.sides]


def main(given: list[str] | None = None) -> Path:
    """Measure, and write bench/results/tune.json after every measurement: an interrupted bench keeps what it has."""
    asked = arguments(given)
    plan = rounds(asked)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), kept() if asked.resume else {})
        prepare(bench.work, max(each.steps for each in plan))
        for each in plan:
            bench.run(each.sides, each.steps, each.repetitions, lambda: report(bench, plan, asked, quiet=True))
    return report(bench, plan, asked)


def report(bench: Bench, plan: list[Round], asked: argparse.Namespace, quiet: bool = False) -> Path:
    """Write what was found so far: the rows of which both sides were measured, and our methods against plain jobs."""
    lines = [(pair, each.steps) for each in plan for pair in each.pairs]
    measured = [(pair, steps) for pair, steps in lines if all(bench.has(side, steps) for side in both(pair))]
    return write(
        "tune",
        f"SmolLM2-135M, {BATCH} x {CONTEXT} tokens a step, ours / peer",
        [row(pair, *(bench.result(side, steps) for side in both(pair)), steps) for pair, steps in measured],
        quiet=quiet,
        quality=quality(bench, plan[-1].steps),
        arguments=vars(asked),
        runs=bench.found,
        unmeasured=unmeasured(MAIN + SLOTS),
    )


if __name__ == "__main__":
    main()
