"""Where each parameter of the decoder lies in a GGUF file.

llama.cpp's converter changes some tensors on the way; here that is undone: Llama's query and key rows are interleaved
for its kind of rotary positions, Gemma's norms carry their +1, fused matrices hold q, k and v (or gate and up) one
after the other, and the experts of a layer are stacked.
"""

import math
import re
from collections.abc import Iterator
from functools import partial

from torch import Tensor

from satchel.model.config import ModelConfig
from satchel.model.gguf import GgufFile
from satchel.model.stored import Part, Stored

# Where GGUF's names go, under `blk.N.` and `model.layers.N.`; experts and fused matrices are treated apart.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "position_embd": "model.embed_positions",
    "output_norm": "model.norm",
    "output": "lm_head",
}
IGNORED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # the configuration has them
INTERLEAVED = ("llama", "mistral", "mixtral")  # families whose query and key rows llama.cpp reorders


def gguf_parts(file: GgufFile, config: ModelConfig) -> dict[str, Part]:
    """Parameter name to its part of the file. A tensor that belongs nowhere keeps its own name, and is found out."""
    parts: dict[str, Part] = {}
    for stored in file.tensors.values():
        if stored.name not in IGNORED:
            parts |= dict(_of_tensor(stored, config, file))
    return parts


def _of_tensor(stored: Stored, config: ModelConfig, file: GgufFile) -> Iterator[tuple[str, Part]]:
    layer = re.fullmatch(r"blk\.(\d+)\.([a-z_]+)(?:\.(\d+))?\.(weight|bias)", stored.name)
    if layer is None:
        base, _, kind = stored.name.rpartition(".")
        yield f"{OUTER_NAMES.get(base, base)}.{kind}", Part(stored.name, shift=_shift(stored.name, config))
        return
    index, name, expert, kind = layer.groups()
    for target, part in _of_layer(
        stored, name, expert, config, fused_gate=f"blk.{index}.ffn_gate.weight" not in file.tensors
    ):
        yield f"model.layers.{index}.{target}.{kind}", part


def _of_layer(
    stored: Stored, name: str, expert: str | None, config: ModelConfig, fused_gate: bool
) -> Iterator[tuple[str, Part]]:
    if name == "attn_qkv":
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        yield from _one_after_the_other(stored, {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv})
    elif name == "ffn_up" and config.gated and fused_gate and expert is None:
        yield from _one_after_the_other(stored, {"mlp.gate_proj": config.hidden, "mlp.up_proj": config.hidden})
    elif name.endswith("_exps"):
        size = math.prod(stored.shape[1:])
        for e in range(stored.shape[0]):
            yield f"mlp.experts.{e}.{name.split('_')[1]}_proj", Part(stored.name, first=e * size)
    elif expert is not None:
        yield f"mlp.experts.{expert}.{name.split('_')[1]}_proj", Part(stored.name)
    else:
        target = LAYER_NAMES.get(name, name)
        if name == "ffn_norm" and config.norm_place == "sandwich":
            target = "pre_feedforward_layernorm"
        yield target, Part(stored.name, shift=_shift(stored.name, config), into=_order(name, config))


def _one_after_the_other(stored: Stored, rows: dict[str, int]) -> Iterator[tuple[str, Part]]:
    first, width = 0, math.prod(stored.shape[1:])
    for name, count in rows.items():
        yield name, Part(stored.name, first=first)
        first += count * width


def _shift(name: str, config: ModelConfig) -> float:
    return -1.0 if config.norm == "rms_plus_one" and name.endswith("norm.weight") else 0.0


def _order(name: str, config: ModelConfig) -> partial | None:
    """llama.cpp pairs row i of a head with row i + E/2; the checkpoints keep the halves apart."""
    if config.family in INTERLEAVED and name in ("attn_q", "attn_k"):
        return partial(_interleaved, heads=config.heads if name == "attn_q" else config.kv_heads)
    return None


def _interleaved(out: Tensor, heads: int) -> Tensor:
    return out.unflatten(0, (heads, 2, -1)).transpose(1, 2)
