"""One layer: attention and feed-forward on the residual stream, with norms where the family puts them.

before       x + f(norm(x))                 Llama, Mistral, Qwen, Phi-3, GPT-2, most of OPT
after        x + norm(f(x))                 OLMo 2
sandwich     x + norm(f(norm(x)))           Gemma 2 and 3
on_residual  norm(x + f(x))                 OPT-350m
parallel     x + a(norm(x)) + m(norm'(x))   GPT-NeoX
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from satchel.model.attention import Attention, Place
from satchel.model.config import ModelConfig
from satchel.model.empty import At
from satchel.model.feedforward import FeedForward
from satchel.model.moe import SparseFeedForward
from satchel.model.norm import make_norm

# What each norm acts on, and the name that it bears in checkpoints.
_BEFORE = {"into_attention": "input_layernorm", "into_mlp": "post_attention_layernorm"}
ROLES = {
    "before": _BEFORE,
    "parallel": _BEFORE,
    "after": {"out_of_attention": "post_attention_layernorm", "out_of_mlp": "post_feedforward_layernorm"},
    "sandwich": {
        "into_attention": "input_layernorm",
        "out_of_attention": "post_attention_layernorm",
        "into_mlp": "pre_feedforward_layernorm",
        "out_of_mlp": "post_feedforward_layernorm",
    },
    "on_residual": {"after_attention": "input_layernorm", "after_mlp": "post_attention_layernorm"},
}


class Block(nn.Module):
    """Layer `index` of a decoder."""

    def __init__(self, config: ModelConfig, index: int, **at: Unpack[At]) -> None:
        super().__init__()
        self.self_attn = Attention(config, index, **at)
        sparse = config.layer_kinds[index].sparse
        self.mlp = SparseFeedForward(config, **at) if sparse else FeedForward(config, config.hidden, **at)
        self.width = config.width
        self.parallel = config.norm_place == "parallel"
        self.roles = ROLES[config.norm_place]
        for name in self.roles.values():
            self.add_module(name, make_norm(config, config.width, **at))

    def forward(self, x_BTD: Tensor, place: Place) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        a_BTD = self._norm("out_of_attention", self.self_attn(self._norm("into_attention", x_BTD), place))
        if self.parallel:
            return x_BTD + a_BTD + self.mlp(self._norm("into_mlp", x_BTD))
        x_BTD = self._norm("after_attention", x_BTD + a_BTD)
        return place.feed(self.self_attn.index, self._feed, x_BTD) if place.feed else self._feed(x_BTD)

    def _feed(self, x: Tensor) -> Tensor:
        """The stream after the feed-forward; every token by itself."""
        return self._norm("after_mlp", x + self._norm("out_of_mlp", self.mlp(self._norm("into_mlp", x))))

    def shares(self, x_1TD: Tensor, query_S: Tensor, place: Place) -> Tensor:
        """What share of attention some queries give to each token of a document, [S, T]; see `Attention.shares`."""
        with torch.no_grad():
            return self.self_attn.shares(self._norm("into_attention", x_1TD), query_S, place)

    def _norm(self, role: str, x_BTD: Tensor) -> Tensor:
        name = self.roles.get(role)
        return x_BTD if name is None else getattr(self, name)(x_BTD)
