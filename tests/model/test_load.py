import pytest
import torch

from satchel.model.load import load
from satchel.model.source import find_source, load_tokenizer


@pytest.fixture(scope="module")
def demo():
    return load("demo")


def test_the_demo_model_is_read_from_its_package(demo):
    source = find_source("demo")
    assert source.kind == "gguf" and source.config == demo.config
    assert (demo.config.layers, demo.config.width, demo.config.vocab, demo.config.tied) == (30, 576, 49152, True)
    assert sum(p.numel() for p in demo.parameters()) == demo.config.parameters == 134_515_008
    assert {p.dtype for p in demo.parameters()} == {torch.bfloat16}
    assert demo.lm_head.weight is demo.model.embed_tokens.weight
    assert not demo.training and all(p.requires_grad for p in demo.parameters())


def test_the_demo_model_answers(demo):
    tokenizer = load_tokenizer("demo")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.encode(tokenizer.chat(question, generate=True) + "The capital of France is")
    with torch.no_grad():
        hidden_BTD = demo.hidden(torch.tensor([ids]))
        assert tokenizer.decode([int(demo.logits(hidden_BTD[:, -1]).argmax())]) == " Paris"
