"""Choosing tokens from logits, by chance that is a function of (seed, position, token) alone.

    token = argmax over kept tokens of  logit / temperature + G(seed, position, token),   G standard Gumbel noise

which draws from softmax(logit / temperature) over what is kept (Gumbel's trick). No generator is shared, so that a
sequence's draws do not depend on what else is in the batch, on how often a step is repeated, or on whether a token was
guessed before it was computed. Rows are worked on one by one: temporaries are a few rows of the vocabulary.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from satchel.core.request import Logprob, Sampling
from satchel.native import draw as native

# V vocabulary, C kept tokens, R rows

MASK = (1 << 64) - 1
GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64
BITS = 23  # of the uniform numbers; with one more, half a step below 1 rounds to 1, and its noise is infinite
FEW = (128, 2048)  # likeliest tokens that are tried first


@dataclass(frozen=True)
class History:
    """What a sequence has said so far."""

    prompt: Sequence[int] = ()
    said: Sequence[int] = ()


def mix(*numbers: int) -> int:
    """64 well mixed bits of some integers."""
    z = 0
    for number in numbers:
        z = (z + number + GOLDEN) & MASK
        z = ((z ^ z >> 30) * MIX1) & MASK
        z = ((z ^ z >> 27) * MIX2) & MASK
        z ^= z >> 31
    return z


def gumbel(key: int, token_C: Tensor) -> Tensor:
    """Standard Gumbel noise for each token, float32, a function of (key, token)."""
    z_C = token_C * _signed(GOLDEN)
    z_C += _signed(key)
    z_C = z_C.bitwise_xor_(_shifted(z_C, 30)).mul_(_signed(MIX1))
    z_C = z_C.bitwise_xor_(_shifted(z_C, 27)).mul_(_signed(MIX2))
    z_C = z_C.bitwise_xor_(_shifted(z_C, 31)).bitwise_right_shift_(64 - BITS).bitwise_and_((1 << BITS) - 1)
    uniform_C = z_C.float().add_(0.5).mul_(2.0**-BITS)
    return uniform_C.log_().neg_().log_().neg_()


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _shifted(z_C: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills up with zeros; torch's own copies the sign."""
    return (z_C >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def choose(logits_V: Tensor, how: Sampling, key: int = 0, history: History = History()) -> int:
    """The next token, from float32 logits. `key` is `mix(seed, position)`; -inf marks a token that may not come."""
    logits_V = adjusted(logits_V, how, history)
    if how.greedy:
        return likeliest(logits_V)
    if native.takes(logits_V):
        token = native.sample(logits_V, key, how.temperature, how.top_k, how.top_p, how.min_p)
        if token is not None:
            return token
    return choose_in_torch(logits_V, how, key)


def choose_in_torch(logits_V: Tensor, how: Sampling, key: int) -> int:
    """A draw by definition, from logits after bias and penalties; what `choose` takes where a kernel cannot be sure."""
    logit_C, token_C = kept(logits_V, how)
    return int(token_C[likeliest(logit_C + gumbel(key, token_C))])


def likeliest(logits_V: Tensor) -> int:
    """Where the highest value stands; the first of equals. On a CPU numpy finds it thirty times sooner than torch."""
    return int(logits_V.numpy().argmax() if logits_V.device.type == "cpu" else logits_V.argmax())


def sound(logits_RV: Tensor) -> list[bool]:
    """Whether the highest value of each row is a finite number. By numpy as in `likeliest`."""
    if logits_RV.device.type == "cpu":
        return np.isfinite(logits_RV.numpy().max(1)).tolist()
    return logits_RV.amax(1).isfinite().tolist()


def probabilities(logits_V: Tensor, how: Sampling, history: History = History()) -> Tensor:
    """What `choose` draws from, [V] in float32; a single 1 if it is greedy."""
    logits_V = adjusted(logits_V, how, history)
    out_V = torch.zeros_like(logits_V)
    if how.greedy:
        out_V[logits_V.argmax()] = 1.0
        return out_V
    logit_C, token_C = kept(logits_V, how)
    return out_V.index_copy_(0, token_C, logit_C.softmax(0))


def kept(logits_V: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """Logits over temperature of the tokens that top_k, top_p and min_p leave, in this order, and the tokens."""
    logits_V = logits_V / how.temperature
    logit_C, token_C, norm = _likeliest(logits_V, how)
    if how.top_p < 1:
        share_C = (logit_C - norm).exp()
        count = int((share_C.cumsum(0) - share_C < how.top_p).sum())
        logit_C, token_C = logit_C[:count], token_C[:count]
    if how.min_p > 0:
        held_C = logit_C >= logit_C.max() + math.log(how.min_p)
        logit_C, token_C = logit_C[held_C], token_C[held_C]
    return logit_C, token_C


def _likeliest(logits_V: Tensor, how: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """The top_k tokens, or as many as surely hold top_p, falling; else all as they are. With the logarithm of the sum
    that shares are of."""
    if 0 < how.top_k < len(logits_V):
        logit_C, token_C = logits_V.topk(how.top_k)
        return logit_C, token_C, logit_C.logsumexp(0)
    norm = logits_V.logsumexp(0)
    if how.top_p == 1:
        return logits_V, torch.arange(len(logits_V), device=logits_V.device), norm
    for count in (*FEW, len(logits_V)):  # a few nearly always hold it, and to sort all takes twenty times as long
        logit_C, token_C = logits_V.topk(min(count, len(logits_V)))
        if float((logit_C - norm).exp().sum()) >= how.top_p:
            break
    return logit_C, token_C, norm


def adjusted(logits_V: Tensor, how: Sampling, history: History) -> Tensor:
    """Logits after bias and penalties; the very tensor if there are none."""
    if not how.logit_bias and not how.penalises:
        return logits_V
    logits_V = logits_V.clone()
    if how.logit_bias:
        token_C = torch.tensor(list(how.logit_bias), device=logits_V.device)
        logits_V[token_C] += torch.tensor(list(how.logit_bias.values()), device=logits_V.device)
    if how.repetition_penalty != 1:
        token_C = torch.tensor(sorted({*history.prompt, *history.said}), device=logits_V.device)
        logit_C = logits_V[token_C]
        penalty = how.repetition_penalty
        logits_V[token_C] = torch.where(logit_C > 0, logit_C / penalty, logit_C * penalty)
    if history.said and (how.presence_penalty or how.frequency_penalty):
        counts = Counter(history.said)
        token_C = torch.tensor(list(counts), device=logits_V.device)
        count_C = torch.tensor(list(counts.values()), dtype=torch.float32, device=logits_V.device)
        logits_V[token_C] -= how.presence_penalty + how.frequency_penalty * count_C
    return logits_V


def allow(logits_V: Tensor, tokens: Sequence[int]) -> Tensor:
    """The logits, -inf for all but these tokens."""
    token_C = torch.tensor(tokens, device=logits_V.device)
    return torch.full_like(logits_V, -torch.inf).index_copy_(0, token_C, logits_V[token_C])


def logprob_of(logits_V: Tensor, token: int, top: int) -> Logprob:
    """The token's logarithm of probability, and those of the `top` likeliest."""
    norm = logits_V.logsumexp(0)
    logit_C, token_C = logits_V.topk(top)
    likeliest = tuple(zip(token_C.tolist(), (logit_C - norm).tolist(), strict=True))
    return Logprob(token, float(logits_V[token] - norm), likeliest)
