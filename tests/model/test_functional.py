"""The memory-lean functions equal torch's own, forward and backward, and keep what they say they keep."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from satchel.model.functional import ACTS, chunked_cross_entropy, gated, rms_norm, rotate
from tests.tolerances import TOLERANCE


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("options", [{}, {"late_cast": True}, {"plus_one": True}])
def test_rms_norm_has_the_gradient_of_its_formula(options: dict) -> None:
    x, weight = doubles(2, 3, 8), doubles(8, seed=1)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5, **options), (x, weight))
    expected = F.rms_norm(x, (8,), weight + 1 if "plus_one" in options else weight, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, **options), expected)


@pytest.mark.parametrize("act", ACTS)
def test_gated_has_the_gradient_of_its_formula(act: str) -> None:
    gate, up = doubles(3, 8), doubles(3, 8, seed=1)
    assert torch.autograd.gradcheck(lambda g, u: gated(g, u, act), (gate, up))


def test_rotation_turns_pairs_and_leaves_the_rest_of_a_head() -> None:
    x, angle = doubles(2, 5, 3, 10), doubles(5, 4, seed=1).detach()
    assert torch.autograd.gradcheck(lambda x: rotate(x, angle.cos(), angle.sin()), (x,))
    pairs = torch.complex(x[..., :4], x[..., 4:8]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    expected = torch.cat([pairs.real, pairs.imag, x[..., 8:]], -1)
    torch.testing.assert_close(rotate(x, angle.cos(), angle.sin()), expected)


HEADS = [{}, {"softcap": 5.0}, {"scale": 0.5}, {"softcap": 3.0, "scale": 2.0}]
TARGETS = torch.tensor([3, 0, -100, 12, 5, -100, 7])


def plain_cross_entropy(x, weight, targets, softcap=None, scale=1.0, bias=None):
    logits = F.linear(x, weight) * scale + (0 if bias is None else bias)
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    return F.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("trains", ["x", "all"])
@pytest.mark.parametrize("options", HEADS)
def test_chunked_cross_entropy_has_the_gradient_of_its_formula(options: dict, trains: str) -> None:
    x, weight, bias = doubles(7, 6), doubles(13, 6, seed=1), doubles(13, seed=2)
    weight.requires_grad_(trains == "all")
    bias.requires_grad_(trains == "all")

    def loss(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(x, weight, TARGETS, chunk=4, bias=bias, **options)

    assert torch.autograd.gradcheck(loss, (x, weight, bias))
    torch.testing.assert_close(loss(x, weight, bias), plain_cross_entropy(x, weight, TARGETS, bias=bias, **options))


def test_weight_gradient_over_chunks_is_as_precise_as_one_product() -> None:
    x, weight = doubles(512, 16), doubles(97, 16, seed=1)
    targets = torch.randint(0, 97, (512,), generator=torch.Generator().manual_seed(0))
    (exact,) = torch.autograd.grad(plain_cross_entropy(x, weight, targets), weight)
    low_x, low_w = (t.detach().bfloat16().requires_grad_() for t in (x, weight))
    (whole,) = torch.autograd.grad(plain_cross_entropy(low_x, low_w, targets), low_w)
    (chunked,) = torch.autograd.grad(chunked_cross_entropy(low_x, low_w, targets, chunk=16), low_w)
    assert (chunked - exact).norm() <= 1.05 * (whole - exact).norm()


def test_without_gradients_the_loss_is_the_same() -> None:
    x, weight = doubles(7, 6), doubles(13, 6, seed=1)
    with torch.no_grad():
        loss = chunked_cross_entropy(x, weight, TARGETS, chunk=4)
    torch.testing.assert_close(loss, plain_cross_entropy(x, weight, TARGETS))


def test_rows_without_a_target_get_no_gradient_even_if_they_are_all() -> None:
    x, weight = doubles(3, 6), doubles(13, 6, seed=1)
    loss = chunked_cross_entropy(x, weight, torch.full((3,), -100))
    loss.backward()
    assert loss == 0 and not x.grad.any() and not weight.grad.any()


def test_loss_survives_logits_far_apart() -> None:
    x = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[500.0, 0.0], [-500.0, 0.0]])
    assert chunked_cross_entropy(x, weight, torch.tensor([1])) == 1000


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_functions_keep_the_type_of_their_input(dtype: torch.dtype) -> None:
    x = doubles(2, 4, 8).detach().to(dtype)
    weight = doubles(8, seed=1).detach().to(dtype)
    norm = rms_norm(x, weight, 1e-5)
    assert norm.dtype == dtype
    expected = F.rms_norm(x.double(), (8,), weight.double(), 1e-5)
    torch.testing.assert_close(norm.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_forward_and_backward_run_without_data() -> None:
    with FakeTensorMode():
        x = torch.empty(32, 8, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(50, 8, dtype=torch.bfloat16, requires_grad=True)
        norm = rms_norm(x, torch.empty(8, dtype=torch.bfloat16, requires_grad=True))
        loss = chunked_cross_entropy(gated(norm, x, "silu"), weight, torch.empty(32, dtype=torch.long), chunk=4)
        loss.backward()
        assert x.grad.shape == x.shape and weight.grad.dtype == torch.bfloat16
