"""Predict the next token: the cross-entropy of every target that counts.

    loss = - sum over n with target_n >= 0 of log softmax(head(hidden_n))[target_n]

The logits of `chunk` tokens are alive at once, never those of the batch; see model/cross_entropy.py. A head that is
adapted or packed has no plain matrix: its chunks are run again in the backward pass instead.
Paper: https://arxiv.org/abs/2410.10989 (the fused, chunked loss)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from satchel.core.seams import Card, Objective
from satchel.model.batch import IGNORE
from satchel.model.functional import chunked_cross_entropy
from satchel.train._recompute import recomputed

if TYPE_CHECKING:
    from satchel.model.batch import Batch
    from satchel.model.decoder import Decoder

# N tokens of all documents, C tokens of a chunk, D width


@dataclass(frozen=True, kw_only=True)
class CausalLM(Objective):
    """Next-token prediction over the batch's targets."""

    card = Card(
        paper="https://arxiv.org/abs/2410.10989",
        saves=("activations", "workspace"),
        fidelity="exact",
        claim="60% less memory than unfused layers in training language models",
        reference="torch",
    )

    chunk: int = 128  # tokens whose logits are alive at once, 1 or more

    def __post_init__(self) -> None:
        self.require(self.chunk >= 1, f"chunk={self.chunk} is below 1; 128 tokens are usual")

    def loss(
        self, model: Decoder, batch: Batch, rng: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss of a batch, a float32 scalar, and nothing beside it."""
        x_ND = model.hidden(batch.tokens_1N, lengths=batch.lengths)[0]
        targets_N = batch.targets_1N[0]
        head = model.lm_head
        if not isinstance(getattr(head, "weight", None), Tensor):
            return self._through(model, x_ND, targets_N), {}
        cap, bias = model.config.logit_softcap, getattr(head, "bias", None)
        return chunked_cross_entropy(x_ND, head.weight, targets_N, chunk=self.chunk, softcap=cap, bias=bias), {}

    def _through(self, model: Decoder, x_ND: Tensor, targets_N: Tensor) -> Tensor:
        """The summed loss through whatever module the head is."""

        def piece(x_CD: Tensor, targets_C: Tensor) -> Tensor:
            return F.cross_entropy(model.logits(x_CD).float(), targets_C, ignore_index=IGNORE, reduction="sum")

        pieces = zip(x_ND.split(self.chunk), targets_N.split(self.chunk), strict=True)
        return torch.stack([recomputed(piece)(*both) for both in pieces]).sum()
