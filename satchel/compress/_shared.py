"""What satchel's own formats have in common: they pack what lies in the layers.

Embeddings and head keep their numbers; those in bfloat16 lie in tiles where a CPU answers from them, since a product
with few rows takes no longer than reading the matrix then (native/linear.cpp).
"""

from torch import Tensor, nn

from satchel.core.seams import WeightFormat
from satchel.model.tiles import TiledEmbedding, TiledLinear, exact, multiplies

# V vocabulary, D width


class Inner(WeightFormat):
    """A format of the layers' matrices."""

    def pack_outer(self, weight_VD: Tensor) -> nn.Module | None:
        """A `TiledLinear` of the very numbers; None where it would not be multiplied by as it is."""
        return exact(weight_VD) if multiplies(weight_VD) else None

    def embed(self, packed: nn.Module) -> nn.Module:
        """A `TiledEmbedding`."""
        assert isinstance(packed, TiledLinear)
        return TiledEmbedding(packed)
