"""Linear maps and embeddings over tiles of 16 rows (model/tiling.py).

On a CPU native/linear.cpp multiplies: weights in bfloat16 by inputs in bfloat16, others by inputs as codes of 8 bits
with a scale for each 32, many rows by AMX in bfloat16 where the processor has it. Where there are gradients no input is
rounded to 8 bits: there torch multiplies by the whole matrix, as it does elsewhere and without a compiler.
"""

import torch
from torch import Tensor, nn

from satchel.model.blocks import decode
from satchel.model.layout import tiles_of
from satchel.model.packed import Packed
from satchel.model.tangent import tangents_flow
from satchel.model.tiling import ROWS, untile
from satchel.native import linear as native

# O outputs, I inputs, B bytes of a row, V vocabulary


def multiplies(weight_OI: Tensor, group: int = native.GROUP) -> bool:
    """Whether a matrix whose blocks are `group` inputs would be multiplied by natively: one in bfloat16, since who asks
    for float32 wants no input rounded to 8 bits."""
    fits = group % native.GROUP == 0 and weight_OI.shape[1] % group == 0
    return fits and weight_OI.dtype == torch.bfloat16 and weight_OI.device.type == "cpu" and native.kernel() is not None


def exact(weight_OI: Tensor, level: str = "auto") -> "TiledLinear":
    """A matrix in bfloat16 as tiles of it; blocks of 32 have to fill its rows."""
    outputs, inputs = weight_OI.shape
    raw_OB = weight_OI.to(torch.bfloat16).contiguous().view(torch.uint8)
    return TiledLinear(tiles_of(raw_OB, "BF16"), "BF16", outputs, inputs, weight_OI.dtype, level)


class TiledLinear(Packed):
    """A frozen linear map over tiles."""

    tiles: Tensor

    def __init__(
        self, tiles: Tensor, kind: str, outputs: int, inputs: int, dtype: torch.dtype, level: str = "auto"
    ) -> None:
        """`level`: of instructions, 'auto' or one of native/levels.py."""
        super().__init__((outputs, inputs), dtype)
        self.kind, self.level = kind, level
        self.register_buffer("tiles", tiles)

    def unpack_(self, out_OI: Tensor, rows: slice) -> None:
        first, last = rows.start // ROWS, -(-rows.stop // ROWS)
        each = self.tiles.numel() // -(-self.out_features // ROWS)
        raw_OB = untile(self.tiles[first * each : last * each], self.kind, self.in_features)
        out_OI.copy_(decode(raw_OB[rows.start - first * ROWS : rows.stop - first * ROWS], self.kind))

    @torch.no_grad()
    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix, [O, I]; in the dtype that it had before packing unless another is asked for."""
        dtype = dtype or self.dtype
        if self._kernel(dtype) is None:
            return super().dense(dtype)
        return torch.ops.satchel.tiled_dense(
            self.tiles, self.kind, self.out_features, self.in_features, dtype, self.level
        )

    def infer(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """The product as the kernel has it; torch's where tangents flow, of which the kernel knows nothing."""
        if self._kernel(x.dtype) is None or tangents_flow():
            return super().multiply(x, bias_O)
        return torch.ops.satchel.tiled_linear(x, self.tiles, bias_O, self.kind, self.out_features, self.level)

    def multiply(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """The same where inputs in bfloat16 are multiplied as they are, else torch's."""
        kernel = self._kernel(x.dtype) if x.dtype == torch.bfloat16 else None
        whole = kernel and (self.kind == "BF16" or 0 < kernel.many <= x.shape[:-1].numel())
        return self.infer(x, bias_O) if whole else super().multiply(x, bias_O)

    def _kernel(self, dtype: torch.dtype) -> native.Kernel | None:
        """What computes in a dtype; None: torch."""
        here = self.tiles.device.type == "cpu" and dtype in native.DTYPES
        return native.kernel(self.level) if here else None

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
