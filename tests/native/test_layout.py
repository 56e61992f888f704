"""Matrices laid in tiles by the kernel are those that torch lays, byte for byte."""

import pytest
import torch

from satchel.model.encodings import ENCODINGS
from satchel.model.layout import PLAIN_NAMES, tiles_in_torch, tiles_of, tiles_of_numbers, tiles_q8, tiles_q8_in_torch
from satchel.native import layout
from satchel.native.build import compiler
from satchel.native.linear import KINDS, form
from tests.model.blocky import raw_blocks

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
BLOCKS = [kind for kind in layout.CONVERTED if kind.startswith("Q")]


def numbers(outputs: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Of every size that float16 scales can bear, with rows of zeros and numbers that lie halfway."""
    rng = torch.Generator().manual_seed(0)
    size_O1 = 10 ** torch.linspace(-9, 3, outputs)[:, None]
    weight_OI = torch.randn(outputs, inputs, generator=rng) * size_O1
    weight_OI[0] = 0
    weight_OI[1] = torch.arange(inputs) % 32 * 0.5
    weight_OI[1, ::32] = 127
    return weight_OI.to(dtype)


@pytest.mark.parametrize("outputs", [1, 16, 75])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_are_multiplied_by_keep_their_bytes(kind, outputs):
    raw_OB = torch.randint(0, 256, (outputs, 3 * form(kind).nbytes), dtype=torch.uint8)
    assert torch.equal(tiles_of(raw_OB, kind), tiles_in_torch(raw_OB, kind))


@pytest.mark.parametrize("outputs", [1, 16, 75])
@pytest.mark.parametrize("kind", BLOCKS)
def test_other_blocks_become_the_codes_that_torch_makes_of_their_numbers(kind, outputs):
    raw_OB = raw_blocks(kind, outputs, 3 * ENCODINGS[kind].values, torch.Generator().manual_seed(0))
    if kind in ("Q5_1", "Q5_K"):
        raw_NB = raw_OB.view(-1, ENCODINGS[kind].nbytes)
        raw_NB[:, 2:4] = raw_NB[:, :2]  # the offsets' scale
    assert torch.equal(tiles_q8(raw_OB, kind), tiles_q8_in_torch(raw_OB, kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_become_the_codes_that_torch_makes_of_them(dtype):
    weight_OI = numbers(75, 96, dtype)
    raw_OB = weight_OI.view(torch.uint8)
    expected = tiles_q8_in_torch(raw_OB, PLAIN_NAMES[dtype])
    assert torch.equal(tiles_of_numbers(weight_OI), expected)
    assert torch.equal(tiles_of_numbers(weight_OI.T.contiguous().T), expected)


def test_a_kind_that_the_kernel_does_not_read_is_converted_by_torch():
    weight_OI = numbers(20, 64, torch.float64)
    assert torch.equal(tiles_of_numbers(weight_OI), tiles_of_numbers(weight_OI.float()))
