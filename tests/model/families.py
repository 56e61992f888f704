"""Toy Hugging Face models of every family, with all weights random, saved as transformers saves them."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.names import house_recipes

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 101, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64}
OPT = {"vocab_size": 101, "hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 3, "num_attention_heads": 6}
OPT |= {"max_position_embeddings": 64}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "tie_word_embeddings": False}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5, "pad_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": [1.1, 1.2, 1.4, 1.9], "long_factor": [1.5, 2.0, 4.0, 8.0]}
THETA = {"rope_theta": 10_000.0}

# name of the case: model type, then what differs from the family's defaults
CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", SHAPE),
    "llama-biased": ("llama", SHAPE | {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama-tied": ("llama", SHAPE | {"tie_word_embeddings": True}),
    "llama-3.1": ("llama", SHAPE | {"rope_parameters": LLAMA3 | THETA | {"original_max_position_embeddings": 32}}),
    "llama-linear": ("llama", SHAPE | {"rope_parameters": THETA | {"rope_type": "linear", "factor": 2.5}}),
    "llama-yarn": ("llama", SHAPE | {"rope_parameters": YARN | THETA}),
    "llama-dynamic": (
        "llama",
        SHAPE | {"max_position_embeddings": 16, "rope_parameters": THETA | {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "mistral": ("mistral", SHAPE | {"sliding_window": None}),
    "mistral-sliding": ("mistral", SHAPE | {"sliding_window": 5}),
    "qwen2": ("qwen2", SHAPE | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", SHAPE | {"head_dim": 12}),
    "gemma": ("gemma", SHAPE | {"head_dim": 12, "pad_token_id": 0}),
    "gemma2": ("gemma2", SHAPE | GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", SHAPE | GEMMA | {"sliding_window_pattern": 2, "final_logit_softcapping": 4.0}),
    "phi3": ("phi3", SHAPE | {"pad_token_id": 0}),
    "phi3-long": (
        "phi3",
        SHAPE | {"pad_token_id": 0, "rope_parameters": LONG | THETA, "original_max_position_embeddings": 16},
    ),
    "phi3-short": (
        "phi3",
        SHAPE
        | {"pad_token_id": 0, "rope_parameters": LONG | THETA, "original_max_position_embeddings": 32, "head_dim": 8},
    ),
    "olmo2": ("olmo2", SHAPE),
    "gpt2": ("gpt2", GPT2),
    "gpt2-by-depth": ("gpt2", GPT2 | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 60}),
    "opt": ("opt", OPT),
    "opt-350m": ("opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "gpt_neox": ("gpt_neox", SHAPE | {"num_attention_heads": 3, "rotary_pct": 0.25}),
    "gpt_neox-serial": (
        "gpt_neox",
        SHAPE | {"use_parallel_residual": False, "rotary_pct": 1.0, "attention_bias": False},
    ),
    "mixtral": ("mixtral", SHAPE | {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7}),
    "qwen2_moe": (
        "qwen2_moe",
        SHAPE | MOE | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    ),
    "qwen3_moe": ("qwen3_moe", SHAPE | MOE | {"mlp_only_layers": [1], "norm_topk_prob": True, "head_dim": 12}),
    "olmoe": ("olmoe", SHAPE | {"num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 1.0}),
}


def hf_config(case: str) -> transformers.PretrainedConfig:
    """The transformers configuration of a case."""
    family, settings = CASES[case]
    return transformers.AutoConfig.for_model(family, **json.loads(json.dumps(settings)))


def hf_model(case: str) -> torch.nn.Module:
    """The transformers model of a case; every weight is drawn, norms and biases too, so that nothing hides."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(hf_config(case)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5 if parameter.dim() == 1 else 0.2)
    return model


def tensors_on_disk(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def our_model(folder: Path) -> Decoder:
    """The decoder of a saved model, every parameter filled."""
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    tensors = tensors_on_disk(folder)
    weights = {name: r.make([tensors[s] for s in r.sources]) for name, r in house_recipes(config, tensors).items()}
    if config.tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    decoder = Decoder(config)
    decoder.load_state_dict(weights)
    return decoder.eval()
