"""Which format a model that only answers is loaded in, where nobody said."""

import torch

from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.source import Source
from satchel.native.linear import GROUP, kernel


def storage(format: str, source: Source, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> str:
    """The format of the weights, `auto` resolved: the bits of the file where we multiply by those.

    A CPU does so by blocks, and by bfloat16 where that is the dtype.
    """
    if format != "auto":
        return format
    if torch.device(device).type != "cpu" or kernel() is None:
        return "none"
    blocks = any(stored.encoding.values > 1 for stored in source.tensors.values())
    return "stored" if blocks or (dtype == torch.bfloat16 and _fills_tiles(source.config)) else "none"


def _fills_tiles(config: ModelConfig) -> bool:
    """Whether the rows of all matrices are whole blocks of inputs."""
    matrices = (p for p in Decoder(config, device="meta").parameters() if p.dim() == 2)
    return all(matrix.shape[1] % GROUP == 0 for matrix in matrices)
