"""The norms of all families behind one constructor."""

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor, nn

from satchel.model.config import ModelConfig
from satchel.model.empty import At, LayerNorm
from satchel.model.functional import rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight; see `functional.rms_norm` for the two options."""

    def __init__(self, width: int, eps: float, plus_one: bool, late_cast: bool, **at: Unpack[At]) -> None:
        super().__init__()
        self.eps, self.plus_one, self.late_cast = eps, plus_one, late_cast
        self.weight = nn.Parameter(torch.empty(width, **at))
        self.normed: Callable[..., Tensor] = rms_norm  # what does it

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.normed(x, self.weight, self.eps, plus_one=self.plus_one, late_cast=self.late_cast)

    def extra_repr(self) -> str:
        """Width and options, for printing a model."""
        return f"{self.weight.shape[0]}, eps={self.eps}, plus_one={self.plus_one}, late_cast={self.late_cast}"


def make_norm(config: ModelConfig, width: int, **at: Unpack[At]) -> nn.Module:
    """The norm that the configuration names, over `width` features; `at` is dtype and device."""
    if config.norm.startswith("layer"):
        return LayerNorm(width, config.norm_eps, elementwise_affine=config.norm == "layer", **at)
    plus_one, late_cast = config.norm == "rms_plus_one", config.norm == "rms_late_cast"
    return RMSNorm(width, config.norm_eps, plus_one, late_cast, **at)
