"""Matrices from rows of blocks, as a file holds them, to tiles: at load, in one pass by native/layout.cpp.

Blocks of other kinds become Q8_0 on the way, and so may plain numbers: scale = max |W| / 127 of each 32. Without a
compiler torch does the same, some rows at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from satchel.model.blocks import decode, encode_q8
from satchel.model.encodings import ENCODINGS, PLAIN
from satchel.model.packed import CHUNK
from satchel.model.tiling import ROWS, fields, tile
from satchel.native import layout as native
from satchel.native.linear import form

# O outputs, I inputs, B bytes of a row

Lay = Callable[[Tensor, str], Tensor]
PLAIN_NAMES = {dtype: name for name, dtype in PLAIN.items()}


def tiles_of(raw_OB: Tensor, kind: str) -> Tensor:
    """Rows of blocks of a kind of native/linear.py, contiguous uint8, as tiles of it: uint8, flat."""
    return torch.ops.satchel.tiles(raw_OB, kind)


def tiles_q8(raw_OB: Tensor, kind: str) -> Tensor:
    """Rows of blocks of any of ENCODINGS, contiguous uint8, as tiles of Q8_0: uint8, flat."""
    return torch.ops.satchel.tiles_q8(raw_OB, kind)


def tiles_of_numbers(weight_OI: Tensor) -> Tensor:
    """A dense matrix as tiles of Q8_0."""
    return tiles_q8(weight_OI.contiguous().view(torch.uint8), PLAIN_NAMES[weight_OI.dtype])


def tiles_made(rows: Tensor, blocks: Callable[[Tensor], Tensor], kind: str, lay: Lay = tiles_of) -> Tensor:
    """A matrix as tiles of a kind; of some rows at a time `blocks` makes rows of blocks, and `lay` tiles of these."""
    step = max(CHUNK // rows.shape[1] // ROWS, 1) * ROWS
    some = lay(blocks(rows[:step]), kind)
    group = some.numel() // -(-min(step, len(rows)) // ROWS)  # bytes
    tiles = some.new_empty(-(-len(rows) // ROWS) * group)
    tiles[: some.numel()] = some
    for start in range(step, len(rows), step):
        some = lay(blocks(rows[start : start + step]), kind)
        tiles[start // ROWS * group :][: some.numel()] = some
    return tiles


def tiles_in_torch(raw_OB: Tensor, kind: str) -> Tensor:
    """`tiles_of` without the kernel."""
    return tiles_made(raw_OB, lambda some_OB: some_OB, kind, tile)


def tiles_q8_in_torch(raw_OB: Tensor, kind: str) -> Tensor:
    """`tiles_q8` without the kernel."""
    return tiles_made(raw_OB, lambda some_OB: encode_q8(decode(some_OB, kind)), "Q8_0", tile)


torch.library.define("satchel::tiles", "(Tensor raw, str kind) -> Tensor")
torch.library.define("satchel::tiles_q8", "(Tensor raw, str kind) -> Tensor")
torch.library.impl("satchel::tiles", "default", tiles_in_torch)
torch.library.impl("satchel::tiles_q8", "default", tiles_q8_in_torch)


@torch.library.impl("satchel::tiles", "CPU")
def _tiles(raw_OB: Tensor, kind: str) -> Tensor:
    kernel = native.library()
    return native.lay(kernel, raw_OB, fields(kind)) if kernel else tiles_in_torch(raw_OB, kind)


@torch.library.impl("satchel::tiles_q8", "CPU")
def _tiles_q8(raw_OB: Tensor, kind: str) -> Tensor:
    kernel = native.library() if kind in native.CONVERTED else None
    return native.lay_as_q8(kernel, raw_OB, kind) if kernel else tiles_q8_in_torch(raw_OB, kind)


@torch.library.register_fake("satchel::tiles")
def _tiles_fake(raw_OB: Tensor, kind: str) -> Tensor:
    return raw_OB.new_empty(_filled(raw_OB) * raw_OB.shape[1])


@torch.library.register_fake("satchel::tiles_q8")
def _tiles_q8_fake(raw_OB: Tensor, kind: str) -> Tensor:
    inputs = raw_OB.shape[1] // ENCODINGS[kind].nbytes * ENCODINGS[kind].values
    block = form("Q8_0")
    return raw_OB.new_empty(_filled(raw_OB) * inputs // block.inputs * block.nbytes)


def _filled(raw_OB: Tensor) -> int:
    """Its rows, and those that fill up the last tile."""
    return -(-len(raw_OB) // ROWS) * ROWS
