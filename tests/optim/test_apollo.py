import itertools

import pytest
import torch

from satchel.core.errors import UserError
from satchel.optim import apollo
from satchel.optim.adamw import AdamW
from satchel.optim.apollo import Apollo, random_basis, scaling
from tests.optim import common

apollo_torch = pytest.importorskip("apollo_torch.apollo")

WIDE, TALL = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
SMALL = {"rank": 8, "gap": 4}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_every_step_equals_apollo_torch_on_matrices_and_adamw_elsewhere(weight_decay, monkeypatch):
    check_every_step_equals(apollo_torch, Apollo(weight_decay=weight_decay, **SMALL), "channel", monkeypatch)


def check_every_step_equals(library, method, granularity, monkeypatch):
    """Given the same random projections: each library draws its own."""

    def basis(_, matrix, rank, **kwargs):
        return random_basis(matrix, rank, seed=9)

    monkeypatch.setattr(library.GradientProjector, "get_orthogonal_matrix", basis)
    monkeypatch.setattr(apollo, "random_basis", lambda p, rank, seed: random_basis(p, rank, seed=9))
    ours, reference, plain = common.parameters(), common.parameters(), common.parameters()
    optimizer = method.build(ours, common.LR, 0)
    knobs = {"rank": method.rank, "proj": "random", "update_proj_gap": method.gap, "scale": method.scale}
    group = knobs | {"params": [p for name, p in reference if name in (WIDE, TALL)], "scale_type": granularity}
    other = library.AdamW([group | {"proj_type": "std", "weight_decay": method.weight_decay}], lr=common.LR, eps=1e-8)
    adamw = AdamW(weight_decay=method.weight_decay).build(plain, common.LR, 0)
    for step in range(30):
        for named, each in ((ours, optimizer), (reference, other), (plain, adamw)):
            common.run(each, named, [step])
        for (name, p), (_, q), (_, r) in zip(ours, reference, plain, strict=True):
            torch.testing.assert_close(p, q if name in (WIDE, TALL) else r, rtol=1e-5, atol=1e-5)


def test_the_scales_approach_those_of_adam_in_the_full_space_as_the_rank_grows():
    """The paper's reason: a random subspace keeps the norms of channels, of gradients and of their moments."""
    rng, error = torch.Generator().manual_seed(0), {}
    history = [torch.randn(256, 64, generator=rng) * torch.rand(256, 1, generator=rng) for _ in range(8)]

    def scales(project):
        m = v = 0.0
        for g in map(project, history):
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        return scaling(m / (v.sqrt() + 1e-8), project(history[-1]), "channel")

    full = scales(lambda g: g)
    for rank in (2, 48):
        q = random_basis(history[0], rank, seed=1)
        ratio = scales(lambda g, q=q: g @ q.T) / full * (64 / rank) ** 0.5  # Adam's direction has R elements, not I
        error[rank] = ratio.log().abs().median().item()
    assert error[48] < 0.15 < error[2]


def test_the_norm_grows_by_at_most_a_hundredth_a_step():
    named = common.parameters()
    optimizer = Apollo(**SMALL).build(named, common.LR, 0)
    common.run(optimizer, named, [0])
    small = [optimizer.state[p]["norm"].mul_(0.01).item() for name, p in named if name in (WIDE, TALL)]
    common.run(optimizer, named, [1])
    norms = [optimizer.state[p]["norm"].item() for name, p in named if name in (WIDE, TALL)]
    assert norms == pytest.approx([1.01 * norm for norm in small], rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "rounding", "moments"),
    list(itertools.product((torch.float32, torch.bfloat16), ("stochastic", "fp32"), ("follow", "8bit"))),
)
class TestEveryChoice:
    def test_resume_is_bit_identical(self, dtype, rounding, moments):
        common.check_resume_is_bit_identical(Apollo(**SMALL, rounding=rounding, moments=moments), dtype)

    def test_fake_tensors_give_the_same_state(self, dtype, rounding, moments):
        common.check_fake_tensors_give_the_same_state(Apollo(**SMALL, rounding=rounding, moments=moments), dtype)

    def test_state_bytes_equal_the_formula(self, dtype, rounding, moments):
        named, rank = common.parameters(dtype), 8
        optimizer = Apollo(**SMALL, rounding=rounding, moments=moments).build(named, common.LR, 0)
        common.run(optimizer, named, range(1))
        width, want = 4 if dtype == torch.float32 else 2, 0
        for name, p in named:
            n = rank * max(p.shape) if name in (WIDE, TALL) else p.numel()
            quantised = 2 * n + 8 * -(-n // 256) if p.numel() >= 4096 else 8 * n
            want += quantised if moments == "8bit" else 2 * width * n
            want += 4 * (name in (WIDE, TALL))  # the norm
            want += 2 * p.numel() if rounding == "fp32" and dtype == torch.bfloat16 else 0
        assert common.state_bytes(optimizer) == want


def test_temporaries_are_bounded():
    common.check_temporaries_are_bounded(Apollo(rank=16), 20 << 19)


@pytest.mark.parametrize("knobs", [{"rank": 0}, {"gap": 0}, {"scale": 0.0}, {"moments": "4bit"}])
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        Apollo(**knobs)
