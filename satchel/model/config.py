"""What a decoder is made of, read from a Hugging Face configuration.

One frozen dataclass describes every family; what differs between the layers of one model is in `pattern`. The
configuration that it was read from is kept, so that saving writes it back word for word.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from satchel.core.errors import ModelError, nearest
from satchel.model.families import ACTIVATIONS, FAMILIES, LayerKind

NORMS = ("rms", "rms_late_cast", "rms_plus_one", "layer", "layer_plain")
NORM_PLACES = ("before", "after", "sandwich", "on_residual", "parallel")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The decoder of a language model. Sizes are counts of tokens, heads, layers or features."""

    family: str  # Hugging Face's model_type
    vocab: int
    width: int  # D, of the residual stream
    layers: int
    heads: int  # of the queries
    kv_heads: int
    head_dim: int  # E
    hidden: int  # F, of a dense feed-forward
    context: int  # longest sequence that the model is made for
    activation: str = "silu"  # a Hugging Face name; `act` is ours
    gated: bool = True  # act(gate) * up, rather than act(up)
    norm: str = "rms"  # one of NORMS
    norm_place: str = "before"  # one of NORM_PLACES
    norm_eps: float = 1e-6
    final_norm: bool = True
    qk_norm: str = ""  # '', 'head' (over each head) or 'full' (over all heads at once)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False  # the head is the embedding
    embed_scale: float = 1.0
    embed_width: int = 0  # of the embeddings, projected to `width`; 0: the same
    learned_positions: int = 0  # rows of the position table; 0: rotary positions
    position_offset: int = 0  # row of the first position
    attention_scale: float | None = None  # on query-key products; None: head_dim ** -0.5
    scale_by_depth: bool = False  # divide attention_scale by the layer's number, from 1
    attention_softcap: float | None = None  # products are squashed into (-cap, cap)
    logit_softcap: float | None = None
    clip_qkv: float | None = None
    experts: int = 0  # 0: no layer is sparse
    experts_per_token: int = 0
    expert_hidden: int = 0  # F of one expert
    shared_hidden: int = 0  # F of the expert that every token visits; 0: none
    normalize_experts: bool = False  # the chosen experts' weights sum to 1
    pattern: tuple[LayerKind, ...] = (LayerKind(),)  # kinds of the layers, repeated to the model's depth
    source: str = "{}"  # the configuration that this was read from, JSON

    def __post_init__(self) -> None:
        """Raises ModelError, naming field and cure, where sizes contradict each other."""
        for wrong, complaint in _contradictions(self):
            if wrong:
                raise ModelError(f"{self.family} configuration: {complaint}")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """From a parsed config.json. Raises ModelError for an architecture that is not supported or lacks a field."""
        if "text_config" in hf:  # the language half of a model that also sees
            hf = {"model_type": hf.get("model_type"), "tie_word_embeddings": True} | dict(hf["text_config"])
        name = str(hf.get("model_type"))
        if name not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ModelError(f"architecture '{name}' is not supported; {nearest(name, FAMILIES)} Supported: {known}")
        try:
            fields = FAMILIES[name](hf)
        except KeyError as missing:
            raise ModelError(
                f"config.json of a {name} model has no {missing}; take the file from its hub page"
            ) from None
        return cls(family=name, source=json.dumps(dict(hf)), **fields)

    def to_hf(self) -> dict[str, Any]:
        """The configuration as Hugging Face writes it: what was read, cut to the layers that are left."""
        hf = json.loads(self.source)
        hf["n_layer" if self.family == "gpt2" else "num_hidden_layers"] = self.layers
        if hf.get("layer_types"):
            hf["layer_types"] = [
                "full_attention" if kind.window is None else "sliding_attention" for kind in self.layer_kinds
            ]
        return hf

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer; layers of equal kind cost the same."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.layers))

    @property
    def act(self) -> str:
        """The activation: silu, gelu, gelu_tanh or relu."""
        return ACTIVATIONS[self.activation]

    @property
    def parameters(self) -> int:
        """How many numbers the model holds, a tied head counted once."""
        embed = self.embed_width or self.width
        projections = 2 * embed * self.width if embed != self.width else 0
        outer = self.vocab * embed * (1 if self.tied else 2) + self.learned_positions * self.width + projections
        final = _norm_size(self, self.width) if self.final_norm else 0
        return outer + final + sum(self.layer_parameters)

    @property
    def layer_parameters(self) -> tuple[int, ...]:
        """How many of them each layer holds."""
        return tuple(_layer_size(self, kind) for kind in self.layer_kinds)

    def scale_of(self, layer: int) -> float:
        """The factor on query-key products in layer `layer`, from 0."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return scale / (layer + 1) if self.scale_by_depth else scale


def _contradictions(c: ModelConfig) -> list[tuple[bool, str]]:
    sizes = ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "hidden", "context")
    rotated = [int(c.head_dim * kind.rope.share) for kind in c.pattern if kind.rope]
    windows = [kind.window for kind in c.pattern if kind.window is not None]
    sparse = any(kind.sparse for kind in c.pattern)
    return [
        *((getattr(c, size) < 1, f"{size}={getattr(c, size)} is below 1") for size in sizes),
        (c.kv_heads > 0 and c.heads % c.kv_heads != 0, f"{c.heads} heads do not divide among {c.kv_heads} kv heads"),
        (c.activation not in ACTIVATIONS, f"no activation '{c.activation}'; {nearest(c.activation, ACTIVATIONS)}"),
        (c.norm not in NORMS, f"no norm '{c.norm}'; {nearest(c.norm, NORMS)}"),
        (c.norm_place not in NORM_PLACES, f"no norm place '{c.norm_place}'; {nearest(c.norm_place, NORM_PLACES)}"),
        (c.norm_eps <= 0, f"norm_eps={c.norm_eps} is not above 0"),
        (not c.pattern, "it has no kind of layer"),
        (
            any(r < 2 or r % 2 for r in rotated),
            f"rotary positions need pairs of dimensions; {rotated} of a head rotate",
        ),
        (any(w < 1 for w in windows), f"sliding window {windows} is below 1 token; leave it out for full attention"),
        (sparse and not 1 <= c.experts_per_token <= c.experts, f"{c.experts_per_token} of {c.experts} experts a token"),
        (sparse and c.expert_hidden < 1, f"expert_hidden={c.expert_hidden} is below 1"),
    ]


def _linear_size(inputs: int, outputs: int, bias: bool) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _norm_size(c: ModelConfig, width: int) -> int:
    return {"layer": 2 * width, "layer_plain": 0}.get(c.norm, width)


def _layer_size(c: ModelConfig, kind: LayerKind) -> int:
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    attention = _linear_size(c.width, q + 2 * kv, c.qkv_bias) + _linear_size(q, c.width, c.out_bias)
    qk_norms = {"": 0, "head": 2 * c.head_dim, "full": q + kv}[c.qk_norm]
    norms = (4 if c.norm_place == "sandwich" else 2) * _norm_size(c, c.width)
    return attention + qk_norms + norms + (_sparse_size(c) if kind.sparse else _mlp_size(c, c.hidden))


def _mlp_size(c: ModelConfig, hidden: int) -> int:
    ups = 2 if c.gated else 1
    return ups * _linear_size(c.width, hidden, c.mlp_bias) + _linear_size(hidden, c.width, c.mlp_bias)


def _sparse_size(c: ModelConfig) -> int:
    shared = _mlp_size(c, c.shared_hidden) + c.width if c.shared_hidden else 0
    return c.experts * (c.width + _mlp_size(c, c.expert_hidden)) + shared
