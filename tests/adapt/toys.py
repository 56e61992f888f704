"""Small models that adapters are tried on."""

import torch
from torch import Tensor, nn


class Toy(nn.Module):
    """Two residual blocks with the usual names, a router-like gate, and a head."""

    def __init__(self, width: int = 64, dtype: torch.dtype = torch.float32, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(width, bias) for _ in range(2))
        self.lm_head = nn.Linear(width, 8, bias=False)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)  # Module.to cannot swap fake tensors

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(x)


class Block(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, 2 * width, bias=bias)
        self.gate = nn.Linear(width, 1)
        self.down_proj = nn.Linear(2 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.tanh(self.up_proj(x)) * self.gate(x).sigmoid())


def tiny_llama(seed: int = 0) -> nn.Module:
    """A Hugging Face Llama of two layers with grouped heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def stir(parameters, scale: float = 0.05) -> None:
    """Random values in place of the neutral ones that adapters are born with."""
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=rng).to(parameter), alpha=scale)
