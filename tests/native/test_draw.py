"""The kernel chooses the very tokens that model/sampling.py defines, or says that it cannot be sure."""

import random

import pytest
import torch

from satchel.core.errors import UserError
from satchel.core.request import Sampling
from satchel.model.sampling import BITS, choose_in_torch, gumbel, mix
from satchel.native import draw, sample
from satchel.native.build import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

KINDS = {
    "all": {},
    "few": {"top_k": 20},
    "nucleus": {"top_p": 0.9},
    "narrow": {"top_p": 0.3},
    "likely": {"min_p": 0.1},
    "every": {"top_k": 50, "top_p": 0.8, "min_p": 0.02},
    "one": {"top_k": 1},
    "more than there are": {"top_k": 10**6, "top_p": 0.95},
}


def both(logits_V, key, temperature, **how):
    """What the kernel and the definition say."""
    asked = Sampling(temperature=temperature, **how)
    return sample(logits_V, key, temperature, **how), choose_in_torch(logits_V, asked, key)


@pytest.mark.parametrize("kind", KINDS)
def test_the_token_is_that_of_the_definition(kind):
    rng, unsure, draws = random.Random(kind), 0, 300
    for number in range(draws):
        vocabulary = rng.choice((1, 5, 16, 17, 1000, 5003))
        spread, temperature = rng.choice((0.3, 3.0, 12.0)), rng.choice((0.2, 0.7, 1.0, 1.9))
        logits_V = torch.randn(vocabulary, generator=torch.Generator().manual_seed(number)) * spread
        if rng.random() < 0.3:
            logits_V[torch.randperm(vocabulary)[: vocabulary // 2]] = -torch.inf
        got, expected = both(logits_V, mix(7, number), temperature, **KINDS[kind])
        unsure += got is None
        assert got in (None, expected), (kind, vocabulary, spread, temperature)
    assert unsure < draws * (0.5 if kind == "more than there are" else 0.2)


def test_on_the_logits_of_a_large_vocabulary_it_is_nearly_always_sure():
    logits_V = torch.randn(150_000, generator=torch.Generator().manual_seed(0)) * 3
    for kind in ("all", "few", "nucleus", "likely", "every"):
        found = [both(logits_V, mix(1, position), 0.8, **KINDS[kind]) for position in range(12)]
        assert sum(got is None for got, _ in found) <= 1
        assert all(got in (None, expected) for got, expected in found)


def test_equals_leave_the_choice_to_the_definition():
    """Of equal logits the definition's sort decides which are among the first; what surely is among them may win."""
    flat_V = torch.zeros(40)
    assert sample(flat_V, 3, top_k=5) is None and sample(flat_V, 3, top_p=0.5) is None
    got, expected = both(flat_V, 3, 1.0)
    assert got == expected
    flat_V[7] = 20.0
    assert sample(flat_V, 3, top_k=5) == 7


def test_what_is_no_number_leaves_the_choice_to_the_definition():
    assert sample(torch.tensor([1.0, float("inf")]), 3) is None
    assert sample(torch.full((5,), -torch.inf), 3) is None


def test_noise_is_finite_for_every_hash():
    """Half a step above the largest of 24 bits rounds to 1, and the noise of that would win against all."""
    steps = torch.tensor([0, 1, 2**BITS - 2, 2**BITS - 1]).float().add_(0.5).mul_(2.0**-BITS)
    assert (steps < 1).all() and steps.unique().numel() == 4
    assert gumbel(mix(0, 0), torch.arange(1 << 22)).isfinite().all()


def test_a_row_that_it_cannot_read_is_a_users_error():
    for row in (torch.ones(8, dtype=torch.bfloat16), torch.ones(8, 2)[:, 0]):
        assert not draw.takes(row)
        with pytest.raises(UserError, match="float32"):
            sample(row, 0)
