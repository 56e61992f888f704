"""Properties that every weight format has."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from satchel.adapt.lora import Lora
from satchel.compress.int4 import Int4, Int4Linear
from satchel.compress.int8 import Int8, Int8Linear
from satchel.compress.nf4 import Nf4
from satchel.core.errors import ModelError
from satchel.model.adapters import adapter_parameters, attach, detach
from satchel.model.linear import dense_OI, linears, swap
from satchel.model.load import load
from satchel.model.tiles import TiledLinear
from satchel.native import linear as native
from tests.adapt.toys import Toy
from tests.model.blocky import blocky
from tests.tolerances import EIGHT_BITS, TOLERANCE, same

needs_compiler = pytest.mark.skipif(native.kernel() is None, reason="no C++ compiler")

TILED = [Int8(), Int8(group=32), Int4(), Int4(group=32, symmetric=True)]  # on a CPU with a compiler
IN_TORCH = [Int8(group=16), Nf4(), Nf4(double=False), Int4(group=16), Int4(group=16, symmetric=True)]
FORMATS = TILED + IN_TORCH
every_format = pytest.mark.parametrize("method", FORMATS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def weight(outputs=96, inputs=128, dtype=torch.bfloat16):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(3)).to(dtype) * 0.05


@every_format
@every_dtype
def test_output_is_that_of_the_dense_matrix_in_the_dtype_of_x(method, dtype):
    packed, x = method.pack(weight()), torch.randn(2, 3, 128, dtype=dtype)
    packed.bias = torch.randn(96)
    y = packed(x)
    assert y.dtype == dtype and y.shape == (2, 3, 96)
    assert torch.equal(y, nn.functional.linear(x, packed.dense(dtype), packed.bias.to(dtype)))


@every_format
def test_gradient_of_x_and_bias_is_that_of_the_dense_map(method):
    packed, x = method.pack(weight(8, 128)), torch.randn(3, 128, dtype=torch.float64, requires_grad=True)
    packed.bias = nn.Parameter(torch.randn(8, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x, bias: packed(x), (x, packed.bias))


@every_format
@pytest.mark.parametrize("gradients", [False, True])
def test_tangent_of_x_goes_through_the_dense_map(method, gradients):
    packed, x, tangent = method.pack(weight()), torch.randn(40, 128).bfloat16(), torch.randn(40, 128).bfloat16()
    with forward_ad.dual_level(), torch.set_grad_enabled(gradients):
        found = forward_ad.unpack_dual(packed(forward_ad.make_dual(x, tangent))).tangent
    assert same(found, tangent @ packed.dense(torch.bfloat16).T)


@every_format
def test_backward_keeps_neither_the_matrix_nor_x(method):
    packed, kept = method.pack(weight()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed(torch.randn(5, 128, requires_grad=True))
    assert kept == []


@every_format
def test_packing_is_the_same_in_chunks_as_at_once(method, monkeypatch):
    whole = method.pack(weight())
    matrix = whole.dense()
    monkeypatch.setattr("satchel.model.packed.CHUNK", 7 * 128)
    monkeypatch.setattr("satchel.model.layout.CHUNK", 7 * 128)
    parts = method.pack(weight())
    assert torch.equal(parts.dense(), matrix)
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), parts.buffers(), strict=True))


@every_format
def test_packing_what_was_unpacked_changes_little(method):
    once = method.pack(weight()).dense()
    twice = method.pack(once).dense()
    assert (twice - once).norm() < 0.02 * once.norm()


@every_format
def test_state_dict_carries_the_whole_map(method):
    packed, other = method.pack(weight()), method.pack(torch.zeros_like(weight()))
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other.dense(), packed.dense())


@every_format
def test_zero_rows_stay_zero(method):
    matrix = weight()
    matrix[3] = 0
    dense = method.pack(matrix).dense()
    assert dense.isfinite().all() and dense[3].abs().max() < 0.02 * matrix.abs().max()


@every_format
def test_trains_a_toy_under_an_adapter_and_keeps_its_matrix(method):
    model, x = Toy(), torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    target = x[:, :8].sin()
    for path, linear in linears(model).items():
        swap(model, path, method.pack(linear.weight.detach()))
    matrices = {path: dense_OI(m) for path, m in linears(model).items()}
    attach(model, Lora(rank=4), rng=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([p for _, p in adapter_parameters(model)], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    detach(model)
    assert all(torch.equal(dense_OI(m), matrices[path]) for path, m in linears(model).items())


@every_format
def test_packs_and_runs_on_fake_tensors(method):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        packed = method.pack(torch.empty(96, 128, dtype=torch.bfloat16))
        x = torch.empty(2, 3, 128, dtype=torch.bfloat16, requires_grad=True)
        packed(x).sum().backward()
        assert x.grad.shape == x.shape and packed.dense().dtype == torch.bfloat16


@pytest.mark.parametrize("method", [Int8(group=64), Nf4(), Int4()], ids=str)
def test_groups_that_do_not_fill_a_row_are_refused_with_those_that_would(method):
    with pytest.raises(
        ModelError, match=r"groups of 64 do not fill the 100 inputs of a \[8, 100\] matrix; 20, 50, 100"
    ):
        method.pack(torch.zeros(8, 100))


@every_dtype
@every_format
def test_error_is_within_half_a_step(method, dtype):
    matrix = weight(dtype=dtype)
    worst = (method.pack(matrix).dense(torch.float32) - matrix.float()).abs().max()
    step = {"int8": 2 / 254, "int4": 2 / 14, "nf4": 0.31}[method.name] * matrix.abs().max().float()
    assert worst <= step / 2 * (1 + TOLERANCE[torch.bfloat16])


@needs_compiler
@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("method", TILED, ids=str)
def test_answers_are_products_of_the_codes_themselves(method, rows):
    packed, x = method.pack(weight()), torch.randn(rows, 128)
    packed.bias = torch.randn(96)
    with torch.no_grad():
        ours, theirs = packed(x), nn.functional.linear(x, packed.dense(torch.float32), packed.bias)
    assert isinstance(packed, TiledLinear)
    assert (
        0 < (ours - theirs).norm() <= EIGHT_BITS * theirs.norm()
    )  # inputs of 8 bits, or of bfloat16 where there is AMX


@needs_compiler
@pytest.mark.parametrize("method", TILED, ids=str)
def test_tiles_hold_the_numbers_that_torch_packs_in_as_many_bytes(method, monkeypatch):
    ours = method.pack(weight())
    monkeypatch.setattr(native, "kernel", lambda level="auto": None)
    theirs = method.pack(weight())
    assert isinstance(ours, TiledLinear) and isinstance(theirs, Int8Linear | Int4Linear)
    assert torch.equal(ours.dense(torch.float32), theirs.dense(torch.float32))
    assert sum(b.nbytes for b in ours.buffers()) == sum(b.nbytes for b in theirs.buffers())


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("method", TILED, ids=str)
def test_a_matrix_in_float32_meets_no_rounded_inputs(method, rows):
    packed, x = method.pack(weight(dtype=torch.float32)), torch.randn(rows, 128)
    with torch.no_grad():
        assert same(packed(x), x @ packed.dense().T)


@needs_compiler
@pytest.mark.parametrize("method", [Int8(), Int8(group=50), Int4(group=10)], ids=str)
def test_rows_that_blocks_of_32_do_not_fill_are_packed_for_torch(method):
    packed, x = method.pack(weight(8, 100, torch.float32)), torch.randn(3, 100)
    with torch.no_grad():
        assert same(packed(x), x @ packed.dense().T)


@needs_compiler
@pytest.mark.parametrize("method", [*TILED, Nf4()], ids=str)
def test_embeddings_and_head_keep_their_numbers_in_tiles_where_nothing_trains(method, tmp_path):
    source = blocky(tmp_path, ("BF16",))
    plain, packed = load(source), load(source, format=method, frozen=True)
    tokens_BT = torch.randint(0, 203, (1, 9))
    assert isinstance(packed.lm_head, TiledLinear) and packed.lm_head.tiles is packed.model.embed_tokens.tiles
    assert torch.equal(packed.model.embed_tokens(tokens_BT), plain.model.embed_tokens(tokens_BT))
    assert torch.equal(packed.lm_head.dense(), plain.lm_head.weight)
    assert isinstance(load(source, format=method).lm_head, nn.Linear)
    assert isinstance(load(source, torch.float32, format=method, frozen=True).lm_head, nn.Linear)
