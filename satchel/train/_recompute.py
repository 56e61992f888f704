"""Running a block again in the backward pass instead of keeping what it computed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(block: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`block` such that only its inputs are kept for the backward pass. Without gradients it runs as it is."""

    def run(*inputs: Any, **named: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return block(*inputs, **named)
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=draws(block), **named)

    return run


def draws(block: Any) -> bool:
    """Whether the block draws random numbers, so that its second run has to draw the same."""
    modules = block.modules() if isinstance(block, nn.Module) else ()
    return any(module.training and _dropout(module) > 0 for module in modules)


def _dropout(module: nn.Module) -> float:
    """The share that a module drops: that of torch's own, or of an adapter whose field `dropout` says so."""
    share = module.p if isinstance(module, nn.Dropout) else getattr(module, "dropout", 0.0)
    return share if isinstance(share, float) else 0.0
