"""The small operators equal torch's arithmetic in float64, at every class of shapes, on any number of threads."""

import pytest
import torch
import torch.nn.functional as F

from satchel.core.errors import UserError
from satchel.model import functional
from satchel.native import gated, pointwise, rms_norm, rotate
from satchel.native.build import compiler
from tests.tolerances import same

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ROWS = (0, 1, 3, 700)  # the last on several threads
WIDTHS = (1, 15, 16, 33, 576, 1000)
ACTS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}
assert set(ACTS) == set(pointwise.ACTS) == set(functional.ACTS)


def numbers(*shape, dtype, seed=0, scale=3.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@DTYPES
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("options", [{}, {"late_cast": True}, {"plus_one": True}], ids=str)
def test_rms_norm_equals_torch(dtype, width, options):
    for rows in ROWS:
        x, weight = numbers(rows, width, dtype=dtype), numbers(width, dtype=dtype, seed=1, scale=1.0)
        full = weight.double() + bool(options.get("plus_one"))
        assert same(rms_norm(x, weight, 1e-5, **options), F.rms_norm(x.double(), (width,), full, 1e-5).to(dtype))


@DTYPES
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_gated_equals_torch(dtype, act, width):
    for rows in ROWS:
        gate, up = numbers(rows, width, dtype=dtype), numbers(rows, width, dtype=dtype, seed=1)
        assert same(gated(gate, up, act), (ACTS[act](gate.double()) * up.double()).to(dtype))


@pytest.mark.parametrize("act", ACTS)
def test_far_from_zero_each_activation_is_what_it_tends_to(act):
    x = torch.tensor([-200.0, -90.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 90.0, 3e38, float("inf"), float("nan")])
    got, expected = gated(x[None], torch.ones(1, len(x)), act)[0], ACTS[act](x.double()).float()
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-7)


@DTYPES
@pytest.mark.parametrize(("dim", "half"), [(2, 1), (10, 4), (64, 32), (66, 33), (80, 16)])
def test_rotation_equals_the_decoders_own(dtype, dim, half):
    for batch, tokens, heads in ((1, 1, 1), (2, 5, 3), (1, 700, 9)):
        angle = numbers(tokens, half, dtype=torch.float32, seed=1)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        x = numbers(batch, tokens, heads, dim, dtype=dtype)
        expected = functional.rotate(x.double(), cos.double(), sin.double()).to(dtype)
        assert same(rotate(x, cos, sin), expected)


def test_rows_may_lie_apart():
    """As queries, keys, gate and up do in the result of one fused product."""
    x = numbers(1, 5, 96, dtype=torch.bfloat16)
    q, k = x[..., :64].unflatten(-1, (4, 16)), x[..., 64:].unflatten(-1, (2, 16))
    angle = numbers(5, 8, dtype=torch.float32)
    tables = angle.cos().bfloat16(), angle.sin().bfloat16()
    for part in (q, k, q.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(rotate(part, *tables), rotate(part.contiguous(), *tables))
    gate, up = x.split(48, -1)
    assert torch.equal(gated(gate, up), gated(gate.contiguous(), up.contiguous()))
    assert torch.equal(
        gated(gate[0, :, ::2], up[0, :, ::2]), gated(gate[0, :, ::2].contiguous(), up[0, :, ::2].contiguous())
    )


def test_a_row_depends_on_no_other_and_threads_change_nothing():
    x, weight = numbers(900, 640, dtype=torch.bfloat16), numbers(640, dtype=torch.bfloat16, seed=1)
    before, whole = torch.get_num_threads(), rms_norm(x, weight)
    try:
        torch.set_num_threads(3)
        assert torch.equal(rms_norm(x, weight), whole)
        assert torch.equal(gated(x, x)[7:8], gated(x[7:8], x[7:8]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(rms_norm(x[7:8], weight), whole[7:8])


def test_the_decoders_functions_take_the_kernels_where_no_gradient_can_be_asked_for(monkeypatch):
    x, weight = numbers(2, 3, 64, dtype=torch.bfloat16), numbers(64, dtype=torch.bfloat16)
    expected, calls, normed = functional.rms_norm(x, weight), [], pointwise.normed
    monkeypatch.setattr(pointwise, "normed", lambda *a: calls.append(a) or normed(*a))
    with torch.no_grad():
        functional.rms_norm(x, weight)
    assert not calls
    with torch.inference_mode():
        assert same(functional.rms_norm(x, weight), expected)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda x: rms_norm(x.half(), x.half()[0]),
        lambda x: rms_norm(x, x[0, :3]),
        lambda x: gated(x, x, "tanh"),
        lambda x: gated(x, x[:1]),
        lambda x: gated(x, x.bfloat16()),
        lambda x: rotate(x[None, None], x[:, :5], x[:, :5]),
    ],
)
def test_what_does_not_fit_is_a_users_error(call):
    with pytest.raises(UserError, match="rms_norm|gated|rotate"):
        call(torch.ones(4, 8))
