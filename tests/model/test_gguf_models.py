"""GGUF files of every architecture, converted from transformers' models the way that llama.cpp does it."""

import copy
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from satchel.core.errors import ModelError
from satchel.model.load import load
from satchel.model.save import save
from satchel.model.source import find_source
from tests.model.families import GEMMA, MOE, SHAPE, THETA
from tests.tolerances import TOLERANCE

SHAPE = SHAPE | {"rms_norm_eps": 1e-5, "rope_parameters": THETA}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.1, 1.2, 1.4, 1.9], "long_factor": [1.5, 2.0, 4.0, 8.0]}
GEMMA = SHAPE | GEMMA | {"query_pre_attn_scalar": 12, "sliding_window_pattern": 6}

# case: architecture in GGUF, model type in transformers, settings
CASES = {
    "llama": ("llama", "llama", SHAPE),
    "llama-biased": ("llama", "llama", SHAPE | {"attention_bias": True, "head_dim": 10}),
    "llama-3.1": (
        "llama",
        "llama",
        SHAPE | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 8192}},
    ),
    "llama-divisors": (  # none of which is the factor itself: they stay divisors
        "llama",
        "llama",
        SHAPE | {"rope_parameters": THETA | LLAMA3 | {"original_max_position_embeddings": 8192}},
    ),
    "llama-linear": ("llama", "llama", SHAPE | {"rope_parameters": THETA | {"rope_type": "linear", "factor": 2.5}}),
    "mixtral": ("llama", "mixtral", SHAPE | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mistral": ("llama", "mistral", SHAPE | {"sliding_window": None}),
    "qwen2": ("qwen2", "qwen2", SHAPE | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "qwen3", SHAPE | {"head_dim": 12}),
    "qwen2moe": ("qwen2moe", "qwen2_moe", SHAPE | MOE | {"shared_expert_intermediate_size": 40}),
    "qwen3moe": ("qwen3moe", "qwen3_moe", SHAPE | MOE | {"norm_topk_prob": True, "head_dim": 12}),
    "olmoe": ("olmoe", "olmoe", SHAPE | {"num_experts": 6, "num_experts_per_tok": 3}),
    "gemma": ("gemma", "gemma", SHAPE | {"head_dim": 12, "pad_token_id": 0}),
    "gemma2": ("gemma2", "gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3", "gemma3_text", GEMMA | {"num_hidden_layers": 7}),
    "phi3": ("phi3", "phi3", SHAPE | {"pad_token_id": 0}),
    "phi3-long": (
        "phi3",
        "phi3",
        SHAPE | {"pad_token_id": 0, "rope_parameters": LONG | THETA, "original_max_position_embeddings": 32},
    ),
    "olmo2": ("olmo2", "olmo2", SHAPE),
    "gpt2": ("gpt2", "gpt2", {"vocab_size": 101, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64}),
    "gptneox": ("gptneox", "gpt_neox", SHAPE | {"num_attention_heads": 3, "rotary_pct": 0.25}),
}
TOKENS_BT = torch.randint(2, 101, (2, 12), generator=torch.Generator().manual_seed(0))


def toy(family: str, settings: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **copy.deepcopy(settings))  # which it changes
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5 if parameter.dim() == 1 else 0.2)
    return model


def convert(model: torch.nn.Module, architecture: str, path: Path) -> None:
    """What llama.cpp's convert_hf_to_gguf does with the model."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    describe(writer, config, architecture)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    model.save_pretrained(path.parent / "hf")
    tensors = {name: t.float().numpy() for name, t in load_file(path.parent / "hf/model.safetensors").items()}
    for name, array in stacked(tensors).items():
        base, _, kind = name.rpartition(".")
        array = changed(name, array, config, architecture)
        writer.add_tensor(f"{names.get_name(base) or base}.{kind}", np.ascontiguousarray(array))
    rope_tensors(writer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: gguf.GGUFWriter, config: transformers.PretrainedConfig, architecture: str) -> None:
    heads, rope = config.num_attention_heads, getattr(config, "rope_parameters", None) or {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_pad_token_id(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", heads))
    if architecture in ("gpt2", "gptneox"):
        writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", getattr(config, "layer_norm_epsilon", 0)))
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(head_dim)
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if experts := getattr(config, "num_experts", getattr(config, "num_local_experts", 0)):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)


def rope_tensors(writer: gguf.GGUFWriter, config: transformers.PretrainedConfig) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
        half = scaled.shape[0]
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, half).float() / half)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    if rope.get("rope_type") == "longrope":
        for which in ("long", "short"):
            writer.add_tensor(f"rope_factors_{which}.weight", np.array(rope[f"{which}_factor"], dtype=np.float32))


def stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The experts of a layer as one tensor."""
    whole: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, array in tensors.items():
        if expert := re.fullmatch(r"(.*experts)\.(\d+)\.(\w+\.weight)", name):
            experts.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = array
        else:
            whole[name] = array
    return whole | {name: np.stack([stack[i] for i in range(len(stack))]) for name, stack in experts.items()}


def changed(name: str, array: np.ndarray, config: transformers.PretrainedConfig, architecture: str) -> np.ndarray:
    """A tensor's numbers as llama.cpp wants them."""
    if architecture == "llama" and re.search(r"[qk]_proj", name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        array = array + 1
    if architecture == "gpt2" and re.search(r"(c_attn|c_proj|c_fc)\.weight", name):
        array = array.T
    if "query_key_value" in name:
        heads = config.num_attention_heads
        array = array.reshape(heads, 3, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
    if "shared_expert_gate" in name:
        array = array.reshape(-1)
    return array


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_converted_model_keeps_its_logits(case, tmp_path):
    architecture, family, settings = CASES[case]
    model = toy(family, settings)
    convert(model, architecture, tmp_path / "model.gguf")
    ours = load(str(tmp_path / "model.gguf"), dtype=torch.float32)
    expected = model(TOKENS_BT).logits
    bound = 10 * TOLERANCE[torch.float32] * expected.abs().max()
    assert (ours(TOKENS_BT) - expected).abs().max() <= bound
    save(ours, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert (again(TOKENS_BT).logits - expected).abs().max() <= bound


def test_llama_3_scaling_is_recognised_by_its_divisors(tmp_path):
    architecture, family, settings = CASES["llama-3.1"]
    convert(toy(family, settings), architecture, tmp_path / "model.gguf")
    scaling = find_source(str(tmp_path / "model.gguf")).config.to_hf()["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 4.0)


def test_an_unsupported_architecture_names_the_nearest(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen4")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'qwen4' is not supported; did you mean 'qwen"):
        find_source(str(tmp_path / "model.gguf"))


def test_a_file_without_its_sizes_or_embeddings_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"no 'llama\.attention\.head_count'"):
        find_source(str(tmp_path / "model.gguf"))
