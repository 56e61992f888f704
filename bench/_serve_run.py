"""One way of serving, in a process of its own: python -m bench._serve_run '{"way": "http", "clients": [1, 8], ...}'."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench._serve_load import Trace, clients, figures

PROMPT, ANSWER, LONG_PROMPT = 128, 48, 1500  # tokens
MEMORY, CONTEXT, BATCH = "1536MiB", 2048, 32
ROUNDS = {1: 2}  # requests of each client, where it is not one
WARM = 9  # requests before anything is measured
Tokens = list[list[int]]


def main(case: dict[str, Any]) -> dict[str, Any]:
    """The figures of one case."""
    ways = {"http": http, "engine": engine, "transformers": transformers, "mixed": mixed}
    return ways[case["way"]](case)


def prompts(count: int, length: int, seed: int) -> Tokens:
    """Pieces of Python's reference that begin at different places."""
    from satchel.model.source import load_tokenizer
    from satchel.run.records import read_records

    text = "\n".join(record["text"] for _, record in read_records("demo", lambda problem: None))
    tokens = load_tokenizer("demo").encode(text[: 8 * (seed * 37 + count * length)])
    return [tokens[at : at + length] for at in range(seed * 37, seed * 37 + count * length, length)]


def plan(case: dict[str, Any]) -> dict[int, list[Tokens]]:
    """For each number of clients, the prompts that each client sends."""
    found, seed = {}, 1
    for count in case["clients"]:
        each = ROUNDS.get(count, 1)
        pool = prompts(count * each, PROMPT, seed)
        found[count] = [pool[client * each : (client + 1) * each] for client in range(count)]
        seed += 1
    return found


def body(prompt: list[int], answer: int) -> dict[str, Any]:
    """A request that does not end before its time."""
    return {"prompt": prompt, "max_tokens": answer, "temperature": 0, "ignore_eos": True}


def http(case: dict[str, Any]) -> dict[str, Any]:
    """Through `satchel serve`."""
    answer = 8 if case["quick"] else ANSWER
    with served(512) as (port, process):
        warm_up(port)
        levels = {}
        for count, mine in plan(case).items():
            traces = asyncio.run(clients(port, [[body(prompt, answer) for prompt in each] for each in mine]))
            levels[count] = figures(traces, high_water(process.pid))
    return {"levels": levels}


def mixed(case: dict[str, Any]) -> dict[str, Any]:
    """Eight answers that grow while another client sends long prompts, one after another."""
    answer = 16 if case["quick"] else 2 * ANSWER
    with served(case["step_tokens"]) as (port, process):
        warm_up(port)
        short = [[body(prompt, answer)] for prompt in prompts(8, PROMPT, 1)]
        long = [[body(prompt, 1) for prompt in prompts(4, LONG_PROMPT, 5)]]
        traces = asyncio.run(clients(port, short + long))
        return {"mixed": figures([trace for trace in traces if trace.tokens > 1], high_water(process.pid))}


@contextlib.contextmanager
def served(step_tokens: int) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Port and process of a server that is ready."""
    settings = {"memory": MEMORY, "context": CONTEXT, "batch": BATCH, "step-tokens": step_tokens, "port": 0}
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "satchel", "serve", "--model", "demo", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if " is served at " in line:
                break
        else:
            raise RuntimeError((process.stderr.read() if process.stderr else "").strip() or "the server did not start")
        yield int(lines[-1].partition(" is served at ")[2].partition(";")[0].rpartition(":")[2]), process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def warm_up(port: int) -> None:
    """Sizes of steps that were not seen before cost a CPU time of their own."""
    asyncio.run(clients(port, [[body(prompt, 4)] for prompt in prompts(WARM, PROMPT, 90)]))


def engine(case: dict[str, Any]) -> dict[str, Any]:
    """The same engine and limits, in a loop that does nothing else."""
    from satchel.core.request import Request
    from satchel.core.serve import ServeJob
    from satchel.run.serve import open_service

    job = ServeJob(model="demo", memory=MEMORY, context=CONTEXT, batch=BATCH, step_tokens=512)
    runner = open_service(job).engine
    answer = 8 if case["quick"] else ANSWER

    def run(mine: list[Tokens], answer: int) -> list[Trace]:
        left, traces, open_ones = [list(each) for each in mine], [], {}

        def ask(client: int) -> None:
            if left[client]:
                trace = Trace(time.monotonic())
                id = runner.submit(Request(prompt=tuple(left[client].pop(0)), max_tokens=answer))
                open_ones[id] = client, trace
                traces.append(trace)

        for client in range(len(mine)):
            ask(client)
        while open_ones:
            for event in runner.step():
                client, trace = open_ones[event.id]
                if event.text or event.finish:
                    trace.came_s.append(time.monotonic())
                if event.usage:
                    trace.tokens = event.usage.completion_tokens
                    del open_ones[event.id]
                    ask(client)
        return traces

    run([[prompt] for prompt in prompts(WARM, PROMPT, 90)], 4)
    return {"levels": {count: figures(run(mine, answer), high_water("self")) for count, mine in plan(case).items()}}


def transformers(case: dict[str, Any]) -> dict[str, Any]:
    """`generate` on one batch of all clients; every token of the batch comes at once."""
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            self.came_s: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **rest: Any) -> Any:
            self.came_s.append(time.monotonic())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with tempfile.TemporaryDirectory() as folder:
        save = "import sys, satchel; satchel.save(satchel.load('demo'), sys.argv[1])"  # apart: it is not their memory
        subprocess.run([sys.executable, "-c", save, f"{folder}/m"], check=True)
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/m", dtype=torch.bfloat16)

    def run(mine: list[Tokens], answer: int) -> list[Trace]:
        traces = []
        for batch in zip(*mine, strict=True):
            clock, asked_s = Clock(), time.monotonic()
            ids = torch.tensor(batch)
            criteria = StoppingCriteriaList([clock])
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=answer,
                min_new_tokens=answer,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=criteria,
            )
            traces += [Trace(asked_s, clock.came_s, answer) for _ in batch]
        return traces

    run([[prompt] for prompt in prompts(2, PROMPT, 90)], 4)
    answer = 8 if case["quick"] else ANSWER
    return {"levels": {count: figures(run(mine, answer), high_water("self")) for count, mine in plan(case).items()}}


def high_water(pid: int | str) -> int:
    """The most bytes that a process ever held."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if "VmHWM" in line)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
