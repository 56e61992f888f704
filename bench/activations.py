"""The longest context that tunes in a budget, by what is kept: `satchel bench activations`, or `--help`.

SmolLM2-135M-Instruct with LoRA of rank 8 in bf16, one document a step. The longest context is found by rehearsal, among
the sizes that batches have. In the smaller budget every policy then runs at its longest context, in a process that may
not hold more; in the larger one those whose step is predicted to end in time. Beside it: exact policies against the
plain job; MEMO against full recomputation at one context; LeMo against the plain job and against dropping at random;
packed documents against padded ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from bench._activations_run import endless, job_of
from bench._harness import interleave, measure, median, write
from satchel.core.units import format_bytes, parse_bytes
from satchel.model.batch import whole
from satchel.run.device import device
from satchel.run.memory import install_pool
from satchel.run.rung import Extent, Pricing, Rung
from satchel.run.tune import tune  # noqa: F401 - a process is priced that holds what a job's holds
from satchel.run.warm import warm_up

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
LONGEST = 1 << 19  # no context beyond is looked for
TIMEOUT_S = 1800
DOCUMENTS, MEDIAN_TOKENS, SPREAD, MOST_TOKENS = 12, 90, 0.9, 512  # of the documents that are packed and padded


def contexts() -> list[int]:
    """The sizes that batches have."""
    sizes = [64]
    while sizes[-1] < LONGEST:
        sizes.append(whole(sizes[-1] + 1))
    return sizes


def longest(policy: str, budget: int) -> Rung | None:
    """The rung of the longest context that fits; None if none does."""
    rungs: dict[int, Rung] = {}

    def fits(context: int) -> bool:
        job = job_of(policy, context)
        rungs[context] = Pricing(job, endless(), device("cpu"), budget, Extent(), {}).rung(job)
        return rungs[context].fits

    sizes, low, high = contexts(), -1, len(contexts())
    while high - low > 1:  # sizes[low] fits, sizes[high] does not
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return rungs[sizes[low]] if low >= 0 else None


def row(policy: str, budgets: list[int], patience_s: float, steps: int) -> dict[str, Any]:
    """One policy: its longest contexts, and what real runs at them took."""
    line: dict[str, Any] = {"policy": policy}
    for budget in budgets:
        name, rung = format_bytes(budget), longest(policy, budget)
        if rung is None:
            line[name] = "does not fit"
            continue
        context = rung.job.context
        line[name] = {"context": context, "predicted_bytes": rung.peak_bytes, "predicted_s": rung.seconds_per_step}
        line[name]["second_tier_bytes"] = rung.rehearsal.second_tier_bytes
        first = budget == budgets[0]
        if first or rung.seconds_per_step <= patience_s:
            line[name] |= measure(RUN, _run(policy, context, budget, steps if first else 1), max(patience_s, TIMEOUT_S))
        print(f"{policy} in {name}: {_said(line[name])}", flush=True)
    return line


def _run(policy: str, context: int, budget: int | None, steps: int) -> dict[str, Any]:
    return {"what": "run", "activations": policy, "context": context, "budget": budget, "steps": steps}


def _said(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"{found['context']} tokens, failed: {found['error']}"
    text = f"{found['context']:,} tokens, predicted {format_bytes(found['predicted_bytes'])}"
    if "peak_bytes" not in found:
        return text + f" and {found['predicted_s']:.0f} s a step: not run"
    return text + f", measured {format_bytes(found['peak_bytes'])}, {found['tokens_per_second']:.0f} tokens/s"


def exact(context: int) -> dict[str, Any]:
    """Losses of two steps of the exact policies beside the plain job's, and how far they are apart at most."""
    plain = measure(RUN, _run("none", context, None, 2), TIMEOUT_S)
    found = {policy: measure(RUN, _run(policy, context, None, 2), TIMEOUT_S) for policy in EXACT}
    lines = {policy: {"losses": each.get("losses"), "error": each.get("error")} for policy, each in found.items()}
    for policy, each in found.items():
        pairs = zip(each.get("losses", []), plain["losses"], strict=False)
        lines[policy]["ratio"] = max((abs(ours / theirs - 1) for ours, theirs in pairs), default=None)
    return {"context": context, "none": plain["losses"], **lines}


def beside(context: int, repetitions: int, steps: int) -> dict[str, Any]:
    """MEMO and full recomputation at one context, in turns: tokens a second and peaks."""
    policies = ("full", "memo:alpha=0", "memo:alpha=1")
    runs: dict[str, list[dict[str, Any]]] = {policy: [] for policy in policies}
    for policy in interleave(policies, repetitions):
        runs[policy].append(measure(RUN, _run(policy, context, None, steps), TIMEOUT_S))
    found: dict[str, Any] = {"context": context}
    for policy, each in runs.items():
        good = [run for run in each if "error" not in run]
        found[policy] = {name: median(run[name] for run in good) for name in ("tokens_per_second", "tensor_bytes")}
    return found


def quality(context: int, steps: int) -> list[dict[str, Any]]:
    """What tuning with fewer tokens is worth: the whole model's held-out loss."""
    lines = []
    for policy, at_random in LOSSY:
        argument = {"what": "learn", "activations": policy, "context": context, "steps": steps, "at_random": at_random}
        lines.append({"policy": policy, "at_random": at_random} | measure(RUN, argument, TIMEOUT_S))
        print(f"{policy}{', at random' * at_random}: {lines[-1].get('after', lines[-1].get('error'))}", flush=True)
    return lines


def unpadded(repetitions: int) -> dict[str, Any]:
    """Packed against padded documents of log-normal lengths."""
    drawn = np.random.default_rng(0).lognormal(np.log(MEDIAN_TOKENS), SPREAD, DOCUMENTS)
    lengths = [int(length) for length in np.clip(drawn, 16, MOST_TOKENS)]
    return measure(RUN, {"what": "unpadded", "lengths": lengths, "repetitions": repetitions}, TIMEOUT_S)


def table(rows: list[dict[str, Any]], budgets: list[int], lossy: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the README shows."""
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


def _cells(name: str, found: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(found, str) or not found:
        return {f"longest context, {name}": found or "-", f"peak, {name}": "-", f"tokens/s, {name}": "-"}
    rate = found.get("tokens_per_second")
    failed = "failed" if "error" in found else "not run"
    return {
        f"longest context, {name}": f"{found['context']:,}",
        f"peak, {name}": format_bytes(found["peak_bytes"]) if rate else failed,
        f"tokens/s, {name}": round(rate) if rate else "-",
    }


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", default="1GiB,4GiB", help="budgets; in the first every policy runs")
    parser.add_argument("--patience", type=float, default=240, help="predicted seconds of a step that runs in another")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps in the first; one is not timed")
    parser.add_argument("--learn", type=int, default=24, help="optimizer steps of the comparison with LeMo; 0: none")
    parser.add_argument("--only", default="", help="policies whose spelling holds this")
    parser.add_argument("--quick", action="store_true", help="a test of the bench itself")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> Path:
    """Measure, and write bench/results/activations.json after every part."""
    asked = arguments(given)
    if asked.quick:
        asked.memory, asked.learn, asked.only = "600MiB", 0, "memo:alpha=0"
    install_pool()
    warm_up(job_of("none", 1024), endless(), "cpu")
    budgets = [parse_bytes(text) for text in asked.memory.split(",")]
    rows: list[dict[str, Any]] = []
    parts: dict[str, Any] = {"quality": []}
    path = None
    for policy in (policy for policy in POLICIES if asked.only in policy):
        rows.append(row(policy, budgets, asked.patience, asked.steps))
        path = report(rows, budgets, parts, asked)
    if not asked.quick:
        first = rows[0].get(format_bytes(budgets[0]))
        parts["exact"] = exact(first["context"] if isinstance(first, dict) else 512)
        parts["beside"] = [beside(context, 3, asked.steps) for context in (512, 2048, 4096)]
        parts["unpadded"] = unpadded(3)
        parts["quality"] = quality(1024, asked.learn) if asked.learn else []
    return report(rows, budgets, parts, asked) if rows else path


def report(rows: list[dict[str, Any]], budgets: list[int], parts: dict[str, Any], asked: argparse.Namespace) -> Path:
    """Write what was found so far."""
    title = "Longest document that tunes in a budget: SmolLM2-135M, LoRA r=8 in bf16, batch 1"
    lines = table(rows, budgets, parts["quality"])
    return write("activations", title, lines, quiet=True, arguments=vars(asked), rows=rows, **parts)


if __name__ == "__main__":
    main()
