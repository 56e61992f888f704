import itertools

import pytest
import torch
from torch import nn

from satchel.core.errors import UserError
from satchel.optim._projector import PARTS, find_basis, is_tall, row_parts
from satchel.optim.adamw import AdamW
from satchel.optim.galore import GaLore
from tests.optim import common

WIDE, TALL = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"


def by_name(method, steps):
    named = common.parameters()
    return dict(zip(dict(named), common.run(method(named), named, range(steps)), strict=True))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_hundred_steps_equal_galore_torch_on_matrices_and_adamw_elsewhere(weight_decay):
    galore_torch = pytest.importorskip("galore_torch")
    low = {"rank": 8, "update_proj_gap": 20, "scale": 0.25, "proj_type": "std", "weight_decay": weight_decay}

    def reference(named):
        matrices = [p for name, p in named if name in (WIDE, TALL)]
        groups = [low | {"params": matrices}]
        return galore_torch.GaLoreAdamW(groups, lr=common.LR, eps=1e-8, no_deprecation_warning=True)

    knobs = {"weight_decay": weight_decay, "eps": 1e-8}
    ours = GaLore(rank=8, gap=20, scale=0.25, subspace="exact", **knobs)
    got = by_name(lambda named: ours.build(named, common.LR, 0), 100)
    projected = by_name(reference, 100)
    plain = by_name(lambda named: AdamW(**knobs).build(named, common.LR, 0), 100)
    for name, value in got.items():
        want = projected[name] if name in (WIDE, TALL) else plain[name]
        torch.testing.assert_close(value, want, rtol=0, atol=1e-5)


def test_blocks_are_projected_and_nothing_else():
    method, named = GaLore(rank=8), common.parameters()
    assert {name for name, p in named if method.projects(name, p)} == {WIDE, TALL}
    for name in ("transformer.h.0.attn.c_attn.weight", "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"):
        assert method.projects(name, torch.empty(64, 64))
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"):
        assert not method.projects(name, torch.empty(64, 64))


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (640, 512), (1000, 4096), (11008, 4096), (7, 1 << 20)])
def test_a_matrix_is_cut_into_whole_rows_all_of_them_in_few_parts(rows, columns):
    parts = list(row_parts(torch.empty(rows, columns)))
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows)) and len(parts) <= PARTS
    assert all(len(range(rows)[part]) <= max((1 << 18) // columns, -(-rows // PARTS)) for part in parts)


def decaying(rows, columns, power, dtype):
    """A matrix whose singular values fall as k^-power, as gradients' do."""
    rng = torch.Generator().manual_seed(0)
    side = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(n, side, generator=rng))[0] for n in (rows, columns))
    return (u * torch.arange(1, side + 1).pow(-power) @ v.T).to(dtype)


@pytest.mark.parametrize("shape", [(320, 128), (128, 320)])
@pytest.mark.parametrize("power", [0.3, 0.7, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_subspace_catches_the_energy_that_svd_does(shape, power, dtype):
    g, energy = decaying(*shape, power, dtype), {}
    for subspace in ("exact", "random"):
        basis = find_basis(g, 24, subspace, seed=1).float()
        low = g.float() @ basis.T if is_tall(g) else basis.T @ g.float()
        energy[subspace] = low.square().sum()
        gram = basis @ basis.T if is_tall(g) else basis.T @ basis
        torch.testing.assert_close(gram, torch.eye(24), rtol=0, atol=1e-5 if dtype == torch.float32 else 6e-3)
    assert energy["random"] >= 0.99 * energy["exact"]


def test_random_and_exact_subspaces_train_alike():
    """A regression onto a low-rank target: both end within 5% of each other, far below the start."""
    rng = torch.Generator().manual_seed(0)
    x, target = torch.randn(256, 48, generator=rng), torch.randn(256, 4, generator=rng) @ torch.randn(4, 40)
    final = {}
    for subspace in ("random", "exact"):
        w = nn.Parameter(torch.zeros(40, 48))
        optimizer = GaLore(rank=6, gap=20, scale=1.0, subspace=subspace).build([("mlp.w", w)], 0.02, 0)
        for _ in range(150):
            loss = (x @ w.T - target).square().mean()
            w.grad = torch.autograd.grad(loss, w)[0]
            optimizer.step()
        final[subspace] = (x @ w.T - target).square().mean().item()
    assert final["random"] == pytest.approx(final["exact"], rel=0.05)
    assert final["random"] < 0.95 * target.square().mean().item()


@pytest.mark.parametrize(
    ("dtype", "rounding", "moments"),
    list(itertools.product((torch.float32, torch.bfloat16), ("stochastic", "fp32"), ("follow", "8bit"))),
)
class TestEveryChoice:
    def test_resume_is_bit_identical(self, dtype, rounding, moments):
        common.check_resume_is_bit_identical(GaLore(rank=8, gap=4, rounding=rounding, moments=moments), dtype)

    def test_fake_tensors_give_the_same_state(self, dtype, rounding, moments):
        method = GaLore(rank=8, gap=1, rounding=rounding, moments=moments)
        common.check_fake_tensors_give_the_same_state(method, dtype)

    def test_state_bytes_equal_the_formula(self, dtype, rounding, moments):
        named, rank = common.parameters(dtype), 8
        method = GaLore(rank=rank, rounding=rounding, moments=moments)
        optimizer = method.build(named, common.LR, 0)
        common.run(optimizer, named, range(1))
        width, want = 4 if dtype == torch.float32 else 2, 0
        for name, p in named:
            projected = method.projects(name, p)
            n = rank * max(p.shape) if projected else p.numel()
            quantised = 2 * n + 8 * -(-n // 256) if p.numel() >= 4096 else 8 * n
            want += quantised if moments == "8bit" else 2 * width * n
            want += rank * min(p.shape) * width if projected else 0
            want += 2 * p.numel() if rounding == "fp32" and dtype == torch.bfloat16 else 0
        assert common.state_bytes(optimizer) == want


def test_state_of_projected_layers_is_at_most_two_fifths_of_adamws():
    shapes = {"mlp.up.weight": (256, 64), "attn.q.weight": (64, 64)}
    size = {}
    for method in (GaLore(rank=16), AdamW()):
        named = common.parameters(shapes=shapes)
        optimizer = method.build(named, common.LR, 0)
        common.run(optimizer, named, range(1))
        size[method.name] = common.state_bytes(optimizer)
    assert size["galore"] <= 0.4 * size["adamw"]


def test_small_updates_survive_in_bfloat16():
    """Along the way that float32 moves, bfloat16 with stochastic rounding moves as far."""
    start, moved = torch.ones(384, 384), {}
    rng = torch.Generator().manual_seed(0)
    gradient = torch.randn(384, 4, generator=rng) @ torch.randn(4, 384, generator=rng)
    for dtype in (torch.float32, torch.bfloat16):
        w = nn.Parameter(start.to(dtype, copy=True))
        optimizer = GaLore(rank=4, scale=1.0).build([("mlp.w", w)], 1e-4, 0)
        for _ in range(40):
            w.grad = gradient.to(dtype)
            optimizer.step()
        moved[dtype] = w.detach().float() - start
    way = moved[torch.float32]
    assert way.abs().median() < 40 * 2**-9  # no single step would survive rounding to nearest
    assert ((moved[torch.bfloat16] * way).sum() / way.square().sum()).item() == pytest.approx(1, abs=0.05)


def test_temporaries_are_bounded():
    common.check_temporaries_are_bounded(GaLore(rank=16), 16 << 19)


def test_a_rank_above_every_matrix_is_refused():
    with pytest.raises(UserError, match="leaves no matrix to project; choose one below 64"):
        GaLore(rank=500).build(common.parameters(), common.LR, 0)


@pytest.mark.parametrize("knobs", [{"rank": 0}, {"gap": 0}, {"scale": 0.0}, {"subspace": "svd"}, {"moments": "4bit"}])
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        GaLore(**knobs)
