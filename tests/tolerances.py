"""How far what should be equal may differ: the one place where tolerances are written, each with its reason."""

import torch
from torch import Tensor

# Relative error of results that differ in the order of long sums only: some units in the last place.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

# Numbers that were rounded to bfloat16 twice on their way, in the norm: each time by 2^-9 at most, and 0.6 of that.
TWICE_ROUNDED = 2**-9

# A mean of random draws against its expectation, in standard deviations of that mean: by chance once in two million.
DEVIATIONS = 5

# What 4 bits a weight lose of normally distributed weights, in the norm (8 bits lose a tenth of it).
FOUR_BITS = 0.1

# What inputs of 8 bits lose of a product of normally distributed numbers, in the norm: 0.6%, and a few times that where
# the terms of short sums cancel.
EIGHT_BITS = 0.03

# A share of decisions on one text against the same on another: two points, as the methods' authors round them.
SHARE = 0.02

# What inputs of 8 bits may change of a model's perplexity on some thousand tokens.
PERPLEXITY = 0.005

# How far the next token's distribution may then lie from the exact one, nats on average: bfloat16 alone makes 0.0013.
DIVERGENCE = 0.01

# Rehearsed against allocated bytes: an allocator rounds up to pages, and tables that last as long as the process
# (the codes of 8-bit moments, half a MiB) belong to no job.
REHEARSED = 0.02


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors differ by no more than their dtype does, in the norm."""
    return bool((ours - theirs).norm() <= TOLERANCE[ours.dtype] * theirs.norm())
