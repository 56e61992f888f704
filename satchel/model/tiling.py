"""Matrices in tiles of 16 rows: what a tile is, and the operators on them.

A tile is one block of each of 16 rows, field by field: 16 scales, (16 offsets,) then 4 bytes of each row after the
other. It takes as many bytes as the blocks, and one load feeds a product for 16 rows (native/formats.h). Rows that are
no multiple of 16 are filled up with zeros.

A rehearsal follows an operator as one call that makes what its `_fake` says and takes what `allocates` does.
"""

import torch
from torch import Tensor

from satchel.model.blocks import decode
from satchel.native import linear as native
from satchel.native.operators import allocates

# O outputs, I inputs, N rows of x, M blocks of a row, B bytes, G groups of R = 16 rows

ROWS = native.ROWS


def fields(kind: str) -> list[int]:
    """Bytes of each field of a block, in order."""
    _, _, nbytes, lead = native.form(kind)
    return [*[2] * lead, *[4] * ((nbytes - 2 * lead) // 4)]


def tile(raw_OB: Tensor, kind: str) -> Tensor:
    """Rows of blocks, uint8 [O, M * B], as tiles: uint8, flat."""
    missing = -len(raw_OB) % ROWS
    if missing:
        raw_OB = torch.cat([raw_OB, raw_OB.new_zeros(missing, raw_OB.shape[1])])
    _, _, nbytes, lead = native.form(kind)
    raw_GMRB = raw_OB.unflatten(0, (-1, ROWS)).unflatten(2, (-1, nbytes)).transpose(1, 2)
    parts = [_turned(raw_GMRB[..., 2 * lead :], torch.int32)]
    if lead:
        parts = [_turned(raw_GMRB[..., : 2 * lead], torch.int16), *parts]
    return torch.cat(parts, dim=2).flatten()


def _turned(raw_GMRB: Tensor, number: torch.dtype) -> Tensor:
    """Numbers of each row as that of each of the rows: bytes [G, M, R * B]."""
    turned = raw_GMRB.clone(memory_format=torch.contiguous_format).view(number).transpose(2, 3)
    return turned.contiguous().view(torch.uint8).flatten(2)


def untile(tiles: Tensor, kind: str, inputs: int) -> Tensor:
    """The way back, rows that were filled in included: uint8 [O, M * B]."""
    _, each, nbytes, lead = native.form(kind)
    tiles_GMB = tiles.view(-1, inputs // each, nbytes * ROWS)
    parts = [_back(tiles_GMB[..., 2 * lead * ROWS :], torch.int32)]
    if lead:
        parts = [_back(tiles_GMB[..., : 2 * lead * ROWS], torch.int16), *parts]
    return torch.cat(parts, dim=3).transpose(1, 2).flatten(2).flatten(0, 1)


def _back(tiles_GMB: Tensor, number: torch.dtype) -> Tensor:
    """The bytes of each row, [G, M, R, B]."""
    turned = tiles_GMB.contiguous().view(number).unflatten(2, (-1, ROWS)).transpose(2, 3)
    return turned.clone(memory_format=torch.contiguous_format).view(torch.uint8)


torch.library.define(
    "satchel::tiled_linear", "(Tensor x, Tensor tiles, Tensor? bias, str kind, int outputs, str level) -> Tensor"
)
torch.library.define(
    "satchel::tiled_rows", "(Tensor at, Tensor tiles, str kind, int inputs, ScalarType dtype, str level) -> Tensor"
)
torch.library.define(
    "satchel::tiled_dense",
    "(Tensor tiles, str kind, int outputs, int inputs, ScalarType dtype, str level) -> Tensor",
)


def _rows(x: Tensor) -> Tensor:
    """x as the kernel reads it, [N, I]; a copy where its rows are not contiguous."""
    x_NI = x.reshape(-1, x.shape[-1])
    return x_NI if x_NI.stride(1) == 1 else x_NI.contiguous()


@torch.library.impl("satchel::tiled_linear", "CPU")
def _tiled_linear(x: Tensor, tiles: Tensor, bias_O: Tensor | None, kind: str, outputs: int, level: str) -> Tensor:
    x_NI = _rows(x)
    y = x.new_empty(*x.shape[:-1], outputs)  # no view of what was made here: whoever gets it may add to it in place
    kernel = native.kernel(level)
    assert kernel is not None
    wide_O = None if bias_O is None else bias_O.float()
    kernel.linear(native.matrix(tiles, wide_O, kind, outputs, x_NI.shape[1]), x_NI, y.view(-1, outputs))
    return y


@torch.library.register_fake("satchel::tiled_linear")
def _tiled_linear_fake(x: Tensor, tiles: Tensor, bias_O: Tensor | None, kind: str, outputs: int, level: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def _tiled_linear_room(x: Tensor, *_: object) -> None:
    x_NI = _rows(x)
    torch.empty(native.room_bytes(*x_NI.shape), dtype=torch.uint8)


allocates(torch.ops.satchel.tiled_linear.default, _tiled_linear_room)


@torch.library.impl("satchel::tiled_dense", "CPU")
def _tiled_dense(tiles: Tensor, kind: str, outputs: int, inputs: int, dtype: torch.dtype, level: str) -> Tensor:
    kernel, out_OI = native.kernel(level), torch.empty(outputs, inputs, dtype=dtype)
    assert kernel is not None
    kernel.dense(native.matrix(tiles, None, kind, outputs, inputs), out_OI)
    return out_OI


@torch.library.register_fake("satchel::tiled_dense")
def _tiled_dense_fake(tiles: Tensor, kind: str, outputs: int, inputs: int, dtype: torch.dtype, level: str) -> Tensor:
    return torch.empty(outputs, inputs, dtype=dtype, device=tiles.device)


def tiled_rows_in_torch(
    at_N: Tensor, tiles: Tensor, kind: str, inputs: int, dtype: torch.dtype, level: str = ""
) -> Tensor:
    """Rows of a matrix in tiles by number, [N, I] in `dtype`."""
    _, each, nbytes, _ = native.form(kind)
    group_GB = tiles.view(-1, inputs // each * nbytes * ROWS)
    raw_OB = untile(group_GB[at_N // ROWS].flatten(), kind, inputs)
    own_N = torch.arange(len(at_N), device=at_N.device) * ROWS + at_N % ROWS
    return decode(raw_OB[own_N], kind).to(dtype)


torch.library.impl("satchel::tiled_rows", "default", tiled_rows_in_torch)


@torch.library.impl("satchel::tiled_rows", "CPU")
def _tiled_rows(at_N: Tensor, tiles: Tensor, kind: str, inputs: int, dtype: torch.dtype, level: str) -> Tensor:
    kernel = native.kernel(level) if dtype in native.DTYPES else None
    if kernel is None:
        return tiled_rows_in_torch(at_N, tiles, kind, inputs, dtype)
    _, each, nbytes, _ = native.form(kind)
    outputs = tiles.numel() // (inputs // each * nbytes)
    out_NI = torch.empty(len(at_N), inputs, dtype=dtype)
    kernel.rows(native.matrix(tiles, None, kind, outputs, inputs), at_N.contiguous(), out_NI)
    return out_NI


@torch.library.register_fake("satchel::tiled_rows")
def _tiled_rows_fake(at_N: Tensor, tiles: Tensor, kind: str, inputs: int, dtype: torch.dtype, level: str) -> Tensor:
    return torch.empty(len(at_N), inputs, dtype=dtype, device=at_N.device)
