"""Random calls of the operators, of shapes that no model has: `python -m tests.native.fuzz ROUNDS SEED`.

Nothing is compared, other tests do that; what reads or writes where it must not is for a sanitizer to see. Every tensor
is an allocation of its own, of the very size that it needs.
"""

import random
import sys

import torch

from satchel.native import gated, rms_norm, rotate, sample
from satchel.native.pointwise import ACTS

DTYPES = (torch.float32, torch.bfloat16)


def numbers(rng, *shape, dtype):
    """Normal ones, with a few that are as large, small or little of a number as can be."""
    out = torch.randn(shape) * 10 ** rng.uniform(-3, 3)
    if out.numel() and rng.random() < 0.3:
        extremes = torch.tensor([0.0, 1e-38, -1e-44, 3e38, -3e38, torch.inf, -torch.inf, torch.nan])
        out.view(-1)[torch.randint(out.numel(), (8,))] = extremes
    return out.to(dtype)


def pointwise(rng):
    dtype, rows, width = rng.choice(DTYPES), rng.choice((0, 1, 2, 7, 200)), rng.randrange(1, 300)
    x, y = numbers(rng, rows, width, dtype=dtype), numbers(rng, rows, width, dtype=dtype)
    rms_norm(x, numbers(rng, width, dtype=dtype), plus_one=rng.random() < 0.5, late_cast=rng.random() < 0.5)
    gated(x, y, rng.choice(list(ACTS)))
    half = rng.randrange(1, 50)
    heads, dim = rng.randrange(1, 5), 2 * half + rng.choice((0, 0, 1, 13))
    tables = (numbers(rng, rows, half, dtype=dtype) for _ in range(2))
    rotate(numbers(rng, rng.randrange(1, 3), rows, heads, dim, dtype=dtype), *tables)


def drawing(rng):
    logits_V = numbers(rng, rng.choice((1, 2, 15, 16, 17, 999, 20_001)), dtype=torch.float32)
    top_k, top_p = rng.choice((0, 1, 5, 10_000)), rng.choice((1.0, 0.5, 0.999999, 1e-9))
    sample(logits_V, rng.getrandbits(64), 10 ** rng.uniform(-3, 3), top_k, top_p, rng.choice((0.0, 0.1, 1.0)))


def main(rounds, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for number in range(rounds):
        torch.set_num_threads(1 + number % 3)
        pointwise(rng)
        drawing(rng)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
