"""One way of decoding on some kinds of prompts, in a process of its own."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from bench._served import served_model
from satchel.core.request import Request, Sampling
from satchel.model.decoder import Decoder
from satchel.model.source import find_source, load_tokenizer
from satchel.run.engine import Engine
from satchel.run.records import read_records
from satchel.run.scheduler import Limits

CODE = '''def total(prices, taxes):
    """The sum of prices after taxes."""
    result = 0
    for price, tax in zip(prices, taxes):
        result += price * (1 + tax)
    return result


def cheapest(prices, taxes):
    """The lowest price after taxes."""
    return min(price * (1 + tax) for price, tax in zip(prices, taxes))
'''
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a fox and a well.",
    "How do I make a cup of green tea?",
)


def main(case: dict[str, Any]) -> dict[str, Any]:
    """CPU and wall seconds a token of each kind, and what became of the guesses."""
    tokenizer, model = load_tokenizer("demo"), served_model(find_source("demo"))
    how = {"decoding": case["decoding"], "skip": case.get("skip", "none")}
    return {"runs": [answer(model, tokenizer, kind, how) for kind in case["kinds"]]}


def answer(model: Decoder, tokenizer: Any, kind: dict[str, Any], methods: dict[str, str]) -> dict[str, Any]:
    """One kind, by an engine that has seen none of it."""
    prompts = {"edit": edits, "question": questions, "reference": reference}[kind["prompts"]](tokenizer)
    limits = Limits(blocks=64 * len(prompts), batch=kind["batch"], step_tokens=512, context=1024)
    engine = Engine(model, limits, tokenizer, **methods)
    how = Sampling(temperature=kind["temperature"], seed=1)
    run(engine, prompts[:1], how, 8)  # kernels for the sizes of steps
    before = engine.stats()
    cpu, wall = time.process_time(), time.monotonic()
    said = run(engine, prompts, how, kind["tokens"])
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    count = {name: value - before[name] for name, value in engine.stats().items()}
    return {
        "cpu_ms": 1e3 * cpu / count["answered"],
        "wall_ms": 1e3 * wall / count["answered"],
        "tokens": count["answered"],
        "steps": count["steps"],
        "guessed": count["guessed"],
        "right": count["right"],
        "drafts": count["drafts"],
        "left_out": count["skipped"] / (count["answered"] * model.config.layers),
        "said": said,
    }


def run(engine: Engine, prompts: list[list[int]], how: Sampling, tokens: int) -> list[list[int]]:
    """The answers' tokens."""
    ids = [engine.submit(Request(prompt=tuple(prompt), max_tokens=tokens, sampling=how)) for prompt in prompts]
    said: dict[int, list[int]] = {id: [] for id in ids}
    for event in engine.run():
        said[event.id] += event.tokens
    return list(said.values())


def edits(tokenizer: Any) -> list[list[int]]:
    """Code that is to be written again with a small change."""
    names = ("price", "prices", "tax", "total")
    asked = [f"Rename '{name}' to 'new_{name}' in this code and write all of it:\n\n{CODE}" for name in names]
    return [conversation(tokenizer, question) for question in asked]


def questions(tokenizer: Any) -> list[list[int]]:
    """What one asks a chat model."""
    return [conversation(tokenizer, question) for question in QUESTIONS]


def reference(tokenizer: Any) -> list[list[int]]:
    """Pieces of Python's reference, to be gone on with; not those that the small model was tuned from."""
    text = "\n".join(record["text"] for _, record in read_records("demo", lambda problem: None))
    tokens = tokenizer.encode(text[-8000:])
    return [tokens[at : at + 128] for at in range(0, 512, 128)]


def conversation(tokenizer: Any, question: str) -> list[int]:
    """The tokens that open an answer."""
    return tokenizer.encode(tokenizer.chat([{"role": "user", "content": question}], generate=True))


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
