"""Models of random weights with the demo model's tokenizer, as Hugging Face folders: for their shapes."""

from __future__ import annotations

from pathlib import Path

import torch

import satchel
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.source import find_source

HEAD = 64  # features of a head


def toy(folder: Path, width: int, layers: int, tied: bool = True, vocabulary: int = 0) -> Path:
    """A Llama of that width, a multiple of 192, with three query heads to a key head, written to `folder`.

    `vocabulary`: rows of its embedding, if not the tokenizer's.
    """
    source, heads = find_source("demo"), width // HEAD
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": vocabulary or source.config.vocab,
            "hidden_size": width,
            "intermediate_size": width * 8 // 3 // HEAD * HEAD,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 3,
            "head_dim": HEAD,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": tied,
        }
    )
    decoder = Decoder(config, dtype=torch.bfloat16)
    with torch.no_grad():
        decoder.init_weights(torch.Generator().manual_seed(0))
    return satchel.save(decoder, folder, tokenizer_from=source)
