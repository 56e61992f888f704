"""Models whose file holds blocks, without a file format around them."""

from pathlib import Path

import torch
from torch import Tensor

from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.encodings import ENCODINGS
from satchel.model.source import Source
from satchel.model.stored import Part, Stored

LLAMA = {"model_type": "llama", "vocab_size": 203, "hidden_size": 256, "intermediate_size": 512}
LLAMA |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
LLAMA |= {"max_position_embeddings": 1024, "tie_word_embeddings": True}


def raw_blocks(kind: str, outputs: int, inputs: int, rng: torch.Generator) -> Tensor:
    """A matrix of about zero mean and a standard deviation of 0.05, uint8 [O, B]."""
    if kind == "BF16":
        return torch.randn(outputs, inputs, generator=rng).mul(0.05).bfloat16().view(torch.uint8)
    encoding = ENCODINGS[kind]
    blocks = outputs * inputs // encoding.values
    raw_NB = torch.randint(0, 256, (blocks, encoding.nbytes), dtype=torch.uint8, generator=rng)
    scale = {"Q8_0": 0.05 / 73, "Q6_K": 0.05 / 18 / 73, "Q4_K": 0.05 / 4.6 / 36}.get(kind, 0.05 / 4.6)
    scale_N1 = (torch.rand(blocks, 1, generator=rng) + 0.5) * scale
    at = encoding.nbytes - 2 if kind == "Q6_K" else 0
    raw_NB[:, at : at + 2] = scale_N1.half().view(torch.uint8)
    if kind in ("Q4_1", "Q4_K"):
        raw_NB[:, 2:4] = (scale_N1 * (-8 if kind == "Q4_1" else 8)).half().view(torch.uint8)
    return raw_NB.view(outputs, -1)


def blocky(folder: Path, kinds: tuple[str, ...], seed: int = 0, **changes: object) -> Source:
    """A small Llama in one file, its matrices in blocks of these kinds in turn, its norms in float32."""
    config, rng = ModelConfig.from_hf(LLAMA | changes), torch.Generator().manual_seed(seed)
    path, tensors, start = folder / "weights.bin", {}, 0
    with open(path, "wb") as file:
        for name, parameter in Decoder(config, device="meta").named_parameters():
            kind = kinds[len(tensors) % len(kinds)] if parameter.dim() == 2 else "F32"
            if parameter.dim() == 2:
                kind = "Q4_0" if parameter.shape[1] % ENCODINGS[kind].values else kind
                raw = raw_blocks(kind, *parameter.shape, rng)
            else:
                raw = torch.rand(parameter.shape, generator=rng).add(0.5).view(torch.uint8)
            tensors[name] = Stored(name, tuple(parameter.shape), kind, path, start)
            start += file.write(raw.numpy().tobytes())
    return Source("blocky", "gguf", path, config, tensors, {name: Part(name) for name in tensors})
