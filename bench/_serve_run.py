"""One way of serving, in a process of its own: python -m bench._serve_run '{"way": "http", "clients": [1, 8], ...}'."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from bench._serve_load import Trace, clients, figures
from bench._server import Served, free_port, high_water, satchel, served
from satchel.core.request import Request
from satchel.core.serve import ServeJob
from satchel.model.source import demo_path, load_tokenizer
from satchel.run.records import read_records
from satchel.run.serve import open_service

PROMPT, LONG_PROMPT = 128, 1500  # tokens
MEMORY, CONTEXT, BATCH = "1536MiB", 2048, 32
ROUNDS = {1: 2}  # requests of each client, where it is not one
WARM = 9  # requests before anything is measured
CORES = os.cpu_count() or 1
Tokens = list[list[int]]


def main(case: dict[str, Any]) -> dict[str, Any]:
    """The figures of one case."""
    ways = {"http": http, "engine": engine, "transformers": transformers, "llama": llama}
    return ways[case["way"]](case)


def prompts(count: int, length: int, seed: int) -> Tokens:
    """Pieces of Python's reference that begin at different places."""
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


def body(prompt: list[int], answer: int, way: str = "http") -> dict[str, Any]:
    """A request that does not end before its time; llama.cpp's takes a text, and no word for it."""
    asked = {"max_tokens": answer, "temperature": 0}
    if way == "llama":
        tokenizer = load_tokenizer("demo")
        return asked | {"prompt": tokenizer.decode(prompt), "logit_bias": {str(i): -100 for i in tokenizer.stop_ids}}
    return asked | {"prompt": prompt, "ignore_eos": True}


def http(case: dict[str, Any]) -> dict[str, Any]:
    """Through `satchel serve`; then eight answers that grow while another client sends long prompts."""
    options = {"memory": MEMORY, "context": CONTEXT, "batch": BATCH, "step_tokens": case["step_tokens"]}
    with served(satchel(case["model"], format=case["format"], **options)) as server:
        warm_up(server.port)
        levels = levels_of(case, lambda mine: clients(server.port, mine), server)
        return {"levels": levels, "mixed": mixed(case, server) if case["mixed"] else None}


def levels_of(case: dict[str, Any], ask: Callable[..., Any], server: Served) -> dict[int, dict[str, float]]:
    """The figures for each number of clients."""
    found = {}
    for count, mine in plan(case).items():
        bodies = [[body(prompt, case["answer"], case["way"]) for prompt in each] for each in mine]
        found[count] = figures(asyncio.run(ask(bodies)), server.peak_bytes)
    return found


def mixed(case: dict[str, Any], server: Served) -> dict[str, float]:
    """Of eight answers that grow while another client sends long prompts, one after another."""
    short = [[body(prompt, 2 * case["answer"])] for prompt in prompts(8, PROMPT, 21)]
    long = [[body(prompt, 1) for prompt in prompts(case["long"], LONG_PROMPT, 5)]]
    traces = asyncio.run(clients(server.port, short + long))
    return figures([trace for trace in traces if trace.tokens > 1], server.peak_bytes)


def llama(case: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp's server, as llama-cpp-python has it, on the file that the demo model is: 4 bits a weight."""
    port = free_port()
    options = {"model": str(demo_path()), "host": "127.0.0.1", "port": port, "n_ctx": CONTEXT, "n_batch": 512}
    options |= {"n_threads": CORES, "n_threads_batch": CORES, "interrupt_requests": False, "verbose": False}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with served([case["python"], "-m", "llama_cpp.server", *words], port) as server:
        warm = [[body(prompt, 4, "llama") for prompt in prompts(2, PROMPT, 90)]]
        asyncio.run(clients(server.port, warm))
        return {"levels": levels_of(case, lambda mine: clients(server.port, mine), server)}


def warm_up(port: int) -> None:
    """Sizes of steps that were not seen before cost a CPU time of their own."""
    asyncio.run(clients(port, [[body(prompt, 4)] for prompt in prompts(WARM, PROMPT, 90)]))


def engine(case: dict[str, Any]) -> dict[str, Any]:
    """The same engine and limits, in a loop that does nothing else."""
    how = {"memory": MEMORY, "context": CONTEXT, "batch": BATCH, "step_tokens": case["step_tokens"]}
    runner = open_service(ServeJob(model=case["model"], format=case["format"], **how)).engine

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
    return {
        "levels": {count: figures(run(mine, case["answer"]), high_water("self")) for count, mine in plan(case).items()}
    }


def transformers(case: dict[str, Any]) -> dict[str, Any]:
    """`generate` on one batch of all clients; every token of the batch comes at once."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            self.came_s: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **rest: Any) -> Any:
            self.came_s.append(time.monotonic())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.bfloat16)

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
    return {
        "levels": {count: figures(run(mine, case["answer"]), high_water("self")) for count, mine in plan(case).items()}
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
