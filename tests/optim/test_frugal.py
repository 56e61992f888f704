import itertools

import pytest
import torch

from satchel.core.errors import UserError
from satchel.optim.adamw import AdamW
from satchel.optim.frugal import Frugal, draw_columns
from tests.optim import common

WIDE, TALL = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
CPU = torch.device("cpu")


def torch_adamw(named):
    matrices, vectors = ([p for _, p in named if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=common.LR, eps=1e-8)


def test_full_density_equals_torchs_adamw():
    ours, theirs = common.parameters(), common.parameters()
    got = common.run(Frugal(density=1.0, gap=5, weight_decay=0.1).build(ours, common.LR, 0), ours, range(20))
    torch.testing.assert_close(got, common.run(torch_adamw(theirs), theirs, range(20)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rule", "move"), [("sign", torch.sign), ("sgd", lambda g: g)])
def test_no_density_is_a_state_free_rule_on_matrices(rule, move):
    ours, want = common.parameters(), {}
    before = {name: p.detach().clone() for name, p in ours}
    optimizer = Frugal(density=0.0, rule=rule, rest=0.5).build(ours, common.LR, 0)
    for step in range(5):
        common.run(optimizer, ours, [step])
        for name, p in ours:
            want[name] = want.get(name, before[name]) - 0.5 * common.LR * move(p.grad)
    for name, p in ours:
        if name in (WIDE, TALL):
            torch.testing.assert_close(p.detach(), want[name], rtol=0, atol=1e-6)
            assert not any(t.numel() for t in optimizer.state[p].values() if isinstance(t, torch.Tensor))


def test_drawn_columns_move_as_under_adamw_and_the_others_by_signs():
    """Within one gap, AdamW on the gradient's drawn columns; together the two parts are the whole gradient."""
    ours, plain = common.parameters(), common.parameters()
    optimizer, adamw = Frugal(gap=50).build(ours, common.LR, 0), AdamW().build(plain, common.LR, 0)
    before = {name: p.detach().clone() for name, p in ours}
    signs = dict.fromkeys(before, 0.0)
    for step in range(8):
        common.run(optimizer, ours, [step])
        common.run(adamw, plain, [step])
        for name, p in ours:
            signs[name] = signs[name] + p.grad.sign()
    for (name, p), (_, q) in zip(ours, plain, strict=True):
        want = q.detach().clone()
        if name in (WIDE, TALL):
            columns = draw_columns(p.shape[1], p.shape[1] // 4, optimizer.state[p]["columns_seed"], CPU)
            others = torch.ones(p.shape[1], dtype=torch.bool).index_fill(0, columns, False)
            want[:, others] = (before[name] - common.LR * signs[name])[:, others]
        torch.testing.assert_close(p.detach(), want, rtol=0, atol=1e-6)


def test_moments_begin_anew_with_other_columns_after_each_gap():
    named = common.parameters()
    optimizer, seeds, before = Frugal(gap=3).build(named, common.LR, 0), [], None
    p = dict(named)[TALL]
    for step in range(7):
        common.run(optimizer, named, [step])
        seeds.append(optimizer.state[p]["columns_seed"])
        if step % 3 == 0:
            columns = draw_columns(64, 16, seeds[-1], CPU)
            fresh = 0.1 * p.grad.index_select(1, columns)
            torch.testing.assert_close(optimizer.state[p]["exp_avg"].view(96, 16), fresh)
            assert before is None or not torch.equal(before, columns)
            before = columns
    assert seeds[0] == seeds[2] != seeds[3] == seeds[5] != seeds[6]


def test_every_column_is_drawn_as_often():
    counts = torch.zeros(20)
    for seed in range(2000):
        columns = draw_columns(20, 5, seed, CPU)
        assert len(columns.unique()) == 5
        counts[columns] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 46  # chi-square, 19 degrees: p < 5e-4


@pytest.mark.parametrize(
    ("dtype", "rounding", "moments"),
    list(itertools.product((torch.float32, torch.bfloat16), ("stochastic", "fp32"), ("follow", "8bit"))),
)
class TestEveryChoice:
    def test_resume_is_bit_identical(self, dtype, rounding, moments):
        common.check_resume_is_bit_identical(Frugal(gap=4, rounding=rounding, moments=moments), dtype)

    def test_fake_tensors_give_the_same_state(self, dtype, rounding, moments):
        method = Frugal(gap=1, rounding=rounding, moments=moments)
        common.check_fake_tensors_give_the_same_state(method, dtype)

    def test_state_bytes_equal_the_formula(self, dtype, rounding, moments):
        named = common.parameters(dtype)
        optimizer = Frugal(rounding=rounding, moments=moments).build(named, common.LR, 0)
        common.run(optimizer, named, range(1))
        width, want = 4 if dtype == torch.float32 else 2, 0
        for name, p in named:
            n = p.numel() // 4 if name in (WIDE, TALL) else p.numel()
            quantised = 2 * n + 8 * -(-n // 256) if p.numel() >= 4096 else 8 * n
            want += quantised if moments == "8bit" else 2 * width * n
            want += 2 * p.numel() if rounding == "fp32" and dtype == torch.bfloat16 else 0
        assert common.state_bytes(optimizer) == want


def test_exact_rounding_follows_the_float32_master():
    common.check_exact_rounding_follows_the_float32_master(Frugal(rounding="fp32", moments="fp32"), Frugal())


def test_temporaries_are_those_of_the_drawn_columns_and_some_slices():
    drawn = 1024 * 768 // 4 * (2 + 4)  # their gradient, and their step
    common.check_temporaries_are_bounded(Frugal(), drawn + (20 << 19))


@pytest.mark.parametrize("knobs", [{"density": 1.5}, {"gap": 0}, {"rest": -1.0}, {"rule": "adam"}])
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        Frugal(**knobs)
