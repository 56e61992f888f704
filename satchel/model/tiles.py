"""Linear maps and embeddings over blocks of weights as a file holds them, in tiles of 16 rows.

A tile is one block of each of 16 rows, field by field: 16 scales, (16 offsets,) then 4 bytes of each row after the
other. It takes as many bytes as the file, and one load feeds a product for 16 rows (native/matrix.h). Rows that are no
multiple of 16 are filled up with zeros. On a CPU native/linear.cpp multiplies: few rows of x as codes of 8 bits with a
scale for each 32, many rows in bfloat16 where the processor has AMX. Elsewhere, and without a compiler, torch unpacks
the matrix for every product.
"""

import torch
from torch import Tensor, nn

from satchel.model.encodings import ENCODINGS
from satchel.model.packed import Packed
from satchel.native import linear as native

# O outputs, I inputs, N rows of x, M blocks of a row, B bytes of a block, G groups of 16 rows, V vocabulary

ROWS = native.ROWS
KINDS = native.KINDS
_FOURS = {"Q4_0": (2,), "Q4_1": (2, 2), "Q8_0": (2,), "Q4_K": (2, 2), "BF16": ()}  # bytes before the fields of 4


def fields(kind: str) -> list[int]:
    """Bytes of each field of a block, in order."""
    first = _FOURS[kind]
    return [*first, *[4] * ((native.BLOCK[kind][1] - sum(first)) // 4)]


def tile(raw_OB: Tensor, kind: str) -> Tensor:
    """Rows of blocks, uint8 [O, M * B], as tiles: uint8, flat."""
    missing = -len(raw_OB) % ROWS
    if missing:
        raw_OB = torch.cat([raw_OB, raw_OB.new_zeros(missing, raw_OB.shape[1])])
    raw_GRMB = raw_OB.unflatten(0, (-1, ROWS)).unflatten(2, (-1, native.BLOCK[kind][1]))
    parts = raw_GRMB.transpose(1, 2).split(fields(kind), dim=3)
    return torch.cat([part.flatten(2) for part in parts], dim=2).flatten()


def untile(tiles: Tensor, kind: str, inputs: int) -> Tensor:
    """The way back, rows that were filled in included: uint8 [O, M * B]."""
    each, nbytes = native.BLOCK[kind]
    tiles_GMB = tiles.view(-1, inputs // each, nbytes * ROWS)
    parts = tiles_GMB.split([ROWS * size for size in fields(kind)], dim=2)
    return torch.cat([part.unflatten(2, (ROWS, -1)) for part in parts], dim=3).transpose(1, 2).flatten(2).flatten(0, 1)


def decode(raw_OB: Tensor, kind: str) -> Tensor:
    """The numbers in rows of blocks, [O, I]."""
    encoding = ENCODINGS[kind]
    return encoding.decode(raw_OB.reshape(-1, encoding.nbytes)).view(len(raw_OB), -1)


def encode_q8(weight_OI: Tensor) -> Tensor:
    """A matrix as Q8_0 blocks, uint8 [O, M * 34]: scale = max |W| / 127 of each 32, in float16."""
    block_OMQ = weight_OI.float().unflatten(1, (-1, 32))
    scale_OM1 = (block_OMQ.abs().amax(-1, keepdim=True) / 127).half()
    inverse_OM1 = torch.where(scale_OM1 == 0, 0.0, 1 / scale_OM1.float())
    code_OMQ = (block_OMQ * inverse_OM1).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([scale_OM1.view(torch.uint8), code_OMQ.view(torch.uint8)], dim=2).flatten(1)


class TiledLinear(Packed):
    """A frozen linear map over tiles."""

    tiles: Tensor

    def __init__(self, tiles: Tensor, kind: str, outputs: int, inputs: int, dtype: torch.dtype, level: str) -> None:
        """`level`: of instructions, 'auto' or one of native/levels.py."""
        super().__init__((outputs, inputs), dtype)
        self.kind, self.level = kind, level
        self.register_buffer("tiles", tiles)

    def unpack_(self, out_OI: Tensor, rows: slice) -> None:
        first, last = rows.start // ROWS, -(-rows.stop // ROWS)
        each = self.tiles.numel() // -(-self.out_features // ROWS)
        raw_OB = untile(self.tiles[first * each : last * each], self.kind, self.in_features)
        out_OI.copy_(decode(raw_OB[rows.start - first * ROWS : rows.stop - first * ROWS], self.kind))

    def multiply(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        kernel = native.kernel(self.level) if x.device.type == "cpu" and x.dtype in native.DTYPES else None
        if kernel is None or self.tiles.is_meta:
            return super().multiply(x, bias_O)
        return torch.ops.satchel.tiled_linear(x, self.tiles, bias_O, self.kind, self.out_features, self.level)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


class TiledEmbedding(nn.Module):
    """Rows of a tiled map as embeddings; a tied head is the map itself, over the same memory."""

    tiles: Tensor

    def __init__(self, base: TiledLinear) -> None:
        super().__init__()
        self.dtype = base.dtype
        self._base = (base,)  # no submodule: nothing goes around it as around a linear map
        self.register_buffer("tiles", base.tiles)

    @property
    def base(self) -> TiledLinear:
        """The map whose rows these are."""
        return self._base[0]

    def forward(self, token_BT: Tensor) -> Tensor:
        """Embeddings [B, T, D] in the map's dtype."""
        base = self.base
        rows_ND = torch.ops.satchel.tiled_rows(
            token_BT.flatten(), self.tiles, base.kind, base.in_features, base.dtype, base.level
        )
        return rows_ND.unflatten(0, token_BT.shape)


torch.library.define(
    "satchel::tiled_linear", "(Tensor x, Tensor tiles, Tensor? bias, str kind, int outputs, str level) -> Tensor"
)
torch.library.define(
    "satchel::tiled_rows", "(Tensor at, Tensor tiles, str kind, int inputs, ScalarType dtype, str level) -> Tensor"
)


@torch.library.impl("satchel::tiled_linear", "CPU")
def _tiled_linear(x: Tensor, tiles: Tensor, bias_O: Tensor | None, kind: str, outputs: int, level: str) -> Tensor:
    x_NI = x.reshape(-1, x.shape[-1])
    x_NI = x_NI if x_NI.stride(1) == 1 else x_NI.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)  # no view of what was made here: whoever gets it may add to it in place
    kernel = native.kernel(level)
    assert kernel is not None
    wide_O = None if bias_O is None else bias_O.float()
    kernel.linear(native.matrix(tiles, wide_O, kind, outputs, x_NI.shape[1]), x_NI, y.view(-1, outputs))
    return y


@torch.library.register_fake("satchel::tiled_linear")
def _tiled_linear_fake(x: Tensor, tiles: Tensor, bias_O: Tensor | None, kind: str, outputs: int, level: str) -> Tensor:
    y = x.new_empty(*x.shape[:-1], outputs)
    torch.empty(native.room_bytes(x.numel() // x.shape[-1], x.shape[-1]), dtype=torch.uint8)
    return y


def tiled_rows_in_torch(
    at_N: Tensor, tiles: Tensor, kind: str, inputs: int, dtype: torch.dtype, level: str = ""
) -> Tensor:
    """Rows of a matrix in tiles by number, [N, I] in `dtype`."""
    each, nbytes = native.BLOCK[kind]
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
    each, nbytes = native.BLOCK[kind]
    outputs = tiles.numel() // (inputs // each * nbytes)
    if len(at_N) and not 0 <= int(at_N.min()) <= int(at_N.max()) < outputs:
        raise IndexError(f"rows from {int(at_N.min())} to {int(at_N.max())} of a matrix of {outputs}")
    out_NI = torch.empty(len(at_N), inputs, dtype=dtype)
    kernel.rows(native.matrix(tiles, None, kind, outputs, inputs), at_N.contiguous(), out_NI)
    return out_NI


@torch.library.register_fake("satchel::tiled_rows")
def _tiled_rows_fake(at_N: Tensor, tiles: Tensor, kind: str, inputs: int, dtype: torch.dtype, level: str) -> Tensor:
    return torch.empty(len(at_N), inputs, dtype=dtype, device=at_N.device)
