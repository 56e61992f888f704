"""The dense feed-forward: down(act(gate(x)) * up(x)), or down(act(up(x))) where it has no gate."""

from collections.abc import Callable
from typing import Unpack

from torch import Tensor, nn

from satchel.model.config import ModelConfig
from satchel.model.empty import At, Linear
from satchel.model.functional import activate, gated


class FeedForward(nn.Module):
    """One feed-forward of `hidden` features; also an expert of a sparse one."""

    def __init__(self, config: ModelConfig, hidden: int, **at: Unpack[At]) -> None:
        super().__init__()
        self.act = config.act
        self.gate: Callable[..., Tensor] = gated  # what does activation and product
        if config.gated:
            self.gate_proj = Linear(config.width, hidden, config.mlp_bias, **at)
        self.up_proj = Linear(config.width, hidden, config.mlp_bias, **at)
        self.down_proj = Linear(hidden, config.width, config.mlp_bias, **at)
        self.gated = config.gated

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        if self.gated:
            return self.down_proj(self.gate(self.gate_proj(x), self.up_proj(x), self.act))
        return self.down_proj(activate(self.up_proj(x), self.act))
