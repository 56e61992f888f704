"""Models of random weights with the demo model's tokenizer, as Hugging Face folders, and a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import satchel
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.source import find_source
from satchel.model.tokenizer import Tokenizer

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


def byte_tokenizer(template: str) -> Tokenizer:
    """One token a byte, and `<s>`, `</s>`; `template` is its chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {piece: index + 2 for index, piece in enumerate(alphabet)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, backend.get_vocab_size(), {"bos_token": "<s>", "eos_token": "</s>"}, template)
