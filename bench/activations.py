"""The longest context that tunes in a budget, by what is kept: `satchel bench activations`, or `--help`.

SmolLM2-135M-Instruct with LoRA of rank 8 in bf16, one document a step. The longest context is found by rehearsal, among
the sizes that batches have. In the smaller budget every policy then runs at its longest context, in a process that may
not hold more; in the larger one those whose step is predicted to end in time. Beside it: exact policies against the
plain job; MEMO against full recomputation at one context; LeMo against the plain job and against dropping at random;
packed documents against padded ones.

Contexts, peaks and losses may be measured on a busy machine. Tokens a second may not: --timings 0 leaves out what is
measured for them alone. With --work a bench that was stopped goes on from the runs that are there.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench._harness import RESULTS, add_work, interleave, median, once, told, workplace, write
from satchel.core.units import format_bytes, parse_bytes

POLICIES = ("none", "selective", "full", "memo:alpha=0", "memo:alpha=0.5", "memo:alpha=1", "lemo", "lemo:keep=0.75")
EXACT = ("selective", "full", "memo:alpha=0", "memo:alpha=0.5", "memo:alpha=1")
LOSSY = (
    ("none", False),
    ("lemo:keep=0.5", False),
    ("lemo:keep=0.5", True),
    ("lemo:keep=0.75", False),
    ("lemo:keep=0.75", True),
)
RUN = "bench._activations_run"
BESIDE = ("full", "memo:alpha=0", "memo:alpha=1")
CELLS = ("longest context", "peak", "tensors rehearsed", "tokens/s")
DOCUMENTS, MEDIAN_TOKENS, SPREAD, MOST_TOKENS = 12, 90, 0.9, 512  # of the documents that are packed and padded


@dataclass(frozen=True)
class Bench:
    """The measurements of one call."""

    work: Path
    asked: argparse.Namespace

    def measure(self, what: str, number: int = 0, **argument: Any) -> dict[str, Any]:
        """One process, unless it is kept."""
        return once(self.work, RUN, {"what": what} | argument, self.asked.timeout, number)

    def run(self, policy: str, context: int, budget: int | None, steps: int, number: int = 0) -> dict[str, Any]:
        """Some steps on one document."""
        return self.measure("run", number, activations=policy, context=context, budget=budget, steps=steps)

    def row(self, policy: str, budgets: list[int]) -> dict[str, Any]:
        """One policy: its longest contexts, and what real runs at them took."""
        line: dict[str, Any] = {"policy": policy}
        for budget in budgets:
            name, found = format_bytes(budget), self.measure("longest", activations=policy, budget=budget)
            first = budget == budgets[0]
            if "context" in found and (first or found["predicted_s"] <= self.asked.patience):
                found |= self.proven(policy, found["context"], budget, self.asked.steps if first else 1)
            line[name] = found
            print(f"{policy} in {name}: {_said(found)}", flush=True)
        return line

    def proven(self, policy: str, context: int, budget: int, steps: int) -> dict[str, Any]:
        """A run inside the budget; and another one for its time, unless the machine is busy."""
        found = self.run(policy, context, budget, steps)
        found["tokens_per_second"] = None
        if self.asked.timings and "error" not in found:
            found["tokens_per_second"] = self.run(policy, context, budget, steps, 1).get("tokens_per_second")
        return found

    def exact(self, context: int) -> dict[str, Any]:
        """Losses of two steps of the exact policies beside the plain job's, and how far they are apart at most."""
        plain = self.run("none", context, None, 2)
        found = {policy: self.run(policy, context, None, 2) for policy in EXACT}
        lines = {policy: {"losses": each.get("losses"), "error": each.get("error")} for policy, each in found.items()}
        for policy, each in found.items():
            pairs = zip(each.get("losses", []), plain["losses"], strict=False)
            lines[policy]["ratio"] = max((abs(ours / theirs - 1) for ours, theirs in pairs), default=None)
        return {"context": context, "none": plain["losses"], **lines}

    def beside(self, context: int) -> dict[str, Any]:
        """MEMO and full recomputation at one context, in turns: tokens a second and peaks."""
        runs: dict[str, list[dict[str, Any]]] = {policy: [] for policy in BESIDE}
        for policy in interleave(BESIDE, self.asked.timings):
            runs[policy].append(self.run(policy, context, None, self.asked.steps, 1 + len(runs[policy])))
        found: dict[str, Any] = {"context": context}
        for policy, each in runs.items():
            good = [run for run in each if "error" not in run]
            found[policy] = {name: median(run[name] for run in good) for name in ("tokens_per_second", "tensor_bytes")}
        return found

    def quality(self, context: int) -> list[dict[str, Any]]:
        """What tuning with fewer tokens is worth: the whole model's held-out loss."""
        lines = []
        for policy, at_random in LOSSY:
            found = self.measure(
                "learn", activations=policy, context=context, steps=self.asked.learn, at_random=at_random
            )
            lines.append({"policy": policy, "at_random": at_random} | found)
            print(f"{policy}{', at random' * at_random}: {found.get('after', found.get('error'))}", flush=True)
        return lines

    def unpadded(self) -> dict[str, Any]:
        """Packed against padded documents of log-normal lengths."""
        drawn = np.random.default_rng(0).lognormal(np.log(MEDIAN_TOKENS), SPREAD, DOCUMENTS)
        lengths = [int(length) for length in np.clip(drawn, 16, MOST_TOKENS)]
        return self.measure("unpadded", lengths=lengths, repetitions=self.asked.timings)


def _said(found: dict[str, Any]) -> str:
    if "context" not in found:
        return found.get("error", "does not fit")
    if "error" in found:
        return f"{found['context']} tokens, failed: {found['error']}"
    text = f"{found['context']:,} tokens, predicted {format_bytes(found['predicted_bytes'])}"
    if "peak_bytes" not in found:
        return text + f" and {found['predicted_s']:.0f} s a step: not run"
    return text + f", measured {format_bytes(found['peak_bytes'])}"


def table(rows: list[dict[str, Any]], budgets: list[int], lossy: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What docs/RESULTS.md shows."""
    after = {line["policy"]: line["after"] for line in lossy if "after" in line and not line["at_random"]}
    lines = []
    for found in rows:
        policy = found["policy"]
        line: dict[str, Any] = {"policy": policy}
        for budget in budgets:
            line |= _cells(format_bytes(budget), found.get(format_bytes(budget), {}))
        spelled = "lemo:keep=0.5" if policy == "lemo" else policy
        exactly = "1, exact" if policy in ("none", *EXACT) else "not measured"
        measured = after.get("none") and spelled in after and spelled != "none"
        line["held-out loss ratio"] = f"{after[spelled] / after['none']:.4f}" if measured else exactly
        lines.append(line)
    return lines


def _cells(name: str, found: dict[str, Any]) -> dict[str, Any]:
    values: list[Any] = ["does not fit", "-", "-", "-"]
    if "context" in found:
        guess = f"{found['context'] / found['predicted_s']:.0f} predicted"
        values = [f"{found['context']:,}", "not run", "-", guess]
    if "error" in found:
        values[1] = "failed"
    elif "peak_bytes" in found:
        off, rate = found["predicted_tensor_bytes"] / found["tensor_bytes"] - 1, found.get("tokens_per_second")
        values[1:] = [format_bytes(found["peak_bytes"]), f"{off:+.1%}", round(rate) if rate else guess]
    return {f"{cell}, {name}": value for cell, value in zip(CELLS, values, strict=True)}


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", default="1GiB,4GiB", help="budgets; in the first every policy runs")
    parser.add_argument("--patience", type=float, default=240, help="predicted seconds of a step that runs in another")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps in the first; one is not timed")
    parser.add_argument("--learn", type=int, default=24, help="optimizer steps of the comparison with LeMo; 0: none")
    parser.add_argument("--timings", type=int, default=3, help="repetitions of what is timed; 0: none")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds of one measurement at most")
    parser.add_argument("--only", default="", help="policies whose spelling holds this")
    parser.add_argument("--quick", action="store_true", help="a test of the bench itself")
    add_work(parser)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> Path:
    """Measure, and write bench/results/activations.json after every part."""
    asked = arguments(given)
    if asked.quick:
        asked.memory, asked.learn, asked.only = "600MiB", 0, "memo:alpha=0"
    budgets = [parse_bytes(text) for text in asked.memory.split(",")]
    rows: list[dict[str, Any]] = []
    parts: dict[str, Any] = {"quality": []}
    path = RESULTS / "activations.json"
    with workplace(asked.work) as work:
        bench = Bench(work, asked)
        for policy in (policy for policy in POLICIES if asked.only in policy):
            rows.append(bench.row(policy, budgets))
            path = report(rows, budgets, parts, asked)
        for part in () if asked.quick else ("exact", "quality", "beside", "unpadded"):
            parts[part] = others(bench, part, rows[0].get(format_bytes(budgets[0]), {}))
            path = report(rows, budgets, parts, asked)
    return path


def others(bench: Bench, part: str, first: dict[str, Any]) -> Any:
    """What stands beside the table; `first` is the plain job's longest context, if there is one."""
    asked = bench.asked
    if part == "exact":
        return bench.exact(first.get("context", 512))
    if part == "quality":
        return bench.quality(1024) if asked.learn else []
    if not asked.timings:
        return None
    return bench.unpadded() if part == "unpadded" else [bench.beside(context) for context in (512, 2048, 4096)]


def report(rows: list[dict[str, Any]], budgets: list[int], parts: dict[str, Any], asked: argparse.Namespace) -> Path:
    """Write what was found so far."""
    title = "Longest document that tunes in a budget: SmolLM2-135M, LoRA r=8 in bf16, batch 1"
    lines = table(rows, budgets, parts["quality"])
    return write("activations", title, lines, quiet=True, arguments=told(asked), rows=rows, **parts)


if __name__ == "__main__":
    main()
