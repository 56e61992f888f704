"""Self-attention of every family: projections, norms of queries and keys, rotary positions, attention, output."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from satchel.core.serve_seams import Feed
from satchel.model.attend import attend, attend_documents, shares
from satchel.model.cache import Past
from satchel.model.config import ModelConfig
from satchel.model.empty import At, Linear
from satchel.model.functional import rotate
from satchel.model.norm import make_norm
from satchel.model.rope import Rope

# B batch, T tokens, D width, H query heads, K key heads, E head dim


@dataclass(frozen=True, eq=False)
class Place:
    """Where the tokens of one call stand; the same for all layers."""

    tables: dict[Rope | None, tuple[Tensor, Tensor]]  # cosines and sines, [T, R/2]
    lengths: tuple[int, ...] | None = None  # of the documents in the row
    cache: Past | None = None  # what came before
    feed: Feed | None = None  # what runs the feed-forwards; None: nothing stands between

    def attend(self, q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, **how: Any) -> Tensor:
        """What queries find among the keys of their own document, [B, T, H, E]. Only here do tokens meet."""
        if self.lengths is None:
            return attend(q_BTHE, k_BSKE, v_BSKE, **how)
        return attend_documents(q_BTHE, k_BSKE, v_BSKE, self.lengths, **how)


class Attention(nn.Module):
    """Causal self-attention of layer `index`."""

    def __init__(self, config: ModelConfig, index: int, **at: Unpack[At]) -> None:
        super().__init__()
        kind, dim = config.layer_kinds[index], config.head_dim
        self.index, self.dim, self.rope, self.clip = index, dim, kind.rope, config.clip_qkv
        self.rotate: Callable[..., Tensor] = rotate  # what does it
        self.how = {"scale": config.scale_of(index), "window": kind.window, "cap": config.attention_softcap}
        self.q_proj = Linear(config.width, config.heads * dim, config.qkv_bias, **at)
        self.k_proj = Linear(config.width, config.kv_heads * dim, config.qkv_bias, **at)
        self.v_proj = Linear(config.width, config.kv_heads * dim, config.qkv_bias, **at)
        self.o_proj = Linear(config.heads * dim, config.width, config.out_bias, **at)
        self.norm_heads = config.qk_norm == "head"
        if config.qk_norm:
            wide = (dim, dim) if self.norm_heads else (config.heads * dim, config.kv_heads * dim)
            self.q_norm, self.k_norm = (make_norm(config, width, **at) for width in wide)
        else:
            self.q_norm = self.k_norm = None

    def forward(self, x_BTD: Tensor, place: Place) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        q_BTHE, k_BSKE = self._queries(x_BTD, place), self._keys(x_BTD, place)
        v_BSKE = self._heads(self.v_proj(x_BTD), None)
        past = place if place.cache is None else place.cache.layers[self.index]
        return self.o_proj(past.attend(q_BTHE, k_BSKE, v_BSKE, **self.how).flatten(2))

    def shares(self, x_1TD: Tensor, query_S: Tensor, place: Place) -> Tensor:
        """The share of attention that the queries at `query_S` of one document give to each token, [S, T] in float32.

        The mean over the heads; nothing is kept for a backward pass.
        """
        tables = {rope: (cos[query_S], sin[query_S]) for rope, (cos, sin) in place.tables.items()}
        with torch.no_grad():
            q_SHE = self._queries(x_1TD[:, query_S], Place(tables))[0]
            return shares(q_SHE, self._keys(x_1TD, place)[0], query_S, **self.how)

    def _queries(self, x_BTD: Tensor, place: Place) -> Tensor:
        return self._turned(self._heads(self.q_proj(x_BTD), self.q_norm), place)

    def _keys(self, x_BTD: Tensor, place: Place) -> Tensor:
        return self._turned(self._heads(self.k_proj(x_BTD), self.k_norm), place)

    def _heads(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """[B, T, heads * E] to [B, T, heads, E], normalised over each head or over all at once."""
        if norm is not None and not self.norm_heads:
            x = norm(x)
        if self.clip is not None:
            x = x.clamp(-self.clip, self.clip)
        x = x.unflatten(-1, (-1, self.dim))
        return norm(x) if norm is not None and self.norm_heads else x

    def _turned(self, x_BTHE: Tensor, place: Place) -> Tensor:
        return x_BTHE if self.rope is None else self.rotate(x_BTHE, *place.tables[self.rope])
