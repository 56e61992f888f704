"""Write a checkpoint while the loop waits: tensor by tensor, straight to the file.

Takes no memory beside a tensor that lies elsewhere or is not contiguous. The loop waits for the disk, every time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from satchel.core.seams import Card, Checkpoint, Saver, Write
from satchel.model.safetensors_io import plain_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Blocking(Checkpoint):
    """The loop goes on when the checkpoint is on the disk."""

    card = Card(
        paper="https://github.com/huggingface/safetensors",
        spends=("stall",),
        reference="safetensors",
    )

    def start(self, device: torch.device) -> Straight:
        """A saver without state."""
        return Straight()


class Straight(Saver):
    """Nothing of a save is left when it returns."""

    def save(self, files: Mapping[str, Mapping[str, Tensor]], write: Write) -> None:
        """See `Saver`."""
        write({name: map(plain_bytes, named.values()) for name, named in files.items()})

    def settle(self) -> None:
        """Nothing is under way."""

    def finish(self) -> None:
        """Nothing is under way."""
