"""How each family of models is spelt in a Hugging Face configuration: one reader a family, each a few lines.

A reader takes the parsed config.json and gives the fields of a ModelConfig; what a family shares with Llama it leaves
to `_llama`. To add a family: a reader here, its tensors' names in `names.py`, its row in the families' test.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from satchel.core.errors import ModelError
from satchel.model.rope import Rope, read_rope

HF = Mapping[str, Any]
Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What may differ between the layers of a model. Layers of equal kind have equal shapes and cost."""

    window: int | None = None  # tokens that a token sees, itself included; None: all before it
    rope: Rope | None = None  # None: positions are learned, and added to the embeddings
    sparse: bool = False  # the feed-forward is a mixture of experts


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def _llama(hf: HF, *, theta: float = 10_000.0, window: int | None = None, **own: Any) -> Fields:
    """The fields that Llama and its many relatives share; `own` is what the family does otherwise."""
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    fields = {
        "vocab": hf["vocab_size"],
        "width": width,
        "layers": hf["num_hidden_layers"],
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or width // heads,
        "hidden": hf["intermediate_size"],
        "context": hf["max_position_embeddings"],
        "activation": hf.get("hidden_activation") or hf.get("hidden_act") or "silu",
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "qkv_bias": hf.get("attention_bias", False),
        "out_bias": hf.get("attention_bias", False),
        "mlp_bias": hf.get("mlp_bias", False),
        "tied": hf.get("tie_word_embeddings", False),
    }
    if "pattern" not in own:
        own["pattern"] = (LayerKind(window=window, rope=read_rope(hf, theta=theta)),)
    return fields | own


def _pattern(
    hf: HF, kind: Callable[[bool, int], LayerKind], is_sliding: Callable[[int], bool]
) -> tuple[LayerKind, ...]:
    """One kind a layer, from `layer_types` if the configuration lists them and from `is_sliding(index)` otherwise."""
    count = hf["num_hidden_layers"]
    types = hf.get("layer_types")
    sliding = [t == "sliding_attention" for t in types] if types else [is_sliding(i) for i in range(count)]
    if len(sliding) != count:
        raise ModelError(f"config.json lists {len(sliding)} layer_types for {count} layers; the two must agree")
    return tuple(kind(slides, i) for i, slides in enumerate(sliding))


def _windowed(hf: HF, is_sliding: Callable[[int], bool], window: int | None) -> tuple[LayerKind, ...]:
    rope = read_rope(hf)
    return _pattern(hf, lambda slides, i: LayerKind(window=window if slides else None, rope=rope), is_sliding)


def _mistral(hf: HF) -> Fields:
    return _llama(hf, window=hf.get("sliding_window", 4096), qkv_bias=False, out_bias=False, mlp_bias=False)


def _qwen_window(hf: HF) -> int | None:
    return hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None


def _qwen2(hf: HF, **own: Any) -> Fields:
    window, last_full = _qwen_window(hf), hf.get("max_window_layers", 28)
    pattern = _windowed(hf, lambda i: window is not None and i >= last_full, window)
    return _llama(hf, **{"qkv_bias": True, "out_bias": False, "pattern": pattern} | own)


def _qwen3(hf: HF) -> Fields:
    bias = hf.get("attention_bias", False)
    return _qwen2(hf, qk_norm="head", qkv_bias=bias, out_bias=bias, head_dim=hf.get("head_dim", 128))


def _gemma(hf: HF, **own: Any) -> Fields:
    gemma = {
        "norm": "rms_plus_one",
        "activation": hf.get("hidden_activation") or hf.get("hidden_act") or "gelu_pytorch_tanh",
        "embed_scale": hf["hidden_size"] ** 0.5,
        "tied": hf.get("tie_word_embeddings", True),
        "head_dim": hf.get("head_dim", 256),
    }
    return _llama(hf, **gemma | own)


def _gemma2(hf: HF) -> Fields:
    return _gemma(
        hf,
        norm_place="sandwich",
        attention_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=hf.get("attn_logit_softcapping", 50.0),
        logit_softcap=hf.get("final_logit_softcapping", 30.0),
        pattern=_windowed(hf, lambda i: i % 2 == 0, hf.get("sliding_window", 4096)),
    )


_GEMMA3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}


def _gemma3(hf: HF) -> Fields:
    hf = _GEMMA3_DEFAULTS | dict(hf)  # files of the multi-modal models leave out what equals the default
    nested = hf.get("rope_parameters") or {}
    full = nested.get("full_attention") or hf.get("rope_scaling") or {}
    local = nested.get("sliding_attention") or {"rope_theta": hf.get("rope_local_base_freq", 10_000.0)}
    ropes = read_rope(hf, parameters=full, theta=1e6), read_rope(hf, parameters=local)
    window, every = hf.get("sliding_window", 4096), hf.get("sliding_window_pattern", 6)

    def kind(slides: bool, index: int) -> LayerKind:
        return LayerKind(window=window if slides else None, rope=ropes[slides])

    return _gemma(
        hf,
        norm_place="sandwich",
        qk_norm="head",
        attention_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        logit_softcap=hf.get("final_logit_softcapping"),
        pattern=_pattern(hf, kind, lambda i: (i + 1) % every != 0),
    )


def _phi3(hf: HF) -> Fields:
    rope = read_rope(hf)
    if rope.kind == "yarn":  # an early spelling of longrope in this family
        rope = read_rope(
            hf, parameters=dict(hf.get("rope_scaling") or hf["rope_parameters"], type="su", rope_type="su")
        )
    pattern = (LayerKind(window=hf.get("sliding_window"), rope=rope),)
    return _llama(hf, pattern=pattern, norm_eps=hf.get("rms_norm_eps", 1e-5))


def _olmo2(hf: HF) -> Fields:
    eps = hf.get("rms_norm_eps", 1e-5)
    return _llama(hf, norm="rms_late_cast", norm_place="after", qk_norm="full", norm_eps=eps)


def _gpt2(hf: HF) -> Fields:
    width, heads = hf["n_embd"], hf["n_head"]
    return {
        "vocab": hf["vocab_size"],
        "width": width,
        "layers": hf["n_layer"],
        "heads": heads,
        "kv_heads": heads,
        "head_dim": width // heads,
        "hidden": hf.get("n_inner") or 4 * width,
        "context": hf["n_positions"],
        "activation": hf.get("activation_function", "gelu_new"),
        "gated": False,
        "norm": "layer",
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "learned_positions": hf["n_positions"],
        "attention_scale": None if hf.get("scale_attn_weights", True) else 1.0,
        "scale_by_depth": hf.get("scale_attn_by_inverse_layer_idx", False),
        "tied": hf.get("tie_word_embeddings", True),
        "pattern": (LayerKind(),),
    }


def _opt(hf: HF) -> Fields:
    width, heads, bias = hf["hidden_size"], hf["num_attention_heads"], hf.get("enable_bias", True)
    before = hf.get("do_layer_norm_before", True)
    return {
        "vocab": hf["vocab_size"],
        "width": width,
        "layers": hf["num_hidden_layers"],
        "heads": heads,
        "kv_heads": heads,
        "head_dim": width // heads,
        "hidden": hf["ffn_dim"],
        "context": hf["max_position_embeddings"],
        "activation": hf.get("activation_function", "relu"),
        "gated": False,
        "norm": "layer" if hf.get("layer_norm_elementwise_affine", True) else "layer_plain",
        "norm_place": "before" if before else "on_residual",
        "final_norm": before and not hf.get("_remove_final_layer_norm", False),
        "norm_eps": 1e-5,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bias,
        "learned_positions": hf["max_position_embeddings"] + 2,
        "position_offset": 2,  # the first two rows belong to padding
        "embed_width": hf.get("word_embed_proj_dim") or width,
        "tied": hf.get("tie_word_embeddings", True),
        "pattern": (LayerKind(),),
    }


def _gpt_neox(hf: HF) -> Fields:
    bias = hf.get("attention_bias", True)
    rope = read_rope(hf, theta=hf.get("rotary_emb_base", 10_000.0), share=hf.get("rotary_pct", 0.25))
    return _llama(
        hf,
        activation=hf.get("hidden_act", "gelu"),
        gated=False,
        norm="layer",
        norm_place="parallel" if hf.get("use_parallel_residual", True) else "before",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        kv_heads=hf["num_attention_heads"],
        pattern=(LayerKind(rope=rope),),
    )


def _mixtral(hf: HF) -> Fields:
    return _llama(
        hf,
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        experts=_experts(hf),
        experts_per_token=hf.get("num_experts_per_tok", 2),
        expert_hidden=hf["intermediate_size"],
        normalize_experts=True,
        pattern=(LayerKind(window=hf.get("sliding_window"), rope=read_rope(hf, theta=1e6), sparse=True),),
    )


def _experts(hf: HF) -> int:
    return hf["num_local_experts"] if "num_local_experts" in hf else hf["num_experts"]  # transformers 5, and 4


def _is_sparse(hf: HF, index: int) -> bool:
    step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
    return index not in dense and (index + 1) % step == 0


def _qwen_moe(hf: HF, pattern: tuple[LayerKind, ...], **own: Any) -> Fields:
    return _llama(
        hf,
        experts=_experts(hf),
        experts_per_token=hf["num_experts_per_tok"],
        expert_hidden=hf["moe_intermediate_size"],
        normalize_experts=hf.get("norm_topk_prob", False),
        pattern=pattern,
        **own,
    )


def _qwen2_moe(hf: HF) -> Fields:
    window, rope, last = _qwen_window(hf), read_rope(hf), hf.get("max_window_layers", 28)

    def kind(slides: bool, index: int) -> LayerKind:
        return LayerKind(window=window if slides else None, rope=rope, sparse=_is_sparse(hf, index))

    pattern = _pattern(hf, kind, lambda i: window is not None and i % 2 == 0 and i < last)
    shared = hf.get("shared_expert_intermediate_size", 5632)
    return _qwen_moe(hf, pattern, shared_hidden=shared, qkv_bias=hf.get("qkv_bias", True), out_bias=False)


def _qwen3_moe(hf: HF) -> Fields:
    window, rope = _qwen_window(hf), read_rope(hf)
    pattern = tuple(
        LayerKind(window=window, rope=rope, sparse=_is_sparse(hf, i)) for i in range(hf["num_hidden_layers"])
    )
    return _qwen_moe(hf, pattern, qk_norm="head")


def _olmoe(hf: HF) -> Fields:
    return _llama(
        hf,
        qk_norm="full",
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        clip_qkv=hf.get("clip_qkv"),
        experts=_experts(hf),
        experts_per_token=hf["num_experts_per_tok"],
        expert_hidden=hf["intermediate_size"],
        normalize_experts=hf.get("norm_topk_prob", False),
        pattern=(LayerKind(rope=read_rope(hf), sparse=True),),
    )


FAMILIES: dict[str, Callable[[HF], Fields]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
}
