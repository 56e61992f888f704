import itertools

import pytest
import torch
from torch import nn

from satchel.core.errors import UserError
from satchel.optim.adamw import AdamW
from satchel.optim.muon import Muon, orthogonal
from tests.optim import common
from tests.tolerances import TOLERANCE

WIDE, TALL = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(("scaled", "theirs"), [("adamw", "match_rms_adamw"), ("original", "original")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_every_step_equals_torch_on_hidden_matrices_and_adamw_elsewhere(scaled, theirs, nesterov):
    ours, reference, plain = common.parameters(), common.parameters(), common.parameters()
    optimizer = Muon(weight_decay=0.1, nesterov=nesterov, scaled=scaled).build(ours, common.LR, 0)
    hidden = [p for name, p in reference if name in (WIDE, TALL)]
    other = torch.optim.Muon(hidden, common.LR, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=theirs)
    adamw = AdamW(weight_decay=0.1).build(plain, common.LR, 0)
    for step in range(20):
        for named, each in ((ours, optimizer), (reference, other), (plain, adamw)):
            common.run(each, named, [step])
        for (name, p), (_, q), (_, r) in zip(ours, reference, plain, strict=True):
            torch.testing.assert_close(p, q if name in (WIDE, TALL) else r, rtol=TOLERANCE[torch.float32], atol=1e-6)


@pytest.mark.parametrize("shape", [(96, 48), (64, 160)])
def test_singular_values_end_near_one_and_singular_vectors_stay(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    rotated = u.T @ orthogonal(g.clone()) @ v.T  # diagonal if the vectors stay
    assert rotated.diagonal().min() > 0.6 and rotated.diagonal().max() < 1.3
    assert (rotated - rotated.diagonal().diag()).abs().max() < 1e-2


@pytest.mark.parametrize("shape", [(128, 32), (48, 96)])
def test_a_hidden_matrix_moves_as_far_as_under_adamw_at_the_same_learning_rate(shape):
    moved = {}
    for method in (Muon(), AdamW()):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        method.build([("mlp.w", p)], 1.0, 0).step()
        moved[method.name] = p.detach().square().mean().sqrt().item()
    assert 0.1 * moved["adamw"] < moved["muon"] < 0.3 * moved["adamw"]  # AdamW's first step is its largest


@pytest.mark.parametrize(
    ("dtype", "rounding", "moments"),
    list(itertools.product((torch.float32, torch.bfloat16), ("stochastic", "fp32"), ("follow", "8bit"))),
)
class TestEveryChoice:
    def test_resume_is_bit_identical(self, dtype, rounding, moments):
        common.check_resume_is_bit_identical(Muon(rounding=rounding, moments=moments), dtype)

    def test_fake_tensors_give_the_same_state(self, dtype, rounding, moments):
        common.check_fake_tensors_give_the_same_state(Muon(rounding=rounding, moments=moments), dtype)

    def test_state_bytes_equal_the_formula(self, dtype, rounding, moments):
        named = common.parameters(dtype)
        optimizer = Muon(rounding=rounding, moments=moments).build(named, common.LR, 0)
        common.run(optimizer, named, range(1))
        width, want = 4 if dtype == torch.float32 else 2, 0
        for name, p in named:
            n, count = p.numel(), 1 if name in (WIDE, TALL) else 2
            moment = width if moments == "follow" else 4
            want += count * (n + 4 * -(-n // 256) if moments == "8bit" and n >= 4096 else moment * n)
            want += 2 * n * (rounding == "fp32" and dtype == torch.bfloat16)
        assert common.state_bytes(optimizer) == want


def test_exact_rounding_follows_the_float32_master():
    common.check_exact_rounding_follows_the_float32_master(Muon(rounding="fp32", moments="fp32"), Muon())


def test_temporaries_are_three_narrow_copies_of_the_matrix_and_some_slices():
    shape = (1024, 768)
    common.check_temporaries_are_bounded(Muon(), 3 * 2 * 1024 * 768 + 2 * 2 * 768**2 + (12 << 19), shape=shape)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="no parameter is a matrix of an attention or feed-forward block"):
        Muon().build([("w", nn.Parameter(torch.ones(8, 8)))], 1e-3, 0)


def test_the_usual_learning_rate_is_adamws_unless_unscaled():
    assert Muon().usual_lr(1e-4, adapted=False) == 1e-4
    assert Muon(scaled="original").usual_lr(1e-4, adapted=False) == 0.02


@pytest.mark.parametrize("knobs", [{"momentum": 1.0}, {"scaled": "none"}, {"moments": "4bit"}])
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        Muon(**knobs)
