"""Products with matrices in blocks are those of the numbers in the blocks, at every level of instructions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from satchel.model.blocks import decode
from satchel.model.tiling import tile, untile
from satchel.native import levels
from satchel.native.build import compiler
from satchel.native.linear import KINDS, ROWS, example, form, kernel, matrix
from tests.tolerances import EIGHT_BITS, TOLERANCE

LEVELS = [level for level in levels.supported() if kernel(level)]
MANY = 32  # rows from which AMX multiplies in bfloat16

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


def blocks(kind: str, outputs: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tiles of a matrix, and its numbers [O, I] as torch decodes them."""
    padded = -(-outputs // ROWS) * ROWS
    tiles = example(kind, padded, inputs, torch.Generator().manual_seed(seed))
    raw_OB = untile(tiles, kind, inputs)
    dense_OI = raw_OB.view(torch.bfloat16) if kind == "BF16" else decode(raw_OB, kind)
    return tiles, dense_OI[:outputs].float()


def product(level: str, kind: str, tiles: torch.Tensor, x_NI: torch.Tensor, outputs: int, bias_O=None) -> torch.Tensor:
    y_NO = x_NI.new_full((len(x_NI), outputs), torch.nan)
    kernel(level).linear(matrix(tiles, bias_O, kind, outputs, x_NI.shape[1]), x_NI, y_NO)
    return y_NO


def coded(x_NI: torch.Tensor) -> torch.Tensor:
    """What few rows are multiplied as: 8 bits with a scale for each 32 inputs."""
    x_NMQ = x_NI.unflatten(1, (-1, 32))
    top_NM1 = x_NMQ.abs().amax(-1, keepdim=True)
    code_NMQ = (x_NMQ.double() * (127 / top_NM1)).round().float()
    return (code_NMQ * (top_NM1 / 127)).flatten(1)


def test_every_level_of_this_processor_compiles_and_is_right():
    assert tuple(LEVELS) == levels.supported()


def close(y_NO: torch.Tensor, expected_NO: torch.Tensor, tolerance: float) -> bool:
    return bool((y_NO.float() - expected_NO).norm() <= tolerance * expected_NO.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_hold_the_same_bytes_in_another_order(kind):
    raw_OB = torch.randint(0, 256, (32, 3 * form(kind).nbytes), dtype=torch.uint8)
    tiles = tile(raw_OB, kind)
    assert tiles.numel() == raw_OB.numel()
    assert torch.equal(untile(tiles, kind, 3 * form(kind).inputs), raw_OB)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_numbers_of_the_blocks_bit_for_bit(level, kind):
    tiles, dense_OI = blocks(kind, 48, 768)
    at_N = torch.tensor([0, 47, 16, 16, 5])
    out_NI = torch.empty(5, 768)
    kernel(level).rows(matrix(tiles, None, kind, 48, 768), at_N, out_NI)
    assert close(out_NI, dense_OI[at_N], TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_numbers(level, kind, dtype):
    for outputs, inputs in ((16, 4 * form(kind).inputs), (80, 768)):
        tiles, dense_OI = blocks(kind, outputs, inputs)
        for rows in (1, 2, 7, 8, 9, 31, 32, 33, 50):
            x_NI = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).to(dtype)
            y_NO = product(level, kind, tiles, x_NI, outputs)
            assert close(y_NO, x_NI.float() @ dense_OI.T, EIGHT_BITS), (outputs, rows)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "BF16"])
def test_few_rows_are_rounded_to_8_bits_and_nothing_else_is(level, kind):
    tiles, dense_OI = blocks(kind, 64, 768)
    x_NI = torch.randn(MANY - 1, 768, generator=torch.Generator().manual_seed(0))
    assert close(product(level, kind, tiles, x_NI, 64), coded(x_NI) @ dense_OI.T, TOLERANCE[torch.float32])


@pytest.mark.parametrize("level", LEVELS)
def test_weights_in_bfloat16_are_multiplied_by_inputs_in_bfloat16(level):
    tiles, dense_OI = blocks("BF16", 80, 768)
    for rows in (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 64):
        x_NI = torch.randn(rows, 768, generator=torch.Generator().manual_seed(rows))
        y_NO = product(level, "BF16", tiles, x_NI, 80)
        assert close(y_NO, x_NI.bfloat16().float() @ dense_OI.T, TOLERANCE[torch.float32]), rows


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "avx512"])
def test_a_row_by_weights_in_bfloat16_has_the_same_bits_in_any_company_at_any_level(level):
    """But for avx512, where the processor adds pairs of products in an order of its own."""
    tiles, _ = blocks("BF16", 528, 768)
    x_NI = torch.randn(70, 768, generator=torch.Generator().manual_seed(0))
    alone = [product("portable", "BF16", tiles, x_I[None], 528)[0] for x_I in x_NI]
    for rows in (1, 4, 5, 16, 33, 70):
        together = product(level, "BF16", tiles, x_NI[:rows], 528)
        assert all(torch.equal(y_O, alone[row]) for row, y_O in enumerate(together)), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_matrix_is_the_numbers_of_the_blocks(level, kind, dtype):
    tiles, dense_OI = blocks(kind, 70, 768)
    out_OI = torch.full((70, 768), torch.nan, dtype=dtype)
    kernel(level).dense(matrix(tiles, None, kind, 70, 768), out_OI)
    assert close(out_OI, dense_OI, TOLERANCE[dtype])
    assert kind != "BF16" or torch.equal(out_OI.float(), dense_OI)


@given(outputs=st.integers(1, 70), blocks_of=st.integers(1, 5), rows=st.integers(1, 70), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_shape_with_a_bias_and_rows_apart(outputs, blocks_of, rows, data):
    level, kind = data.draw(st.sampled_from(LEVELS)), data.draw(st.sampled_from(KINDS))
    inputs = blocks_of * form(kind).inputs
    tiles, dense_OI = blocks(kind, outputs, inputs)
    x_NI = torch.randn(rows, inputs + 3)[:, :inputs]
    bias_O = torch.randn(outputs)
    y_NO = product(level, kind, tiles, x_NI, outputs, bias_O)
    assert y_NO.isfinite().all()
    typical = (
        x_NI.norm() * dense_OI.norm() / inputs**0.5
    )  # of the product: a single number may be almost zero by chance
    assert (y_NO - bias_O - x_NI @ dense_OI.T).norm() <= EIGHT_BITS * typical


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", [768, 1536])  # from 1,024 on two columns side by side, where rows are one or two
def test_a_row_does_not_depend_on_its_company_nor_on_threads(level, kind, inputs):
    tiles, _ = blocks(kind, 528, inputs)
    x_NI = torch.randn(70, inputs)
    threads = torch.get_num_threads()
    for some in (range(1, MANY), range(MANY, 70, 5)):
        wholes = [product(level, kind, tiles, x_NI[:rows], 528) for rows in some]
        torch.set_num_threads(3)
        assert torch.equal(product(level, kind, tiles, x_NI[: some[-1]], 528), wholes[-1])
        torch.set_num_threads(threads)
        assert all(torch.equal(whole, wholes[-1][: len(whole)]) for whole in wholes)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none_and_in_its_row(level, kind, bad):
    tiles, _ = blocks(kind, 32, 768)
    for rows in (3, 40):
        x_NI = torch.randn(rows, 768)
        x_NI[1, 77] = bad
        finite_N = product(level, kind, tiles, x_NI, 32).isfinite().all(1)
        assert finite_N.tolist() == [row != 1 for row in range(rows)]


def test_extremes_of_codes_and_inputs_do_not_overflow():
    tiles = torch.full((2 * form("Q8_0").nbytes * ROWS,), 128, dtype=torch.uint8)  # every code is -128
    scale = torch.ones(ROWS, dtype=torch.float16).view(torch.uint8)
    tiles.view(2, -1)[:, : 2 * ROWS] = scale
    for level in LEVELS:
        for sign in (1.0, -1.0):
            y_NO = product(level, "Q8_0", tiles, torch.full((1, 64), sign * 127), ROWS)
            assert torch.equal(y_NO, torch.full((1, ROWS), sign * 64 * 127 * -128))
