"""An engine of bench/decode in our environment, ours or transformers: `python -m bench._decode_run JSON`."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from bench._decode_play import Answer, Tokens, context, play
from bench._served import served_model
from satchel.core.request import Request
from satchel.model.paged import PAGE
from satchel.model.source import find_source, load_tokenizer
from satchel.run.engine import Engine
from satchel.run.memory import install_pool
from satchel.run.scheduler import Limits

STEP = 512  # tokens of a step, as `satchel serve` has it


def ours(case: dict[str, Any]) -> Answer:
    """The engine that serves, on a pool that holds what is asked for."""
    install_pool()
    source = find_source(case.get("folder", case["file"]))
    if "tokenizer.ggml.tokens" in source.metadata:  # llama.cpp reads the vocabulary as well
        load_tokenizer(source)
    model = served_model(source, case["format"])
    longest = context(case["plan"])
    engine = Engine(model, Limits(-(-longest // PAGE) + 1, max(case["plan"]["together"]), STEP, longest))

    def answer(prompts: list[Tokens], count: int) -> list[list[float]]:
        begin, came = time.perf_counter(), {}
        for prompt in prompts:
            came[engine.submit(Request(prompt=tuple(prompt), max_tokens=count))] = []
        while not engine.idle:
            for event in engine.step():
                came[event.id] += [time.perf_counter() - begin] * len(event.tokens)
        return list(came.values())

    return answer


def transformers(case: dict[str, Any]) -> Answer:
    """`generate` in bfloat16 on a copy of the model in its own layout; every token of a batch comes at once."""
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            self.begin, self.came = time.perf_counter(), []

        def __call__(self, input_ids: Any, scores: Any, **rest: Any) -> Any:
            self.came.append(time.perf_counter() - self.begin)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model = AutoModelForCausalLM.from_pretrained(case["folder"], dtype=torch.bfloat16)

    def answer(prompts: list[Tokens], count: int) -> list[list[float]]:
        ids, clock = torch.tensor(prompts), Clock()
        how = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        stops = StoppingCriteriaList([clock])
        model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=stops, **how)
        return [clock.came for _ in prompts]

    return answer


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    print(json.dumps(play({"ours": ours, "transformers": transformers}[asked["engine"]], asked)))
