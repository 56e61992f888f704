"""torch's layers, allocated but not filled: the weights come from a file, or from `Decoder.init_weights`.

torch draws random weights in every constructor, which takes longer than reading them and cannot be switched off.
"""

from typing import TypedDict

import torch
from torch import nn


class At(TypedDict, total=False):
    """Of which type parameters are, and where they lie."""

    dtype: torch.dtype
    device: torch.device | str | None


class Linear(nn.Linear):
    """y_BTO = x_BTI @ weight_OI.T + bias_O."""

    def reset_parameters(self) -> None:
        """Leaves the allocation as it is."""


class Embedding(nn.Embedding):
    """y_BTD = weight_VD[token_BT]."""

    def reset_parameters(self) -> None:
        """Leaves the allocation as it is."""


class LayerNorm(nn.LayerNorm):
    """Centres and scales the last dimension, then applies a weight and a bias unless it is plain."""

    def reset_parameters(self) -> None:
        """Leaves the allocation as it is."""
