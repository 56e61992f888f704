"""Tuning against the libraries that are used for it: `satchel bench tune`, or `python -m bench.tune --help`.

SmolLM2-135M-Instruct on Python's own language reference, 4 rows of 256 tokens a step. Both sides get the same weights,
the same tokens in the same order, the same learning rate and clip. Each measurement is a process of its own; the main
comparisons are repeated in rounds of changing order, and medians are reported. Ratios are ours to theirs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch

import satchel
from bench._harness import interleave, measure, median, write
from bench._tune_loop import BATCH, CONTEXT, HELD_OUT, Tokens
from bench._tune_satchel import rows
from satchel.core import book
from satchel.model.source import find_source

PATIENCE_S = 2400  # galore-torch's first step decomposes 210 matrices
LORA = {"adapter": "lora:rank=8,alpha=16", "lr": 1e-3}
FULL = {"adapter": "none", "lr": 1e-4}
GALORE = {"adapter": "none", "lr": 1e-3, "optimizer": "galore:rank=128,gap=200,scale=0.25"}
PEFT, PEER_FULL = {"adapter": "lora", "lr": 1e-3}, {"adapter": "none", "lr": 1e-4}
WITH_PEFT, WITH_TORCH = "transformers + PEFT", "transformers + torch AdamW"
MIB = 1 << 20
RATIOS = {"memory": "above_model_bytes", "CPU": "cpu_s", "loss": "held_out"}  # column: what is compared
CELLS = {  # column: quantity, its unit, digits
    "MiB above the model": ("above_model_bytes", MIB, 0),
    "CPU s/step": ("cpu_s", 1, 2),
    "s/step": ("wall_s", 1, 2),
    "first step, s": ("first_wall_s", 1, 2),
    "held-out loss": ("held_out", 1, 4),
    "state, MiB": ("state_bytes", MIB, 1),
    "weights, MiB": ("model_bytes", MIB, 0),
}


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
        "AdamW 8 bit, bf16",
        FULL | {"optimizer": "adamw8bit"},
        PEER_FULL | {"optimizer": "adamw8bit"},
        "bitsandbytes AdamW8bit",
    ),
    Pair("rsLoRA r=8", LORA | {"adapter": "rslora:rank=8,alpha=16"}, PEFT | {"adapter": "rslora"}, WITH_PEFT),
    Pair("DoRA r=8", LORA | {"adapter": "dora:rank=8,alpha=16"}, PEFT | {"adapter": "dora"}, WITH_PEFT),
    Pair("LoRA on int8", LORA | {"format": "int8"}, PEFT | {"quantized": "int8"}, "PEFT on bitsandbytes int8"),
    Pair("LoRA on nf4", LORA | {"format": "nf4"}, PEFT | {"quantized": "nf4"}, "PEFT on bitsandbytes nf4"),
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


def prepare(work: Path, steps: int, model: str = "demo") -> None:
    """Write the model and the tokens that all measurements read."""
    source = find_source(model)
    satchel.save(satchel.load(model, torch.bfloat16), work / "model", tokenizer_from=source)
    ids = satchel.load_tokenizer(source).encode("\n\n".join(topics[name] for name in sorted(topics)))
    count = (len(ids) - 1) // CONTEXT
    blocks_MC = np.stack([ids[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(count)]).astype(np.int32)
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

    def run(self, pairs: list[Pair], steps: int, repetitions: int) -> None:
        """Measure both sides of the pairs, `repetitions` times in rounds."""
        sides = {self.key(side, steps): side for pair in pairs for side in both(pair)}
        fresh = [key for key in sides if key not in self.found]
        order = interleave(fresh, repetitions)
        for number, key in enumerate(order, 1):
            module, settings = sides[key]
            argument = {"work": str(self.work), "steps": steps} | settings
            result = measure(f"bench.{module}", argument, PATIENCE_S)
            self.found.setdefault(key, []).append(result)
            said = (
                result.get("error") or f"{result['above_model_bytes'] / MIB:.0f} MiB, {result['cpu_s']:.2f} CPU s/step"
            )
            print(f"[{number}/{len(order)}] {key}: {said}", flush=True)

    def result(self, side: tuple[str, dict[str, Any]], steps: int) -> dict[str, Any]:
        """The medians of one side; `error` if any of its measurements failed."""
        results = self.found.get(self.key(side, steps), [{"error": "not measured"}])
        for result in results:
            if "error" in result:
                return result
        plain = [{k: v for k, v in result.items() if not isinstance(v, list)} for result in results]
        return {name: median(result[name] for result in plain) for name in plain[0]}

    @staticmethod
    def key(side: tuple[str, dict[str, Any]], steps: int) -> str:
        """What makes a measurement the same as another."""
        return f"{side[0].removeprefix('_tune_')} {steps} {json.dumps(side[1], sort_keys=True)}"


def both(pair: Pair) -> Iterator[tuple[str, dict[str, Any]]]:
    """Module and settings of our side, then of the peer's."""
    yield "_tune_satchel", {"dtype": "bf16"} | pair.ours
    yield "_tune_peer", {"dtype": "bf16"} | pair.peer


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
    """Methods of the book that no pair runs: nothing is added without a measurement."""
    named = {(slot, str(value).partition(":")[0]) for pair in pairs for slot, value in pair.ours.items()}
    named |= {("adapter", "lora"), ("optimizer", "adamw"), ("objective", "causal_lm")}
    slots = ("adapter", "optimizer", "format", "activations", "schedule", "objective")
    return [f"{e.slot} {e.name}" for e in book.entries() if e.slot in slots and (e.slot, e.name) not in named]


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of the main comparisons")
    parser.add_argument("--slot-steps", type=int, default=6, help="optimizer steps of one row per method; 0: none")
    parser.add_argument("--repetitions", type=int, default=3, help="of the main comparisons")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--quick", action="store_true", help="2 steps, once, for a test of the bench itself")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> Path:
    """Measure, and write bench/results/tune.json; what was measured before an interruption is kept."""
    asked = arguments(given)
    plan = [(MAIN, asked.steps, asked.repetitions), (SLOTS, asked.slot_steps, 1)]
    if asked.quick:
        plan = [(pairs, 2, 1) for pairs, _, _ in plan]
    plan = [([p for p in pairs if asked.only in p.name], steps, times) for pairs, steps, times in plan if steps]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        prepare(bench.work, max(steps for _, steps, _ in plan))
        try:
            for pairs, steps, times in plan:
                bench.run(pairs, steps, times)
        finally:
            path = report(bench, [(pair, steps) for pairs, steps, _ in plan for pair in pairs], asked)
    return path


def report(bench: Bench, lines: list[tuple[Pair, int]], asked: argparse.Namespace) -> Path:
    """Write what was found."""
    table = [row(pair, *(bench.result(side, steps) for side in both(pair)), steps) for pair, steps in lines]
    return write(
        "tune",
        f"SmolLM2-135M, {BATCH} x {CONTEXT} tokens a step, ours / peer",
        table,
        arguments=vars(asked),
        runs=bench.found,
        unmeasured=unmeasured(MAIN + SLOTS),
    )


if __name__ == "__main__":
    main()
