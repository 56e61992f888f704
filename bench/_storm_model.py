"""What a storm is served with: a tiny model whose keys and values are large.

A token of it is a byte, its layers are narrow and its heads many: a step is quick, and a pool of some MiB holds a few
answers only.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

import satchel
from bench._toy import byte_tokenizer
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
HF = {"model_type": "llama", "vocab_size": 258, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6}
HF |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 1024}
HF |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu"}


def tiny(folder: Path) -> Path:
    """Write the tiny model."""
    decoder = Decoder(ModelConfig.from_hf(HF), torch.bfloat16)
    with torch.no_grad():
        decoder.init_weights(torch.Generator().manual_seed(0), std=0.1)
    satchel.save(decoder, folder)
    byte_tokenizer(TEMPLATE).save(folder)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    return folder
