"""The OpenAI server against the bare engine, transformers and llama.cpp: `satchel bench serve`; --help tells the rest.

SmolLM2-135M, prompts of 128 tokens without a common beginning, greedy answers of 32 tokens that end no earlier. Clients
send one request after another, all at once at the start. Each way in processes of its own, in rounds:

    http           satchel serve, and clients in another process, streaming; with weights in bf16, and in 4 bits
    engine         the same engine and limits in a loop of its own: what is lost on the way through HTTP
    transformers   generate() on one batch of all clients, without a server: nobody waits for the network or the others
    llama.cpp      the server of llama-cpp-python on the demo model's own file, 4 bits a weight; it answers one client
                   after another. --llama-python names a Python that has llama-cpp-python[server]

Then eight clients stream while one sends prompts of 1,500 tokens, with prompts cut into parts of 512 tokens or not at
all. What PyPI's llama-cpp-python builds with gcc 12 ends in ldtilecfg on CPUs with AMX (ggml-org/llama.cpp#20824): its
kernels need a memory barrier there, or to be left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import satchel
from bench._harness import interleave, measure, median, write
from satchel.model.source import find_source

CLIENTS = (1, 8, 32)
REPETITIONS = 3
ANSWER = 32  # tokens
PARTS, WHOLE = 512, 4096  # tokens that a step sees at most
FIGURES = ("first token, ms", "between tokens, ms", "p99, ms", "tokens/s", "resident, MiB")
Run = dict[str, Any]


def main(given: list[str] | None = None) -> None:
    """Run everything that --work does not have yet, and write bench/results/serve.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few tokens, written nowhere")
    parser.add_argument("--llama-python", default="", help="a Python that has llama-cpp-python[server]")
    parser.add_argument("--work", default="", help="folder for what was measured; the same call goes on with it")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    asked = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(asked.work or folder)
        cases = prepare(work, asked)
        names = interleave(cases, 1 if asked.quick else asked.repetitions)
        runs = [run(work, name, cases[name], number) for number, name in enumerate(names)]
    clients = CLIENTS[:2] if asked.quick else CLIENTS
    table = rows(runs, list(cases), clients) + mixed_rows(runs)
    print(*table, sep="\n")
    if not asked.quick:
        write(
            "serve", f"Serving SmolLM2-135M: 128 tokens in, {ANSWER} out, streaming", table, runs=runs, lost=lost(table)
        )


def prepare(work: Path, asked: argparse.Namespace) -> dict[str, Run]:
    """The cases by name; the model is written as a folder that all can read."""
    model = work / "model"
    if not model.exists():
        satchel.save(satchel.load("demo"), model, tokenizer_from=find_source("demo"))
    size = (
        {"clients": CLIENTS[:2], "answer": 8, "long": 1}
        if asked.quick
        else {"clients": CLIENTS, "answer": ANSWER, "long": 4}
    )
    plain = {"model": str(model), "format": "auto", "step_tokens": PARTS, "mixed": False} | size
    cases = {
        "http": plain | {"way": "http", "mixed": True},
        "http, 4 bits": plain | {"way": "http", "format": "int4"},
        "http, whole prompts": plain | {"way": "http", "step_tokens": WHOLE, "clients": [], "mixed": True},
        "engine": plain | {"way": "engine"},
        "transformers": plain | {"way": "transformers"},
    }
    if asked.llama_python:
        cases["llama.cpp, 4 bits"] = plain | {"way": "llama", "python": asked.llama_python}
    return cases


def run(work: Path, name: str, case: Run, number: int) -> Run:
    """One measurement, in a process of its own, unless the folder has it."""
    file = work / f"{number:02}-{name.replace(', ', '-').replace(' ', '-')}.json"
    if file.exists():
        return json.loads(file.read_text())
    found = {"case": name} | measure("bench._serve_run", case)
    print(found, flush=True)
    if "error" not in found:
        file.write_text(json.dumps(found))
    return found


def rows(runs: list[Run], names: list[str], clients: tuple[int, ...]) -> list[Run]:
    """Medians over the rounds, by way and number of clients."""
    table = []
    for count in clients:
        for name in names:
            found = [
                run["levels"][str(count)] for run in runs if run["case"] == name and str(count) in run.get("levels", ())
            ]
            if found or all("error" in run for run in runs if run["case"] == name):
                table.append({"clients": count, "way": name} | medians(found))
    return table


def mixed_rows(runs: list[Run]) -> list[Run]:
    """What long prompts do to the others' answers."""
    table = []
    for name, said in (("http", f"http, parts of {PARTS}"), ("http, whole prompts", "http, whole prompts")):
        found = [run["mixed"] for run in runs if run["case"] == name and run.get("mixed")]
        table.append({"clients": "8, and long prompts", "way": said} | medians(found))
    return table


def medians(found: list[dict[str, float]]) -> Run:
    """Of each figure; nothing where no run came through."""
    return {figure: round(median(one[figure] for one in found), 2) if found else "failed" for figure in FIGURES}


def lost(table: list[Run]) -> dict[str, float]:
    """Share of the engine's throughput that is lost through HTTP, by number of clients."""
    speed = {(row["clients"], row["way"]): row["tokens/s"] for row in table}
    pairs = [(count, speed.get((count, "http")), speed.get((count, "engine"))) for count in CLIENTS]
    return {str(c): 1 - http / bare for c, http, bare in pairs if isinstance(http, float) and isinstance(bare, float)}


if __name__ == "__main__":
    main()
