import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from satchel.adapt.lora import Lora
from satchel.train.full import Full
from tests.train.common import adapt, gradients, saved_bytes
from tests.train.toys import toy_batch, toy_decoder


def test_gradients_are_bit_identical_to_keeping_everything():
    decoder, batch = toy_decoder(), toy_batch()
    for ours, plain in zip(gradients(decoder, Full(), batch), gradients(decoder, None, batch), strict=True):
        assert torch.equal(ours, plain)


def test_keeps_a_fraction_of_the_bytes():
    decoder = toy_decoder()
    assert saved_bytes(decoder, Full()) < 0.35 * saved_bytes(decoder, None)


def test_dropout_draws_the_same_twice():
    block = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    x, want = torch.randn(4, 8), None
    for policy in (Full().wrap(block, 0, 1), block):
        block.zero_grad()
        torch.manual_seed(0)
        policy(x).sum().backward()
        got = block[0].weight.grad.clone()
        assert want is None or torch.equal(got, want)
        want = got


def test_an_adapters_dropout_draws_the_same_twice():
    decoder, batch, found = toy_decoder(), toy_batch(), []
    adapt(decoder, Lora(dropout=0.5))
    for policy in (Full(), None):
        torch.manual_seed(0)
        found.append([g for g in gradients(decoder, policy, batch) if g is not None])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*found, strict=True))


def test_runs_on_fake_tensors():
    batch = toy_batch()
    with FakeTensorMode(allow_non_fake_inputs=True):
        decoder = toy_decoder()
        assert all(g is not None for g in gradients(decoder, Full(), batch))


def test_without_gradients_the_block_runs_once():
    calls = []
    with torch.no_grad():
        Full().wrap(lambda x: calls.append(1) or x, 0, 1)(torch.ones(1))
    assert calls == [1]
