"""Moments in 8 bits: blocks of 256 values share a scale, and a value is the nearest of 256 codes.

The codes are dense near zero and near one (a "dynamic tree": an exponent of one to seven bits, the rest a fraction):
symmetric for the first moment, positive only for the second. 1 byte and 4/256 a value.
Paper: https://arxiv.org/abs/2110.02861
"""

from functools import cache

import torch

# N elements, a multiple of BLOCK but in a parameter's last slice; C blocks

BLOCK = 256


@cache
def codes(signed: bool) -> tuple[float, ...]:
    """The 256 values of the dynamic map, ascending, in [-1, 1] or [0, 1]."""
    values = [0.0, 1.0]
    for digit in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (digit if signed else digit + 1) + 1, dtype=torch.float32)
        means = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (digit - 6)).tolist()
        values += means + ([-value for value in means] if signed else [])
    return tuple(sorted(values))
