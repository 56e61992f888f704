"""Random directions: normal enough, the same on both paths, and weights that come back from them."""

import pytest
import torch

from satchel.native.build import compiler
from satchel.optim._directions import (
    FULL,
    descend_,
    descend_in_torch_,
    drawn,
    estimate,
    estimate_in_torch,
    perturb_,
    perturb_in_torch_,
)
from tests.tolerances import DEVIATIONS, TOLERANCE

WIDE, NARROW, CPU = torch.float32, torch.bfloat16, torch.device("cpu")
COUNT = 2 * (1 << 16) + 259  # of the kernel's chunks three, of the slices of torch two
RADIUS, SEED = 1e-3, 7
WAY = ((0, 1), (1, -1), (-1, 0))  # to one side of theta, to the other, and back
needs_kernel = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
KEEPINGS = [(WIDE, False), (NARROW, False), (NARROW, True)]  # dtype, and whether its low bits are kept


def weights(dtype, scale=0.02, count=COUNT):
    x = torch.randn(count, generator=torch.Generator().manual_seed(0)).mul_(scale).to(dtype)
    x[::1000] = 0
    return x


def low_bits(x, kept):
    return torch.zeros(x.numel(), dtype=torch.int16) if kept else None


def places(x, low, *how, perturb=perturb_):
    """Where a parameter stands on its way."""
    found = []
    for back, forth in WAY:
        perturb(x, low, back, forth, *how)
        found.append(x.clone())
    return found


def direction(seed=SEED, masked=0, mask_seed=0, count=COUNT):
    return drawn(seed, masked, mask_seed, slice(0, count), CPU)


def test_a_direction_is_nearly_standard_normal_and_unlike_another():
    z, other = direction(), direction(SEED + 1)
    few = DEVIATIONS / COUNT**0.5
    assert abs(z.mean()) < few and abs(z.var() - 1) < 2 * few and abs((z * other).mean()) < few
    assert 2.5 < (z**4).mean() < 3.1 and 3 < z.abs().max() < 3.5


def test_an_elements_number_depends_on_seed_and_place_alone():
    part = drawn(SEED, 0, 0, slice(1000, 2000), CPU)
    assert torch.equal(part, direction()[1000:2000])


def test_masked_elements_are_zero_and_others_what_they_would_be():
    z, sparse, again = direction(), direction(masked=FULL // 10 * 9, mask_seed=3), direction(9, FULL // 10 * 9, 3)
    kept = sparse != 0
    assert kept.float().mean().item() == pytest.approx(0.1, abs=DEVIATIONS * (0.09 / COUNT) ** 0.5 + 0.003)
    assert torch.equal(sparse[kept], z[kept])
    assert ((again != 0) == kept).float().mean() > 0.999  # zeros of either draw aside


@pytest.mark.parametrize("scale", [1e-4, 0.02, 1.0])
def test_bfloat16_weights_come_back_bit_for_bit(scale):
    theta = weights(NARROW, scale)
    assert torch.equal(places(theta.clone(), None, [SEED], RADIUS, 0, 0)[-1], theta)


def test_every_bfloat16_comes_back_from_every_step_to_either_side():
    """All 2^16 of them, infinities and all, at radii from far below their last bit to far above their size."""
    theta = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(NARROW)
    for seed in range(3):
        for radius in (1e-30, 1e-6, 1e-3, 0.1, 1e4, 1e30):
            for side in (1, -1):
                x = theta.clone()
                for back, forth in ((0, side), (side, 0)):
                    perturb_(x, None, back, forth, [seed], radius, 0, 0)
                assert torch.equal(x.view(torch.int16), theta.view(torch.int16))


@pytest.mark.parametrize("scale", [1e-4, 0.02, 1.0])
def test_wide_weights_come_back_but_for_a_rounding_error(scale):
    theta = weights(WIDE, scale)
    back = places(theta.clone(), None, [SEED], RADIUS, 0, 0)[-1]
    assert ((back - theta).abs() <= 4 * torch.finfo(WIDE).eps * theta.abs().clamp_min(RADIUS)).all()
    assert (back - theta).abs().max() < 1e-6


def test_bfloat16_weights_with_low_bits_come_back_as_wide_ones_do():
    theta, low = weights(NARROW), low_bits(weights(NARROW), True)
    assert torch.equal(places(x := theta.clone(), low, [SEED], RADIUS, 0, 0)[-1], x)
    error = (x.float().view(torch.int32) + low).view(WIDE) - theta.float()
    assert error.abs().max() < 1e-8


@pytest.mark.parametrize(("dtype", "kept"), KEEPINGS)
def test_what_is_descended_along_is_half_of_what_lies_between_the_two_places(dtype, kept):
    theta = weights(dtype)
    up, down, _ = places(theta.clone(), low_bits(theta, kept), [SEED], RADIUS, 0, 0)
    between = (up.float() - down.float()) / (2 * RADIUS)
    ours = estimate(theta, low_bits(theta, kept), torch.ones(1), [SEED], RADIUS, 0, 0).float()
    last_bit = theta.float().abs().max() * torch.finfo(dtype).eps / RADIUS  # of the places, in radii
    tolerance = 2**-7 if dtype == NARROW and not kept else last_bit  # of the estimate, where places are exact
    assert (ours - between).abs().max() <= tolerance


def test_wide_weights_move_by_the_radius_along_z():
    theta = weights(WIDE)
    up, down, _ = places(theta.clone(), None, [SEED], RADIUS, 0, 0)
    for place, side in ((up, 1), (down, -1)):
        torch.testing.assert_close(place - theta, side * RADIUS * direction(), rtol=1e-4, atol=1e-8)


def test_a_bfloat16_direction_is_as_long_as_z_and_as_often_to_either_side():
    """Of weights of 0.02, those too small or too near to the end of their binade stay; no element has a favourite."""
    theta = weights(NARROW)
    z = [estimate(theta, None, torch.ones(1), [seed], RADIUS, 0, 0).float() for seed in range(64)]
    moved = torch.stack([each != 0 for each in z]).float().mean()
    assert 0.8 < moved < 0.95
    mean = torch.stack(z).mean(0)
    assert abs(mean.mean()) < DEVIATIONS / (64 * COUNT) ** 0.5
    assert mean.std() < 1.05 / 64**0.5
    assert 0.55 < torch.stack(z).square().mean() < 0.75


def test_what_a_bfloat16_weight_hops_by_is_what_a_wide_one_moves_by():
    theta = weights(NARROW)
    up, down, _ = places(theta.clone(), None, [SEED], RADIUS, 0, 0)
    both = (up != theta) & (down != theta)
    size, z = (up.float() - theta.float()).abs()[both], direction()[both].abs() * RADIUS
    last_bit = theta[both].float().abs() * 2**-7
    assert ((size - z).abs() <= last_bit / 2 + 1e-7).all()


@needs_kernel
@pytest.mark.parametrize(("dtype", "kept"), KEEPINGS)
@pytest.mark.parametrize("masked", [0, FULL // 2])
class TestTheKernelEqualsTheTorchPathBitForBit:
    def test_on_the_way_and_back(self, dtype, kept, masked):
        theta = weights(dtype)
        ends = []
        for perturb in (perturb_, perturb_in_torch_):
            low = low_bits(theta, kept)
            ends.append([*places(theta.clone(), low, [SEED], RADIUS, masked, 5, perturb=perturb), *([low] * kept)])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))

    def test_in_an_estimate(self, dtype, kept, masked):
        theta, size_K = weights(dtype), torch.tensor([0.3, -0.7])
        ours, plain = (
            f(theta, low_bits(theta, kept), size_K, [SEED, 9], RADIUS, masked, 5) for f in (estimate, estimate_in_torch)
        )
        assert torch.equal(ours, plain) and (ours != 0).any()

    @pytest.mark.parametrize("momentum", [False, True])
    def test_in_a_step(self, dtype, kept, masked, momentum):
        rounding, ends = "fp32" if kept else "stochastic", []
        for descend in (descend_, descend_in_torch_):
            x, low = weights(dtype), low_bits(weights(dtype), kept)
            m = weights(dtype, 1.0).flip(0) if momentum else None
            how = ([SEED, 9], RADIUS, masked, 5, rounding, 0.9, 1e-2, 0.99, 11)
            descend(x, low, m, torch.tensor([0.3, -0.7]), *how)
            ends.append([x, *([low] * kept), *([m] * momentum)])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@needs_kernel
def test_threads_change_nothing():
    before, ends = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            ends.append(estimate(weights(NARROW), None, torch.ones(1), [SEED], RADIUS, 0, 0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*ends)


def test_a_step_is_the_formula():
    x, m, size_K = weights(WIDE), weights(WIDE, 1.0).flip(0), torch.tensor([0.3, -0.7])
    g = 0.3 * direction() - 0.7 * direction(9)
    want_m = 0.9 * m + g
    want = 0.99 * x - 1e-2 * want_m
    descend_(x, None, m, size_K, [SEED, 9], RADIUS, 0, 0, "stochastic", 0.9, 1e-2, 0.99, 11)
    torch.testing.assert_close(m, want_m, rtol=TOLERANCE[WIDE], atol=1e-6)
    torch.testing.assert_close(x, want, rtol=TOLERANCE[WIDE], atol=1e-7)


def test_small_steps_survive_in_bfloat16():
    """A step far below the last bit of the weights is right on average."""
    x = torch.ones(200_000, dtype=NARROW)
    for seed in range(20):
        how = (0.05, FULL // 2, 5, "stochastic", 0.0, 1e-4, 1 - 1e-4, 100 + seed)
        descend_(x, None, None, torch.ones(1), [seed], *how)
    assert 1 - x.double().mean().item() == pytest.approx(20e-4, rel=0.1)
