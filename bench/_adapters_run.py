"""One way of serving many adapters, in a process of its own: python -m bench._adapters_run '{"way": "mixed", ...}'.

mixed      one engine, every request's adapter beside the others in one batch
merged     the same engine without adapters: each one is merged into the weights before its requests and taken out after
logits     how far the engine's logits of a mixed batch are from PEFT's, which runs each request alone
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench._serve_run import prompts
from satchel.adapt import read_peft
from satchel.core.request import Request
from satchel.core.serve import ServeJob
from satchel.model.bank import LowRank
from satchel.model.decoder import Decoder
from satchel.model.linear import linears
from satchel.model.load import load
from satchel.model.paged import PAGE
from satchel.model.source import find_source
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits
from satchel.run.serve import open_service

PROMPT, ANSWER = 64, 32  # tokens
CONTEXT = 208  # so that the pool, which never holds more than 32 answers of this, is a little small for what is asked


def main(case: dict[str, Any]) -> dict[str, Any]:
    """The figures of one way."""
    return {"mixed": mixed, "merged": merged, "logits": logits}[case["way"]](case)


def requests(case: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Adapter and prompt of each request: every one of the adapters in turn, so that no two neighbours share one."""
    names = case["used"]
    found = prompts(case["requests"], PROMPT, 3)
    return [(names[number % len(names)], tuple(prompt)) for number, prompt in enumerate(found)]


def mixed(case: dict[str, Any]) -> dict[str, Any]:
    """All registered, those that are asked for in the pool, which is full at its peak."""
    job = ServeJob(model=case["model"], memory=case["memory"], context=CONTEXT, batch=32, adapters=case["home"])
    begun = time.monotonic()
    engine = open_service(job).engine
    started_s = time.monotonic() - begun
    warm = [Request(prompt=(5, 6, 7) * 10, max_tokens=4, adapter=name) for name, _ in requests(case)[:9]]
    _run(engine, warm)
    wanted = [Request(prompt=prompt, max_tokens=ANSWER, adapter=name) for name, prompt in requests(case)]
    seconds, use, most = _run(engine, wanted)
    engine.check_integrity()
    stats = engine.stats()
    return {
        "seconds": seconds,
        "tokens": len(wanted) * ANSWER,
        "start_s": started_s,
        "registered": stats["adapters"],
        "loads": stats["adapter_loads"],
        "use": use,
        "together": most,
        "pool_bytes": stats["blocks"] * stats["block_bytes"],
    }


def _run(engine: Engine, wanted: list[Request]) -> tuple[float, dict[str, float], int]:
    """Seconds; the pool's fullest moment; the most adapters that were in one step."""
    for request in wanted:
        engine.submit(request)
    use, most, begun = {"share": 0.0}, 0, time.monotonic()
    while not engine.idle:
        engine.step()
        use = max(use, _use(engine), key=lambda one: one["share"])
        most = max(most, len({s.adapter for s in engine.scheduler.running}))
    return time.monotonic() - begun, use, most


def _use(engine: Engine) -> dict[str, float]:
    """Shares of the pool: blocks that somebody holds; what of them are adapters' numbers and tokens' keys and values;
    what the same adapters would take in slabs of the highest rank."""
    pool, held = engine.pool, engine.scheduler.blocks.held
    each = pool.data[0].numel()
    ranks = [(int(there.stored.rank_P.max()), adapter.blocks) for adapter, there in engine.adapters.resident.items()]
    numbers = sum(_numbers(there.stored, engine) for there in engine.adapters.resident.values())
    tokens = sum(s.cached for s in engine.scheduler.running)
    largest = max((rank for rank, _ in ranks), default=0)
    slabs = sum(-(-blocks * largest // max(rank, 1)) for rank, blocks in ranks)
    return {
        "share": held / pool.blocks,
        "filled": (numbers / each + tokens / PAGE) / max(held, 1),
        "adapters": sum(blocks for _, blocks in ranks) / pool.blocks,
        "slabs": slabs / max(sum(blocks for _, blocks in ranks), 1),
    }


def _numbers(stored: Any, engine: Engine) -> int:
    shapes = torch.tensor(list(engine.adapters.bank.shapes.values())).sum(1)
    return int((stored.rank_P * shapes).sum())


def merged(case: dict[str, Any]) -> dict[str, Any]:
    """Requests in the order of their arrival, each with its adapter's weights in the model's own."""
    model = load(find_source(case["model"]), torch.bfloat16)
    lows = {name: _lows(model, Path(case["home"]) / name) for name in case["used"]}
    base = {path: module.weight.detach().clone() for path, module in linears(model).items()}
    engine = Engine(model, Limits(blocks=256, batch=32, step_tokens=512, context=512))
    _run(engine, [Request(prompt=(5, 6, 7) * 10, max_tokens=4)])
    wanted = requests(case)[: case["merged_requests"]]
    begun, switching = time.monotonic(), 0.0
    for name, prompt in wanted:
        at = time.monotonic()
        _merge(model, base, lows[name])
        switching += time.monotonic() - at
        engine.scheduler.blocks.forget_all()
        _run(engine, [Request(prompt=prompt, max_tokens=ANSWER)])
    return {"seconds": time.monotonic() - begun, "tokens": len(wanted) * ANSWER, "switching_s": switching}


def _lows(model: Decoder, folder: Path) -> dict[str, LowRank]:
    return {path: LowRank(low.A_RI, low.B_OR, low.method.scale) for path, low in read_peft(model, folder).items()}


@torch.no_grad()
def _merge(model: Decoder, base: dict[str, torch.Tensor], lows: dict[str, LowRank]) -> None:
    """The weights of one adapter: W + scale B A, from W as it was; only maps that either changes are written."""
    for path, module in linears(model).items():
        if low := lows.get(path):
            update_OI = low.B_OR.float() @ low.A_RI.float() * low.scale
            module.weight.copy_(base[path].float().add_(update_OI))


def logits(case: dict[str, Any]) -> dict[str, Any]:
    """Over the prompts of all adapters in one batch: the largest difference of a token's log-probability from PEFT's,
    and from the same request alone in the engine."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[case["dtype"]]
    model = load(find_source(case["folder"]), dtype)
    asked = requests(case)[: len(case["used"])]
    together = _logprobs(model, case["home"], asked)
    picked = random.Random(0).sample(range(len(asked)), 8)
    alone = {number: _logprobs(model, case["home"], [asked[number]])[0] for number in picked}
    theirs_of = AutoModelForCausalLM.from_pretrained(case["folder"], dtype=dtype)
    theirs_of = PeftModel.from_pretrained(theirs_of, Path(case["home"]) / asked[0][0], adapter_name=asked[0][0])
    far = []
    for (name, prompt), ours in zip(asked, together, strict=True):
        if name != asked[0][0]:
            theirs_of.load_adapter(Path(case["home"]) / name, adapter_name=name)
        theirs_of.set_adapter(name)
        with torch.no_grad():
            rows_TV = theirs_of(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        theirs = rows_TV[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        far.append(float((theirs - torch.tensor(ours)).abs().max()))
    company = max(abs(a - b) for number in picked for a, b in zip(together[number], alone[number], strict=True))
    return {"from_peft": max(far), "from_alone": company, "adapters": len(asked)}


def _logprobs(model: Decoder, home: str, asked: list[tuple[str, tuple[int, ...]]]) -> list[list[float]]:
    engine = Engine(model, Limits(blocks=600, batch=32, step_tokens=512, context=512))
    for name, _ in asked:
        engine.register(name, Path(home) / name)
    ids = [engine.submit(Request(prompt=p, max_tokens=1, adapter=n, prompt_logprobs=True)) for n, p in asked]
    events = {event.id: event for event in engine.run()}
    return [[one.logprob for one in events[id].prompt_logprobs[1:]] for id in ids]


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
