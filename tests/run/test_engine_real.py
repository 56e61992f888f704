"""The engine on a real model: what it says does not depend on company, cuts, reuse or preemption."""

import pytest
import torch

from satchel.core.request import Request
from satchel.model.load import load
from satchel.model.source import find_source, load_tokenizer
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits

pytestmark = pytest.mark.slow

TEXTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "Once upon a time there was a king who had three daughters. The eldest of them",
)


@pytest.fixture(scope="module")
def demo():
    source = find_source("demo")
    return load(source, torch.float32), load_tokenizer(source)


def said(model, tokenizer, texts, decoding="plain", **limits):
    """The answers' tokens, in the order of the texts, and the engine."""
    limits = {"blocks": 80, "batch": 8, "step_tokens": 128, "context": 256} | limits
    engine = Engine(model, Limits(**limits), tokenizer, decoding=decoding)
    ids = [engine.submit(Request(prompt=tuple(tokenizer.encode(text)), max_tokens=24)) for text in texts]
    events = engine.run()
    engine.check_integrity()
    return [[t for e in events if e.id == id for t in e.tokens] for id in ids], engine


def test_greedy_answers_of_a_real_model_are_the_same_in_any_company(demo):
    alone = [said(*demo, [text])[0][0] for text in TEXTS]
    assert said(*demo, TEXTS)[0] == alone
    assert said(*demo, TEXTS, step_tokens=8)[0] == alone
    assert said(*demo, TEXTS, decoding="lookup")[0] == alone
    again, engine = said(*demo, TEXTS, blocks=7)
    assert again == alone and engine.stats()["preemptions"] > 0
    assert "Paris" in demo[1].decode(alone[0])


def test_its_logits_are_those_of_one_pass_over_everything(demo):
    model, tokenizer = demo
    prompt = tokenizer.encode(TEXTS[3])
    (answer,), _ = said(model, tokenizer, TEXTS[3:])
    with torch.no_grad():
        greedy = model(torch.tensor([[*prompt, *answer]]))[0].argmax(-1).tolist()
    assert greedy[len(prompt) - 1 : -1] == answer
