"""What schedules and activation policies are tried with."""

import pytest
import torch

from satchel.model.adapters import adapter_parameters, attach
from satchel.train.causal_lm import CausalLM
from tests.tolerances import TOLERANCE
from tests.train.toys import toy_batch


def factors(schedule, steps=200):
    """The factor of every step of a run."""
    return [schedule.at(step, steps) for step in range(steps)]


def check_equals_transformers(schedule, get_schedule, steps=200, **knobs):
    """The factors are those of transformers' `get_schedule`; `schedule` has no warm-up, which differs by a step."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_schedule(optimizer, num_warmup_steps=0, num_training_steps=steps, **knobs)
    for ours in factors(schedule, steps):
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=TOLERANCE[torch.float64])
        optimizer.step()
        theirs.step()


def adapt(decoder, method):
    """Put adapters on the decoder that change what it computes, as trained ones do."""
    rng = torch.Generator().manual_seed(0)
    attach(decoder, method, rng)
    for _, parameter in adapter_parameters(decoder):
        parameter.data.normal_(0, 0.1, generator=rng)


def gradients(decoder, policy, batch):
    """Of the loss, with the blocks run as `policy` says."""
    decoder.wrap_blocks(policy)
    decoder.zero_grad()
    CausalLM().loss(decoder, batch)[0].backward()
    return [p.grad for p in decoder.parameters()]


def saved_bytes(decoder, policy, lengths=(11, 5, 16)):
    """Bytes of distinct storages that the forward pass keeps."""
    decoder.wrap_blocks(policy)
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = CausalLM().loss(decoder, toy_batch(lengths))
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    del kept
    return sum(size for pointer, size in storages.items() if pointer not in weights)
