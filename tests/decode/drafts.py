"""Toy models on disk, and small ones that guess for them."""

import torch

from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.save import save
from tests.run.toys import VOCABULARY

HF = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "rms_norm_eps": 1e-5}
HF |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
HF |= {"max_position_embeddings": 512, "tie_word_embeddings": True, "hidden_act": "silu"}


def large(**changes):
    """The model whose answers count; the same each time."""
    decoder = Decoder(ModelConfig.from_hf(HF | changes))
    decoder.init_weights(torch.Generator().manual_seed(7), std=0.1)
    return decoder.eval()


@torch.no_grad()
def draft(folder, noise=0.02, odd=0.0, **changes):
    """A folder with a model whose weights are the large one's and some noise, more of it on odd tokens if `odd` says
    so; its path as a string."""
    decoder, rng = large(**changes), torch.Generator().manual_seed(8)
    for parameter in decoder.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=noise)
    embedding_VD = decoder.model.embed_tokens.weight
    embedding_VD[1::2] += odd * torch.randn(embedding_VD[1::2].shape, generator=rng)
    return str(save(decoder, folder))
