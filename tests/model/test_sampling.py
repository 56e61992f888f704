"""Draws follow the distribution that their settings ask for, and depend on nothing but seed and position."""

import math

import pytest
import torch

from satchel.core.request import Sampling
from satchel.model.sampling import History, adjusted, allow, choose, gumbel, kept, logprob_of, mix, probabilities
from tests.tolerances import DEVIATIONS

LOGITS = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2
SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5, top_k=5),
    Sampling(temperature=1.0, top_p=0.7),
    Sampling(temperature=2.0, min_p=0.2),
    Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.05),
]


def reference(how):
    """The distribution by definition: top_k, then top_p of what is left, then min_p."""
    p = (LOGITS.double() / how.temperature).softmax(0)
    order = p.argsort(descending=True).tolist()
    order = order[: how.top_k or None]
    total, held, out = float(p[order].sum()), 0.0, []
    for token in order:
        if held >= how.top_p * total:
            break
        out.append(token)
        held += float(p[token])
    out = [token for token in out if p[token] >= how.min_p * p[order[0]]]
    chosen = torch.zeros_like(p)
    chosen[out] = p[out]
    return chosen / chosen.sum()


@pytest.mark.parametrize("how", SETTINGS)
def test_what_is_kept_is_what_was_asked_for(how):
    torch.testing.assert_close(probabilities(LOGITS, how).double(), reference(how), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("how", SETTINGS)
def test_draws_follow_the_distribution(how):
    draws = 4000
    counts = torch.zeros(40)
    for position in range(draws):
        counts[choose(LOGITS, how, mix(3, position))] += 1
    p = reference(how)
    assert (counts[p == 0] == 0).all()
    inside = (p > 0) & (p < 1)
    deviation = (counts[inside] / draws - p[inside]).abs() / (p[inside] * (1 - p[inside]) / draws).sqrt()
    assert deviation.max() < DEVIATIONS


def test_noise_is_gumbels_and_independent_of_which_tokens_are_asked():
    tokens = torch.arange(100_000)
    noise = gumbel(mix(1, 2), tokens)
    euler, variance = 0.5772156649, math.pi**2 / 6
    assert abs(noise.mean() - euler) < DEVIATIONS * math.sqrt(variance / len(noise))
    assert abs(noise.var() - variance) < DEVIATIONS * variance * math.sqrt(4.4 / len(noise))  # its kurtosis is 5.4
    assert torch.equal(gumbel(mix(1, 2), torch.tensor([7, 99_999])), noise[[7, 99_999]])
    for other in (mix(1, 3), mix(2, 2), mix(2, 1)):
        assert abs(torch.corrcoef(torch.stack([noise, gumbel(other, tokens)]))[0, 1]) < DEVIATIONS / math.sqrt(1e5)


def test_a_key_depends_on_each_number_and_their_order():
    keys = {mix(a, b) for a in range(50) for b in range(50)}
    assert len(keys) == 2500 and all(0 <= key < 1 << 64 for key in keys)


def test_penalties_are_taken_off_what_was_said():
    history = History((3, 4), (4, 4, 5))
    how = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={7: 2.0})
    expected = LOGITS.clone()
    expected[4] -= 0.5 + 0.25 * 2
    expected[5] -= 0.5 + 0.25
    expected[7] += 2.0
    assert torch.equal(adjusted(LOGITS, how, history), expected)
    again = adjusted(LOGITS, Sampling(repetition_penalty=1.5), history)
    for token in range(40):
        value = LOGITS[token]
        repeated = value / 1.5 if value > 0 else value * 1.5
        assert again[token] == (repeated if token in (3, 4, 5) else value)
    assert adjusted(LOGITS, Sampling(temperature=2.0), history) is LOGITS


def test_greedy_takes_the_likeliest_and_constraints_hold():
    assert choose(LOGITS, Sampling()) == int(LOGITS.argmax())
    bounded = allow(LOGITS, [2, 9])
    assert {choose(bounded, Sampling(temperature=3.0), mix(0, i)) for i in range(50)} == {2, 9}
    assert choose(bounded, Sampling()) == (2 if LOGITS[2] > LOGITS[9] else 9)
    assert kept(allow(LOGITS, [2]), Sampling(temperature=1.0, top_p=0.9))[1].tolist() == [2]


def test_logarithms_of_probabilities():
    found = logprob_of(LOGITS, 6, 3)
    expected = LOGITS.log_softmax(0)
    assert found.logprob == pytest.approx(float(expected[6]), rel=1e-5)
    assert [t for t, _ in found.top] == LOGITS.topk(3).indices.tolist()
    assert found.top[0][1] == pytest.approx(float(expected.max()), rel=1e-5)


def test_a_nucleus_of_many_tokens_is_found_whole():
    """More tokens than are tried first, and a share that rounding may never reach."""
    flat = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 0.1
    p = flat.double().softmax(0).sort(descending=True).values
    for top_p in (0.01, 0.3, 0.9, 1 - 1e-7):
        expected = int((p.cumsum(0) - p < top_p).sum())
        assert len(kept(flat, Sampling(temperature=1.0, top_p=top_p))[1]) == pytest.approx(expected, abs=2)


def test_the_first_of_equals_is_the_likeliest():
    assert choose(torch.tensor([1.0, 3.0, 3.0, 2.0]), Sampling()) == 1
