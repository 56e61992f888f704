"""The configuration of the decoder in a GGUF file, as Hugging Face would write it.

What the metadata leaves out (the vocabulary, biases, a tied head, experts' width) is read off the tensors.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from satchel.core.errors import ModelError, nearest
from satchel.model.config import ModelConfig
from satchel.model.gguf import GgufFile
from satchel.model.stored import Part, Reader

HF = dict[str, Any]


class _Keys:
    """The metadata of one architecture, without its prefix; a missing key is a ModelError that names it."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.architecture = file, str(file.metadata.get("general.architecture"))

    def __call__(self, key: str, default: Any = None) -> Any:
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ModelError(
                f"{self.file.path}: no '{self.architecture}.{key}' in the metadata; convert the model again"
            )
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ModelError(f"{self.file.path}: '{key}' differs between layers, which we do not support")
            return value[0]
        return value

    def rows(self, name: str, axis: int = 0) -> int:
        stored = self.file.tensors.get(name)
        if stored is None or len(stored.shape) <= axis:
            raise ModelError(f"{self.file.path}: no tensor '{name}' in the file; fetch it again, or convert it again")
        return stored.shape[axis]

    def has(self, name: str) -> bool:
        return name in self.file.tensors


def gguf_config(file: GgufFile) -> ModelConfig:
    """The configuration of the decoder in a GGUF file. ModelError for an architecture that is not supported."""
    keys = _Keys(file)
    if keys.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        hint = nearest(keys.architecture, ARCHITECTURES)
        raise ModelError(f"{file.path}: architecture '{keys.architecture}' is not supported; {hint} Supported: {known}")
    return ModelConfig.from_hf(ARCHITECTURES[keys.architecture](keys, _shared(keys)) | _token_ids(file.metadata))


def _token_ids(metadata: Mapping[str, Any]) -> HF:
    roles = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {name: metadata.get(f"tokenizer.ggml.{role}_token_id") for name, role in roles.items()}
    return {name: value for name, value in found.items() if value is not None}


def _shared(keys: _Keys) -> HF:
    heads, width = keys("attention.head_count"), keys("embedding_length")
    head_dim = keys("attention.key_length", keys("rope.dimension_count", width // heads))
    return {
        "vocab_size": keys.rows("token_embd.weight"),
        "hidden_size": width,
        "intermediate_size": keys("feed_forward_length", 0),
        "num_hidden_layers": keys("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys("context_length"),
        "rms_norm_eps": _short(keys("attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": _short(keys("rope.freq_base", 10_000.0)),
        "rope_scaling": _scaling(keys),
        "tie_word_embeddings": not keys.has("output.weight"),
    }


def _short(value: float) -> float:
    """A float32 as the decimal that it was written from: 9.999999747378752e-06 is 1e-05."""
    return float(f"{value:.7g}")


def _scaling(keys: _Keys) -> HF | None:
    kind = keys("rope.scaling.type", "none")
    if keys.has("rope_freqs.weight"):
        return _llama3(keys)
    if kind in ("none", "longrope"):
        return None
    original = keys("rope.scaling.original_context_length", keys("context_length"))
    return {
        "rope_type": kind,
        "factor": _short(keys("rope.scaling.factor", 1.0)),
        "original_max_position_embeddings": original,
    }


def _read(keys: _Keys, name: str) -> list[float]:
    out = torch.empty(keys.rows(name))
    with Reader(keys.file.tensors) as reader:
        reader.read(Part(name), out)
    return [_short(x) for x in out.tolist()]


def _llama3(keys: _Keys) -> HF:
    """Llama 3's scaling from the divisors that it comes to; divisors of any other origin are kept as they are."""
    divisors = _read(keys, "rope_freqs.weight")
    factor, theta, pairs = max(divisors), keys("rope.freq_base", 10_000.0), len(divisors)
    turns = [8192 * theta ** (-i / pairs) / (2 * math.pi) for i in range(pairs)]
    smooth = [min(max((t - 1) / 3, 0.0), 1.0) for t in turns]
    if all(abs(d * ((1 - s) / factor + s) - 1) < 1e-3 for d, s in zip(divisors, smooth, strict=True)):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return {"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors, "attention_factor": 1.0}


def _llama(keys: _Keys, hf: HF) -> HF:
    hf |= {"model_type": "llama", "hidden_act": "silu", "attention_bias": keys.has("blk.0.attn_q.bias")}
    hf["mlp_bias"] = keys.has("blk.0.ffn_up.bias")
    if not keys("expert_count", 0):
        return hf
    return hf | {
        "model_type": "mixtral",
        "num_local_experts": keys("expert_count"),
        "num_experts_per_tok": keys("expert_used_count"),
    }


def _mistral(keys: _Keys, hf: HF) -> HF:
    return hf | {"model_type": "mistral", "sliding_window": keys("attention.sliding_window", 0) or None}


def _qwen(keys: _Keys, hf: HF, family: str) -> HF:
    return hf | {"model_type": family, "use_sliding_window": False, "attention_bias": False}


def _experts(keys: _Keys, hf: HF, family: str, normalize: bool) -> HF:
    hf |= {
        "model_type": family,
        "num_experts": keys("expert_count"),
        "num_experts_per_tok": keys("expert_used_count"),
        "moe_intermediate_size": keys.rows("blk.0.ffn_gate_exps.weight", 1),
        "norm_topk_prob": normalize,
    }
    if keys.has("blk.0.ffn_gate_shexp.weight"):
        hf["shared_expert_intermediate_size"] = keys.rows("blk.0.ffn_gate_shexp.weight")
    if family == "olmoe":
        hf["intermediate_size"] = hf["moe_intermediate_size"]
    hf["intermediate_size"] = hf["intermediate_size"] or hf["moe_intermediate_size"]
    return hf


def _gemma(keys: _Keys, hf: HF, family: str, large: int) -> HF:
    """`large` is the depth of the one size that scales attention by its width a head, not by the head's size."""
    scalar = hf["hidden_size"] // hf["num_attention_heads"] if hf["num_hidden_layers"] == large else hf["head_dim"]
    hf |= {"model_type": family, "hidden_activation": "gelu_pytorch_tanh"}
    if family == "gemma":
        return hf
    hf |= {"query_pre_attn_scalar": scalar, "sliding_window": keys("attention.sliding_window", 4096)}
    attention, final = keys("attn_logit_softcapping", 0.0), keys("final_logit_softcapping", 0.0)
    if family == "gemma2":
        attention, final = attention or 50.0, final or 30.0
    hf |= {"attn_logit_softcapping": attention or None, "final_logit_softcapping": final or None}
    if family == "gemma3_text":
        hf["rope_local_base_freq"] = _short(keys("rope.freq_base_swa", 10_000.0))
        hf["sliding_window_pattern"] = 6
    return hf


def _phi3(keys: _Keys, hf: HF) -> HF:
    original = keys("rope.scaling.original_context_length", hf["max_position_embeddings"])
    rotated = keys("rope.dimension_count", hf["head_dim"])
    head_dim = hf["hidden_size"] // hf["num_attention_heads"]
    hf |= {
        "model_type": "phi3",
        "head_dim": head_dim,
        "partial_rotary_factor": rotated / head_dim,
        "sliding_window": keys("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": original,
    }
    if keys.has("rope_factors_long.weight"):
        long, short = (_read(keys, f"rope_factors_{which}.weight") for which in ("long", "short"))
        hf["rope_scaling"] = {"rope_type": "longrope", "long_factor": long, "short_factor": short}
    return hf


def _gpt2(keys: _Keys, hf: HF) -> HF:
    return {
        "model_type": "gpt2",
        "vocab_size": hf["vocab_size"],
        "n_embd": hf["hidden_size"],
        "n_inner": hf["intermediate_size"] or None,
        "n_layer": hf["num_hidden_layers"],
        "n_head": hf["num_attention_heads"],
        "n_positions": keys.rows("position_embd.weight"),
        "layer_norm_epsilon": _short(keys("attention.layer_norm_epsilon", 1e-5)),
        "tie_word_embeddings": hf["tie_word_embeddings"],
    }


def _gpt_neox(keys: _Keys, hf: HF) -> HF:
    head_dim = hf["hidden_size"] // hf["num_attention_heads"]
    return hf | {
        "model_type": "gpt_neox",
        "head_dim": head_dim,
        "rotary_pct": keys("rope.dimension_count", head_dim) / head_dim,
        "rotary_emb_base": hf["rope_theta"],
        "layer_norm_eps": _short(keys("attention.layer_norm_epsilon", 1e-5)),
        "use_parallel_residual": keys("use_parallel_residual", True),
        "attention_bias": keys.has("blk.0.attn_qkv.bias"),
        "hidden_act": "gelu",
    }


ARCHITECTURES: dict[str, Callable[[_Keys, HF], HF]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": partial(_qwen, family="qwen2"),
    "qwen3": partial(_qwen, family="qwen3"),
    "qwen2moe": partial(_experts, family="qwen2_moe", normalize=False),
    "qwen3moe": partial(_experts, family="qwen3_moe", normalize=True),
    "olmoe": partial(_experts, family="olmoe", normalize=False),
    "gemma": partial(_gemma, family="gemma", large=0),
    "gemma2": partial(_gemma, family="gemma2", large=46),
    "gemma3": partial(_gemma, family="gemma3_text", large=62),
    "olmo2": lambda keys, hf: hf | {"model_type": "olmo2"},
    "phi3": _phi3,
    "gpt2": _gpt2,
    "gptneox": _gpt_neox,
}
