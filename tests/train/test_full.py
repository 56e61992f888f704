import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from satchel.train.causal_lm import CausalLM
from satchel.train.full import Full
from tests.train.toys import toy_batch, toy_decoder


def gradients(decoder, policy, batch):
    decoder.wrap_blocks(policy)
    decoder.zero_grad()
    CausalLM().loss(decoder, batch)[0].backward()
    return [p.grad for p in decoder.parameters()]


def saved_bytes(decoder, policy):
    """Bytes of distinct storages that the forward pass keeps."""
    decoder.wrap_blocks(policy)
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = CausalLM().loss(decoder, toy_batch())
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    del kept
    return sum(size for pointer, size in storages.items() if pointer not in weights)


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
