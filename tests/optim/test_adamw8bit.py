import itertools

import pytest
import torch
from torch import nn

from satchel.native import adam
from satchel.optim._blockwise import BLOCK, codebook, codes, dequantise, quantise
from satchel.optim.adamw import AdamW
from satchel.optim.adamw8bit import AdamW8bit
from tests.optim import common
from tests.tolerances import TOLERANCE

bitsandbytes = pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
EXACT = TOLERANCE[torch.float32]


def spread(count, signed, seed=0):
    """Values over many orders of magnitude, as moments are."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=rng).exp() * torch.randn(count, generator=rng).square() ** 3
    return x * torch.randn(count, generator=rng).sign() if signed else x


@pytest.mark.parametrize("signed", [True, False])
def test_codes_equal_those_of_bitsandbytes(signed):
    theirs = bitsandbytes.functional.create_dynamic_map(signed=signed)
    assert torch.equal(torch.tensor(codes(signed)), theirs)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [BLOCK, 8 * BLOCK, 8 * BLOCK + 3])
def test_every_value_gets_its_nearest_code(signed, count):
    x, book = spread(count, signed), codebook(signed, CPU)
    code, scale = quantise(x.clone(), book)
    unit = x / scale.repeat_interleave(BLOCK)[:count]
    distance = (unit[:, None].double() - book.value_256.double()).abs()
    taken = distance.gather(1, code.long()[:, None])[:, 0]
    torch.testing.assert_close(taken, distance.amin(1), rtol=0, atol=1e-8)  # a tie may fall either way


@pytest.mark.parametrize("signed", [True, False])
def test_no_cell_holds_two_midpoints(signed):
    book = codebook(signed, CPU)
    cells = book.midpoint_256[:-1].view(torch.int32) >> 16
    assert len(cells.unique()) == 255


def test_zeros_and_codes_survive_the_round_trip():
    for signed in (True, False):
        book = codebook(signed, CPU)
        x = torch.cat([torch.zeros(BLOCK), book.value_256 * 3])
        code, scale = quantise(x.clone(), book)
        torch.testing.assert_close(dequantise(code, scale, book), x, rtol=EXACT, atol=0)


def test_a_nan_stays_visible():
    book = codebook(True, CPU)
    x = torch.ones(BLOCK)
    x[7] = float("nan")
    assert dequantise(*quantise(x, book), book).isnan().any()


def test_each_step_from_the_same_state_equals_bitsandbytes():
    """Its CPU kernel rounds some values to a farther code, so states are made equal before every step."""
    ours, theirs = common.parameters(), common.parameters()
    groups = [{"params": [p]} for _, p in theirs]
    reference = bitsandbytes.optim.AdamW8bit(groups, lr=common.LR, weight_decay=0.0)
    optimizer = AdamW8bit().build(ours, common.LR, 0)
    for step in range(30):
        common.give_gradients(ours, step)
        common.give_gradients(theirs, step)
        optimizer.step()
        reference.step()
        for (_, p), (_, q) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=EXACT, atol=1e-6)
            state, want = optimizer.state[p], reference.state[q]
            state["exp_avg"].copy_(want["state1"].view(-1))
            state["exp_avg_sq"].copy_(want["state2"].view(-1))
            if "absmax1" in want:
                assert torch.allclose(state["exp_avg_scale"], want["absmax1"], rtol=EXACT)
                state["exp_avg_scale"].copy_(want["absmax1"])
                state["exp_avg_sq_scale"].copy_(want["absmax2"])


def test_stays_as_near_to_32_bits_as_bitsandbytes_does():
    def distance(build):
        named = common.parameters()
        got, want = common.run(build(named), named, range(60)), common.parameters()
        want = common.run(AdamW().build(want, common.LR, 0), want, range(60))
        return sum((a - b).square().sum() for a, b in zip(got, want, strict=True)).sqrt()

    theirs = distance(lambda named: bitsandbytes.optim.AdamW8bit([p for _, p in named], common.LR, weight_decay=0.0))
    assert 0 < distance(lambda named: AdamW8bit().build(named, common.LR, 0)) <= 1.05 * theirs


@pytest.mark.parametrize(
    ("dtype", "rounding"), list(itertools.product((torch.float32, torch.bfloat16), ("stochastic", "fp32")))
)
class TestEveryChoice:
    def test_resume_is_bit_identical(self, dtype, rounding):
        common.check_resume_is_bit_identical(AdamW8bit(rounding=rounding), dtype)

    def test_fake_tensors_give_the_same_state(self, dtype, rounding):
        common.check_fake_tensors_give_the_same_state(AdamW8bit(rounding=rounding), dtype)

    def test_state_bytes_equal_the_formula(self, dtype, rounding):
        named = common.parameters(dtype)
        optimizer = AdamW8bit(rounding=rounding).build(named, common.LR, 0)
        common.run(optimizer, named, range(1))
        want = sum(8 * n if n < 4096 else 2 * n + 8 * -(-n // 256) for n in (p.numel() for _, p in named))
        want += 2 * sum(p.numel() for _, p in named) * (dtype == torch.bfloat16 and rounding == "fp32")
        assert common.state_bytes(optimizer) == want


def test_a_parameter_that_ends_within_a_block_learns_to_its_last_element():
    p = nn.Parameter(torch.ones(4999))
    optimizer = AdamW8bit().build([("w", p)], 0.1, 0)
    for _ in range(5):
        p.grad = torch.ones(4999)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4999,), 0.5), rtol=0.02, atol=0)


@pytest.mark.parametrize("compiled", [True, False])
def test_temporaries_are_a_few_slices_without_the_kernel_and_none_with_it(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(adam, "kernel", lambda: None)
    common.check_temporaries_are_bounded(AdamW8bit(), 16 << 19 if adam.kernel() is None else 4096)
