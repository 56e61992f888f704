"""Random directions that are never stored, and moving weights along them and back without a copy of the weights.

    perturb_    theta -> theta + r z -> theta - r z -> theta
    descend_    m = beta m + g,   x = keep x - lr m   with g = sum_k size_k z_k
    estimate    g

Element i of a direction is the sum of the four bytes of hash(seed, i), standardised: between -3.5 and 3.5, nearly
normal, the same bits on every machine and in every order. `masked` elements are zero.

In float32, and in bfloat16 whose low bits are kept (rounding=fp32), z is added and taken away: theta comes back but for
a rounding error of float32, some 1e-7 of the larger of theta and r.

Plain bfloat16 has no bits for that: theta + r z - r z differs from theta as much as training moves it. There an element
hops instead, to a partner in its own binade, where neighbours are u apart, exponent and sign the same. With
k = round(|r z| / u), the 128 places of the binade fall into stretches of k; those of even number are partners of the
next, those of odd number of the one before, place by place. A hop to the partner and one more is no hop: theta comes
back bit for bit, and nothing is kept. The other side of theta are the partners where the stretches are paired the
other way, and the sign of z says which of the two comes first, so that either side is as likely as the other. An
element goes nowhere that has no partner: near the ends of its binade to one side, or if it is smaller than about 2 r
|z|. Of weights of 0.02 measured at 0.001, 69% hop to both sides, 18% to one, 13% to none. One that is much larger than
r is not moved by it, either: k = 0.
The z of `descend_` and `estimate` is then what was measured: half of what lies between the two partners, in radii; the
estimate is the gradient times the mean of z^2, which is below 1 for an element that seldom takes part.
Method: https://arxiv.org/abs/2305.17333 (MeZO), whose weights drift by rounding errors at every step.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from satchel.native.adam import KINDS, Array, Direction, loaded, takes
from satchel.native.operators import operator
from satchel.optim._shared import few_barriers, hashed, land_master_, master, noises, parameter_array, slices

# N elements of a flattened parameter or of a slice of it; K directions

UNIT = 21845**-0.5  # one over the standard deviation of the sum of four bytes
BYTES = 0xFF00FF
FULL = 1 << 31  # what `masked` is a part of


class Draw(NamedTuple):
    """What directions of a parameter are drawn from, and how far they are gone to measure; as the operators take it."""

    seeds: list[int]
    radius: float  # 0: nothing was moved
    masked: int  # of 2^31: the share of elements that is zero
    mask_seed: int


def drawn(seed: int, masked: int, mask_seed: int, cut: slice, device: torch.device) -> Tensor:
    """A slice of a direction, float32."""
    bits_N = hashed(seed, cut, device)
    pairs_N = (bits_N & BYTES).add_((bits_N >> 8).bitwise_and_(BYTES))
    z_N = (pairs_N & 0xFFFF).add_(pairs_N >> 16).sub_(510).float().mul_(UNIT)
    if masked:
        z_N.masked_fill_((hashed(mask_seed, cut, device) & (FULL - 1)) < masked, 0)
    return z_N


def hops(x_N: Tensor, z_N: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """How far bfloat16 elements hop to either side, in units in the last place, int32."""
    bits_N = x_N.view(torch.int16).int()
    exponent_N, place_N = (bits_N >> 7) & 0xFF, bits_N & 0x7F
    ordinary_N = (exponent_N >= 8) & (exponent_N < 255)
    units_N = (261 - torch.where(ordinary_N, exponent_N, 8)).bitwise_left_shift(23).view(torch.float32)
    step_N = z_N.abs().mul_(radius).mul_(units_N).clamp_max_(100).add_(0.5).int()
    step_N.masked_fill_(~ordinary_N | (step_N > 64), 0)
    odd_N = place_N.float().div_(step_N.clamp_min(1)).int().bitwise_and_(1).bool()
    outward_N = torch.where(place_N + step_N < 128, step_N, 0)
    inward_N = torch.where(place_N >= step_N, -step_N, 0)
    swapped_N = odd_N ^ (z_N < 0)
    return torch.where(swapped_N, inward_N, outward_N), torch.where(swapped_N, outward_N, inward_N)


def between(x_N: Tensor, z_N: Tensor, radius: float) -> Tensor:
    """Half of what lies between the two partners of bfloat16 elements, in radii, float32."""
    up_N, down_N = hops(x_N, z_N, radius)
    apart_N = up_N.sub_(down_N)
    exponent_N = (x_N.view(torch.int16).int() >> 7) & 0xFF
    unit_N = (torch.where(apart_N != 0, exponent_N, 8) - 7).bitwise_left_shift(23).view(torch.float32)
    size_N = apart_N.float().mul_(unit_N).mul_(torch.tensor(0.5) / radius)
    return torch.where(x_N.view(torch.int16) < 0, -size_N, size_N)


def sums(
    x_N: Tensor, seeds: Sequence[int], size_K: Tensor, radius: float, masked: int, mask_seed: int, hopping: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Slice by slice, the sum of the directions by size, as far as x moves along them."""
    for cut in slices(x_N.numel(), x_N.device):
        sum_N = torch.zeros(cut.stop - cut.start, device=x_N.device)
        for seed, size in zip(seeds, size_K, strict=True):
            z_N = drawn(seed, masked, mask_seed, cut, x_N.device)
            sum_N.add_((between(x_N[cut], z_N, radius) if hopping and radius else z_N).mul_(size))
        yield cut, sum_N


def hops_at_all(x_N: Tensor, low_N: Tensor | None) -> bool:
    """Whether a parameter hops, having no bits to add to."""
    return x_N.dtype != torch.float32 and low_N is None


def _directions(seeds: Sequence[int], radius: float, masked: int, mask_seed: int) -> list[Direction]:
    return [Direction(seed, mask_seed, masked, radius) for seed in seeds]


@few_barriers()
def perturb_in_torch_(
    x_N: Tensor,
    low_N: Tensor | None,
    back: int,
    forth: int,
    seeds: list[int],
    radius: float,
    masked: int,
    mask_seed: int,
) -> None:
    """From theta + back * radius * z to theta + forth * radius * z, for z of the one seed."""
    for cut in slices(x_N.numel(), x_N.device):
        z_N = drawn(seeds[0], masked, mask_seed, cut, x_N.device)
        if hops_at_all(x_N, low_N):
            for side in (back, forth):
                _hop_(x_N[cut], z_N, radius, side)
        else:
            low = None if low_N is None else low_N[cut]
            moved_N = master(x_N[cut], low).add_(z_N.mul_(torch.tensor(radius) * (forth - back)))
            land_master_(x_N[cut], low, moved_N, None)


def _hop_(x_N: Tensor, z_N: Tensor, radius: float, side: int) -> None:
    if side:
        up_N, down_N = hops(x_N, z_N, radius)
        x_N.view(torch.int16).add_((up_N if side > 0 else down_N).short())


def _perturb_in_kernel_(x_N: Tensor, low_N: Tensor | None, back: int, forth: int, seeds: list[int], *how: Any) -> None:
    (direction,) = _directions(seeds, *how)
    loaded().perturb_(parameter_array(x_N, low_N, "nearest"), direction, back, forth, x_N.numel())


perturb_ = operator(
    "perturb_(Tensor(a!) x_N, Tensor(b!)? low_N, int back, int forth, int[] seeds, float radius, int masked, "
    "int mask_seed) -> ()",
    perturb_in_torch_,
    _perturb_in_kernel_,
    lambda x_N, *_: takes(x_N),
)


@few_barriers()
def descend_in_torch_(
    x_N: Tensor,
    low_N: Tensor | None,
    momentum_N: Tensor | None,
    size_K: Tensor,
    seeds: list[int],
    radius: float,
    masked: int,
    mask_seed: int,
    rounding: str,
    beta: float,
    lr: float,
    keep: float,
    seed: int,
) -> None:
    """x = keep x - lr m, where m = beta m + g is the momentum, or g itself; g = the sum of the directions by size."""
    noisy = rounding == "stochastic" and x_N.dtype != torch.float32
    for cut, g_N in sums(x_N, seeds, size_K, radius, masked, mask_seed, hops_at_all(x_N, low_N)):
        if momentum_N is not None:
            g_N = momentum_N[cut].float().mul(beta).add_(g_N)
            momentum_N[cut].copy_(g_N)
        low = None if low_N is None else low_N[cut]
        x = master(x_N[cut], low).mul_(keep).add_(g_N.mul_(-lr))
        land_master_(x_N[cut], low, x, noises(seed, cut, x_N.device)[0] if noisy else None)


def _descend_in_kernel_(
    x_N: Tensor, low_N: Tensor | None, momentum_N: Tensor | None, size_K: Tensor, seeds: list[int], *rest: Any
) -> None:
    radius, masked, mask_seed, rounding, *rates, seed = rest
    m = None if momentum_N is None else Array(KINDS[momentum_N.dtype], momentum_N)
    x, directions = parameter_array(x_N, low_N, rounding), _directions(seeds, radius, masked, mask_seed)
    loaded().descend_(x, m, directions, size_K, (rates[0], rates[1], rates[2]), x_N.numel(), seed)


descend_ = operator(
    "descend_(Tensor(a!) x_N, Tensor(b!)? low_N, Tensor(c!)? momentum_N, Tensor size_K, int[] seeds, float radius, "
    "int masked, int mask_seed, str rounding, float beta, float lr, float keep, int seed) -> ()",
    descend_in_torch_,
    _descend_in_kernel_,
    lambda x_N, low_N, momentum_N, size_K, *_: takes(x_N, size_K),
)


@few_barriers()
def estimate_in_torch(
    x_N: Tensor,
    low_N: Tensor | None,
    size_K: Tensor,
    seeds: list[int],
    radius: float,
    masked: int,
    mask_seed: int,
) -> Tensor:
    """The sum of the directions by size that `descend_` goes along, in x's dtype."""
    out_N = torch.empty_like(x_N)
    for cut, sum_N in sums(x_N, seeds, size_K, radius, masked, mask_seed, hops_at_all(x_N, low_N)):
        out_N[cut].copy_(sum_N)
    return out_N


def _estimate_in_kernel(x_N: Tensor, low_N: Tensor | None, size_K: Tensor, seeds: list[int], *how: Any) -> Tensor:
    out_N = torch.empty_like(x_N)
    x, out = parameter_array(x_N, low_N, "nearest"), Array(KINDS[x_N.dtype], out_N)
    loaded().estimate(x, out, _directions(seeds, *how), size_K, x_N.numel())
    return out_N


estimate = operator(
    "estimate(Tensor x_N, Tensor? low_N, Tensor size_K, int[] seeds, float radius, int masked, int mask_seed) "
    "-> Tensor",
    estimate_in_torch,
    _estimate_in_kernel,
    lambda x_N, low_N, size_K, *_: takes(x_N, size_K),
    lambda x_N, *_: torch.empty_like(x_N),
)
