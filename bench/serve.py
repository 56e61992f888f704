"""The OpenAI server against the bare engine and transformers: `satchel bench serve`, or `python -m bench.serve --help`.

SmolLM2-135M in bf16, prompts of 128 tokens without a common beginning, greedy answers of 48 tokens that end no earlier.
Clients send one request after another, all at once at the start. Three ways, each in processes of its own, in rounds:

    http           satchel serve, and clients in another process, streaming
    engine         the same engine and limits in a loop of its own: what is lost on the way through HTTP
    transformers   generate() on one batch of all clients, without a server: nobody waits for the network or the others

Then eight clients stream while one sends prompts of 1,500 tokens, with prompts cut into parts of a step or not at all.
llama.cpp is missing here: llama-cpp-python has no wheel, and what it builds with gcc 12 ends in ldtilecfg on this CPU
(ggml-org/llama.cpp#20824).
"""

from __future__ import annotations

import argparse
from typing import Any

from bench._harness import interleave, measure, median, write

CLIENTS = (1, 8, 32)
REPETITIONS = 3
MIXED = {"parts of 128": 128, "parts of 512": 512, "whole prompts": 4096}  # tokens that a step sees at most
FIGURES = ("first token, ms", "between tokens, ms", "p99, ms", "tokens/s", "resident, MiB")


def main() -> None:
    """Run everything, and write bench/results/serve.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few tokens, written nowhere")
    quick = parser.parse_args().quick
    ways = ["http", "engine", "transformers"]
    clients, repetitions = (CLIENTS[:2], 1) if quick else (CLIENTS, REPETITIONS)
    cases = [{"way": way, "clients": clients, "quick": quick} for way in ways]
    cases += [{"way": "mixed", "step_tokens": size, "quick": quick} for size in MIXED.values()]
    runs = []
    for case in interleave(cases, repetitions):
        found = measure("bench._serve_run", case)
        print(case, found, flush=True)
        runs.append(case | found)
    table = rows(runs, ways, clients) + mixed_rows(runs)
    for row in table:
        print(row)
    if not quick:
        write("serve", "Serving SmolLM2-135M: 128 tokens in, 48 out, streaming", table, runs=runs, lost=lost(table))


def rows(runs: list[dict[str, Any]], ways: list[str], clients: tuple[int, ...]) -> list[dict[str, Any]]:
    """Medians over the rounds, by way and number of clients."""
    table = []
    for count in clients:
        for way in ways:
            found = [run["levels"][str(count)] for run in runs if run["way"] == way and "levels" in run]
            table.append({"clients": count, "way": way} | medians(found))
    return table


def mixed_rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What long prompts do to the others' answers."""
    table = []
    for name, size in MIXED.items():
        found = [run["mixed"] for run in runs if run.get("step_tokens") == size and "mixed" in run]
        table.append({"clients": "8, and long prompts", "way": f"http, {name}"} | medians(found))
    return table


def medians(found: list[dict[str, float]]) -> dict[str, Any]:
    """Of each figure; nothing where no run came through."""
    return {figure: round(median(one[figure] for one in found), 2) if found else "failed" for figure in FIGURES}


def lost(table: list[dict[str, Any]]) -> dict[str, float]:
    """Share of the engine's throughput that is lost through HTTP, by number of clients."""
    speed = {(row["clients"], row["way"]): row["tokens/s"] for row in table}
    pairs = [(count, speed.get((count, "http")), speed.get((count, "engine"))) for count in CLIENTS]
    return {str(c): 1 - http / bare for c, http, bare in pairs if isinstance(http, float) and isinstance(bare, float)}


if __name__ == "__main__":
    main()
