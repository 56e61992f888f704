"""GradNormLoRP conditions gradients as autograd does through m * V / |V|, and keeps little more than GaLore's state."""

import itertools

import pytest
import torch

from satchel.optim.adamw import AdamW
from satchel.optim.galore import GaLore
from satchel.optim.gradnormlorp import GradNormLoRP, condition_
from tests.optim import common
from tests.tolerances import TOLERANCE

WIDE, TALL = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
EXACT = TOLERANCE[torch.float32]


def through(v_OI, m_O):
    """The matrix that directions and magnitudes make."""
    return m_O[:, None] * v_OI / v_OI.norm(dim=1, keepdim=True)


def autograd(w_OI, g_OI, m_O):
    """Gradients of V and m at V = W, for the gradient of the matrix."""
    v_OI, m_O = w_OI.clone().requires_grad_(), m_O.clone().requires_grad_()
    (through(v_OI, m_O) * g_OI).sum().backward()
    return v_OI.grad, m_O.grad


@pytest.mark.parametrize("shape", [(96, 64), (64, 160)])
def test_gradients_of_directions_and_magnitudes_equal_autograds(shape):
    rng = torch.Generator().manual_seed(0)
    w_OI, g_OI = (torch.randn(shape, generator=rng) for _ in "wg")
    m_O = w_OI.norm(dim=1)
    want_v, want_m = autograd(w_OI, g_OI, m_O)
    slope_O = condition_(g_OI, w_OI, {"magnitude": m_O})
    torch.testing.assert_close(g_OI, want_v, rtol=0, atol=1e-5)
    torch.testing.assert_close(slope_O, want_m, rtol=0, atol=1e-5)
    assert (w_OI * g_OI).sum(1).abs().max() < 1e-4  # nothing is left along the rows


@pytest.mark.parametrize("name", [WIDE, TALL])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_galores_on_directions_and_adams_on_magnitudes(name, weight_decay):
    """Against torch's AdamW on m, and our GaLore on V, whose gradients autograd makes."""
    named = [(name, p) for key, p in common.parameters() if key == name]
    method = GradNormLoRP(rank=8, gap=4, subspace="exact", weight_decay=weight_decay)
    optimizer, p = method.build(named, common.LR, 0), named[0][1]
    v = torch.nn.Parameter(p.detach().clone())
    m = torch.nn.Parameter(v.detach().norm(dim=1))
    galore = GaLore(rank=8, gap=4, subspace="exact").build([(name, v)], common.LR, 0)
    adamw = torch.optim.AdamW([m], lr=common.LR, weight_decay=weight_decay)
    for step in range(10):
        common.give_gradients(named, step)
        v.grad, m.grad = autograd(p.detach(), p.grad, m.detach())
        optimizer.step()
        galore.step()
        adamw.step()
        with torch.no_grad():
            v.copy_(through(v, m))  # directions go on from where the matrix is
        torch.testing.assert_close(p, v, rtol=EXACT, atol=1e-5)
        torch.testing.assert_close(optimizer.state[p]["magnitude"], m.detach(), rtol=EXACT, atol=1e-6)


def test_rows_have_the_magnitudes_of_the_state_and_the_rest_takes_adamw():
    ours, plain = common.parameters(), common.parameters()
    optimizer = GradNormLoRP(rank=8, gap=5).build(ours, common.LR, 0)
    common.run(optimizer, ours, range(12))
    common.run(AdamW().build(plain, common.LR, 0), plain, range(12))
    for (name, p), (_, q) in zip(ours, plain, strict=True):
        if name in (WIDE, TALL):
            torch.testing.assert_close(p.norm(dim=1), optimizer.state[p]["magnitude"], rtol=EXACT, atol=1e-6)
        else:
            assert torch.equal(p, q), name


def test_magnitudes_move_in_bfloat16_though_no_element_of_a_row_could():
    """The gradient points along every row; at this rate rounding to nearest would lose each step."""
    p = torch.nn.Parameter(torch.ones(32, 32, dtype=torch.bfloat16))
    optimizer = GradNormLoRP(rank=4).build([("mlp.w", p)], 1e-4, 0)
    for _ in range(40):
        p.grad = torch.ones_like(p)
        optimizer.step()
    moved = 32**0.5 - optimizer.state[p]["magnitude"]
    half_unit = 2**-22  # of float32 between 4 and 8, lost a step
    torch.testing.assert_close(moved, torch.full((32,), 40e-4), rtol=0, atol=40 * half_unit)
    assert (p.float().norm(dim=1).mean() - (32**0.5 - 40e-4)).abs() < 2e-3  # right on average


def test_rows_of_zeros_leave_zero_by_the_projected_step():
    p = torch.nn.Parameter(torch.zeros(32, 24))
    optimizer = GradNormLoRP(rank=8).build([("mlp.w", p)], common.LR, 0)
    named = [("mlp.w", p)]
    common.run(optimizer, named, range(1))
    first = p.detach().clone()
    assert (first.norm(dim=1) > 0).all()
    torch.testing.assert_close(optimizer.state[p]["magnitude"], first.norm(dim=1), rtol=EXACT, atol=0)
    common.run(optimizer, named, range(1, 5))
    assert p.isfinite().all() and not torch.equal(p, first)


def test_a_magnitude_that_passes_zero_turns_its_row_around():
    """As m * V / |V| does, whose gradients are those of autograd still."""
    p = torch.nn.Parameter(torch.full((8, 6), 1e-3))
    optimizer = GradNormLoRP(rank=2, eps=1e-12).build([("mlp.w", p)], 1e-2, 0)
    for _ in range(3):
        p.grad = torch.ones_like(p)  # downwards, past zero
        optimizer.step()
    assert (p < 0).all() and (optimizer.state[p]["magnitude"] < 0).all()
    g_OI = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    m_O = optimizer.state[p]["magnitude"]
    want_v, want_m = autograd(-p.detach(), g_OI, m_O)
    torch.testing.assert_close(condition_(g_OI, p, {"magnitude": m_O}), want_m, rtol=0, atol=1e-5)
    torch.testing.assert_close(g_OI, -want_v, rtol=0, atol=1e-5)  # of W, which points against V


@pytest.mark.parametrize(
    ("dtype", "rounding", "moments"),
    list(itertools.product((torch.float32, torch.bfloat16), ("stochastic", "fp32"), ("follow", "8bit"))),
)
class TestEveryChoice:
    def test_resume_is_bit_identical(self, dtype, rounding, moments):
        common.check_resume_is_bit_identical(GradNormLoRP(rank=8, gap=4, rounding=rounding, moments=moments), dtype)

    def test_fake_tensors_give_the_same_state(self, dtype, rounding, moments):
        method = GradNormLoRP(rank=8, gap=1, rounding=rounding, moments=moments)
        common.check_fake_tensors_give_the_same_state(method, dtype)

    def test_state_bytes_are_galores_and_twelve_a_row(self, dtype, rounding, moments):
        size, rows = {}, 0
        for method in (GradNormLoRP, GaLore):
            named = common.parameters(dtype)
            optimizer = method(rank=8, rounding=rounding, moments=moments).build(named, common.LR, 0)
            common.run(optimizer, named, range(1))
            size[method] = common.state_bytes(optimizer)
            rows = sum(p.shape[0] for name, p in named if name in (WIDE, TALL))
        assert size[GradNormLoRP] - size[GaLore] == 12 * rows


def test_in_8_bits_the_state_of_projected_layers_is_below_fifteen_hundredths_of_adamws():
    shapes = {"mlp.up.weight": (512, 128), "attn.q.weight": (128, 128)}
    size = {}
    for method in (GradNormLoRP(rank=16, moments="8bit"), AdamW()):
        named = common.parameters(shapes=shapes)
        optimizer = method.build(named, common.LR, 0)
        common.run(optimizer, named, range(1))
        size[method.name] = common.state_bytes(optimizer)
    assert size["gradnormlorp"] <= 0.15 * size["adamw"]


def test_updates_within_the_backward_pass_are_the_same():
    results = []
    for layerwise in (False, True):
        named = common.parameters()
        optimizer = GradNormLoRP(rank=8, gap=3, layerwise=layerwise).build(named, common.LR, 0)

        def closure(named=named):
            loss = sum((p - 0.1).square().sum() for _, p in named)
            loss.backward()
            return loss

        for _ in range(6):
            optimizer.zero_grad()
            optimizer.step(closure)
        results.append([p.detach() for _, p in named])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_temporaries_are_bounded():
    common.check_temporaries_are_bounded(GradNormLoRP(rank=16), 32 << 19)
