"""A small model for SmolLM2, made here: its first layers, tuned on what SmolLM2 says, and its acceptance head."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import satchel
from bench._speculate_run import conversation
from satchel.core.book import make
from satchel.core.request import Request, Sampling
from satchel.decode import train_acceptance
from satchel.model.batch import Batch
from satchel.model.decoder import Decoder
from satchel.model.load import load
from satchel.model.source import find_source, load_tokenizer
from satchel.run.engine import Engine
from satchel.run.records import read_records
from satchel.run.scheduler import Limits

PROMPT, SAID = 32, 96  # tokens of a text of the target: what it goes on from, and what it says
ROWS = 8  # texts of a step
QUESTIONS = ("What is {}?", "Explain {} in a few sentences.", "Write a short story about {}.", "How do I use {}?")
LR, WARM = 1e-3, 20  # at its highest, and steps until then


def main(case: dict[str, Any]) -> dict[str, Any]:
    """Write the small model to `folder`; what it took, and how often it is right."""
    begun = time.process_time()
    torch.manual_seed(0)
    source = find_source("demo")
    target = load(source, torch.float32)
    texts = spoken(target, case["texts"])
    small = first_layers(target, case["layers"])
    loss = tune(small, texts, case["steps"])
    learnt = train_acceptance(target, small.eval(), texts, temperature=0.0)
    folder = Path(satchel.save(small.to(torch.bfloat16), case["folder"], tokenizer_from=source))
    learnt.head.save(folder / "acceptance.safetensors")
    return {
        "parameters": small.config.parameters,
        "texts": len(texts),
        "steps": case["steps"],
        "loss": round(loss, 3),
        "right": round(learnt.kept, 3),
        "head": {"loss": round(learnt.loss, 4), "constant": round(learnt.constant, 4)},
        "cpu_s": round(time.process_time() - begun),
    }


def spoken(target: Decoder, count: int) -> list[list[int]]:
    """What the target says after pieces of Python's reference and to questions in turn; every other pair is drawn."""
    tokenizer = load_tokenizer("demo")
    pages = [(place.file, record["text"]) for place, record in read_records("demo", lambda problem: None)]
    tokens = tokenizer.encode("\n".join(text for _, text in pages)[: 12 * count * PROMPT])
    prompts = [tuple(tokens[at : at + PROMPT]) for at in range(0, count * PROMPT, PROMPT)]
    for number in range(1, count, 2):
        about = pages[number % len(pages)][0].partition("/")[2].lower()
        prompts[number] = tuple(conversation(tokenizer, QUESTIONS[number // 2 % len(QUESTIONS)].format(about)))
    engine = Engine(target, Limits(blocks=32 * 13, batch=32, step_tokens=512, context=2 * SAID))
    said: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        how = Sampling(temperature=0.7 * (number // 2 % 2), seed=number)
        said[engine.submit(Request(prompt=prompt, max_tokens=SAID, sampling=how))] = list(prompt)
    for event in engine.run():
        said[event.id] += event.tokens
    return list(said.values())


def first_layers(target: Decoder, layers: int) -> Decoder:
    """The target without its last layers; a copy."""
    small = Decoder(dataclasses.replace(target.config, layers=layers), torch.float32)
    own = small.state_dict()
    small.load_state_dict({name: tensor for name, tensor in target.state_dict().items() if name in own})
    return small


def tune(small: Decoder, texts: list[list[int]], steps: int) -> float:
    """Train all but the embeddings on the texts; the loss of the last tenth of the steps."""
    small.model.embed_tokens.weight.requires_grad_(False)
    trained = [p for p in small.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    objective, losses = make("objective", "causal_lm"), []
    for step in range(steps):
        rows = [texts[(step * ROWS + i) % len(texts)] for i in range(ROWS)]
        tokens_1N = torch.tensor([[token for row in rows for token in row]])
        targets_1N = tokens_1N.roll(-1)
        ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
        targets_1N[0, ends] = -100
        count = tokens_1N.numel() - ROWS
        loss, _ = objective.loss(small, Batch(tokens_1N, targets_1N, tuple(map(len, rows)), count), None)
        optimizer.zero_grad()
        (loss / count).backward()
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / WARM, 1 - step / steps)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()) / count)
    return sum(losses[-max(steps // 10, 1) :]) / max(steps // 10, 1)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
