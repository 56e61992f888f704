import itertools

import pytest
import torch

from satchel.core.errors import UserError
from satchel.optim.galore import GaLore
from satchel.optim.natural_galore import NaturalGaLore
from tests.optim import common
from tests.tolerances import TOLERANCE

WIDE, TALL = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
SMALL = {"rank": 8, "gap": 4, "history": 3}


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_natural_gradients_solve_the_dense_system(size):
    """At every step, the gradient after the last ones, oldest overwritten; float64."""
    rng, damping = torch.Generator().manual_seed(0), 1e-3
    history, seen = torch.zeros(3, 40, dtype=torch.float64), []
    for step in range(8):
        g = size * torch.randn(40, generator=rng, dtype=torch.float64)
        seen = [*seen, g][-3:]
        got = torch.empty_like(g)
        torch.ops.satchel.natural_(got, g, history, step % 3, damping)
        fisher = damping * torch.eye(40, dtype=torch.float64) + sum(torch.outer(x, x) for x in seen)
        torch.testing.assert_close(got, torch.linalg.solve(fisher, g), rtol=TOLERANCE[torch.float32], atol=0)


def test_float32_is_exact_where_the_gradient_is_large():
    """The textbook form g / damping - H z / damping^2 would lose every digit here."""
    g = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 30
    got = torch.empty_like(g)
    torch.ops.satchel.natural_(got, g, torch.zeros(4, 1000), 0, 1e-3)
    torch.testing.assert_close(got.double(), g.double() / (1e-3 + g.double().square().sum()), rtol=1e-5, atol=0)


def test_without_history_a_hundred_steps_equal_galore_torch_with_a_smaller_epsilon():
    galore_torch = pytest.importorskip("galore_torch")
    ours, theirs = common.parameters(), common.parameters()
    knobs = {"rank": 8, "gap": 20, "subspace": "exact", "weight_decay": 0.1}
    optimizer = NaturalGaLore(history=0, damping=1e-3, eps=1e-5, **knobs).build(ours, common.LR, 0)
    low = {"rank": 8, "update_proj_gap": 20, "scale": 0.25, "proj_type": "std", "weight_decay": 0.1}
    groups = [low | {"params": [p for name, p in theirs if name in (WIDE, TALL)]}]
    reference = galore_torch.GaLoreAdamW(groups, lr=common.LR, eps=1e-8, no_deprecation_warning=True)
    for step in range(100):
        common.run(optimizer, ours, [step])
        common.run(reference, theirs, [step])
        for (name, p), (_, q) in zip(ours, theirs, strict=True):
            if name in (WIDE, TALL):
                torch.testing.assert_close(p, q, rtol=TOLERANCE[torch.float32], atol=1e-5)


def test_the_history_is_emptied_when_the_subspace_changes():
    named = common.parameters()
    optimizer = NaturalGaLore(**SMALL).build(named, common.LR, 0)
    filled = []
    for step in range(9):
        common.run(optimizer, named, [step])
        history = next(optimizer.state[p]["history"] for name, p in named if name == TALL)
        filled.append(int((history.abs().sum(1) > 0).sum()))
    assert filled == [1, 2, 3, 3, 1, 2, 3, 3, 1]


def test_only_the_projected_matrices_move_otherwise_than_under_galore():
    results = []
    for method in (NaturalGaLore(**SMALL), GaLore(rank=8, gap=4)):
        named = common.parameters()
        moved = common.run(method.build(named, common.LR, 0), named, range(6))
        results.append(dict(zip(dict(named), moved, strict=True)))
    same = {name for name in results[0] if torch.equal(results[0][name], results[1][name])}
    assert same == set(results[0]) - {WIDE, TALL}


def test_updates_within_the_backward_pass_are_the_same():
    results = []
    for layerwise in (False, True):
        named = common.parameters()
        optimizer = NaturalGaLore(**SMALL, layerwise=layerwise).build(named, common.LR, 0)

        def closure(named=named):
            loss = sum((p - 0.1).square().sum() for _, p in named)
            loss.backward()
            return loss

        for _ in range(6):
            optimizer.zero_grad()
            optimizer.step(closure)
        results.append([p.detach() for _, p in named])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("dtype", "rounding", "moments"),
    list(itertools.product((torch.float32, torch.bfloat16), ("stochastic", "fp32"), ("follow", "8bit"))),
)
class TestEveryChoice:
    def test_resume_is_bit_identical(self, dtype, rounding, moments):
        common.check_resume_is_bit_identical(NaturalGaLore(**SMALL, rounding=rounding, moments=moments), dtype)

    def test_fake_tensors_give_the_same_state(self, dtype, rounding, moments):
        method = NaturalGaLore(**SMALL, rounding=rounding, moments=moments)
        common.check_fake_tensors_give_the_same_state(method, dtype)

    def test_state_is_galores_and_the_history(self, dtype, rounding, moments):
        sizes = []
        knobs = {"rounding": rounding, "moments": moments}
        for method in (NaturalGaLore(**SMALL, **knobs), GaLore(rank=8, **knobs)):
            named = common.parameters(dtype)
            optimizer = method.build(named, common.LR, 0)
            common.run(optimizer, named, range(1))
            sizes.append(common.state_bytes(optimizer))
        assert sizes[0] - sizes[1] == 3 * 8 * (160 + 96) * (4 if dtype == torch.float32 else 2)


def test_temporaries_are_bounded():
    common.check_temporaries_are_bounded(NaturalGaLore(rank=16), 16 << 19)


def test_the_usual_learning_rate_is_galores():
    assert NaturalGaLore(**SMALL).usual_lr(1e-4, adapted=False) == 4e-4


@pytest.mark.parametrize("knobs", [{"history": -1}, {"damping": 0.0}, {"rank": 0}])
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        NaturalGaLore(**knobs)
