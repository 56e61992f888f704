"""Matrices from rows of blocks, as a file holds them, to tiles: at load, in one pass by native/layout.cpp.

Blocks of other kinds become Q8_0 on the way, and so do plain numbers: scale = max |W| / 127 of each 32. Without a
compiler torch does the same, some rows at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from satchel.model.encodings import ENCODINGS, PLAIN
from satchel.model.packed import CHUNK
from satchel.model.tiles import ROWS, decode, encode_q8, fields, tile
from satchel.native import layout as native
from satchel.native.linear import BLOCK

# O outputs, I inputs, B bytes of a row

PLAIN_NAMES = {dtype: name for name, dtype in PLAIN.items()}


def tiles_of(raw_OB: Tensor, kind: str) -> Tensor:
    """Rows of blocks of one of KINDS, contiguous uint8, as tiles of it: uint8, flat."""
    return torch.ops.satchel.tiles(raw_OB, kind)


def tiles_q8(raw_OB: Tensor, kind: str) -> Tensor:
    """Rows of blocks of any of ENCODINGS, contiguous uint8, as tiles of Q8_0: uint8, flat."""
    return torch.ops.satchel.tiles_q8(raw_OB, kind)


def tiles_of_numbers(weight_OI: Tensor) -> Tensor:
    """A dense matrix as tiles of Q8_0."""
    return tiles_q8(weight_OI.contiguous().view(torch.uint8), PLAIN_NAMES[weight_OI.dtype])


def _chunked(raw_OB: Tensor, blocks: Callable[[Tensor], Tensor], kind: str) -> Tensor:
    """Rows as tiles; `blocks` makes blocks of `kind` of some of them at a time."""
    step = max(CHUNK // raw_OB.shape[1] // ROWS, 1) * ROWS
    some = tile(blocks(raw_OB[:step]), kind)
    group = some.numel() // -(-min(step, len(raw_OB)) // ROWS)  # bytes
    tiles = some.new_empty(-(-len(raw_OB) // ROWS) * group)
    tiles[: some.numel()] = some
    for start in range(step, len(raw_OB), step):
        some = tile(blocks(raw_OB[start : start + step]), kind)
        tiles[start // ROWS * group :][: some.numel()] = some
    return tiles


def tiles_in_torch(raw_OB: Tensor, kind: str) -> Tensor:
    """`tiles_of` without the kernel."""
    return _chunked(raw_OB, lambda some_OB: some_OB, kind)


def tiles_q8_in_torch(raw_OB: Tensor, kind: str) -> Tensor:
    """`tiles_q8` without the kernel."""
    return _chunked(raw_OB, lambda some_OB: encode_q8(decode(some_OB, kind)), "Q8_0")


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
    each, nbytes = BLOCK["Q8_0"]
    return raw_OB.new_empty(_filled(raw_OB) * inputs // each * nbytes)


def _filled(raw_OB: Tensor) -> int:
    """Its rows, and those that fill up the last tile."""
    return -(-len(raw_OB) // ROWS) * ROWS
