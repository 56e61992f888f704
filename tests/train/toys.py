"""A small decoder and a batch of it, for tests of objectives, activations and optimizers."""

import torch

from satchel.model.batch import Batch
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder

VOCAB = 97


def toy_decoder(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> Decoder:
    """A Llama of 4 layers and width 32, with random weights large enough to make the losses differ."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 32}
    config |= {"intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    decoder = Decoder(ModelConfig.from_hf(config | changes), dtype=dtype)
    decoder.init_weights(torch.Generator().manual_seed(seed), std=0.2)
    return decoder


def toy_batch(lengths: tuple[int, ...] = (11, 5, 16), seed: int = 0) -> Batch:
    """Documents of random tokens in which every fifth target takes no loss."""
    rng = torch.Generator().manual_seed(seed)
    tokens_1N = torch.randint(VOCAB, (1, sum(lengths)), generator=rng)
    targets_1N = torch.randint(VOCAB, (1, sum(lengths)), generator=rng)
    targets_1N[:, ::5] = -100
    return Batch(tokens_1N, targets_1N, lengths, int((targets_1N >= 0).sum()))
