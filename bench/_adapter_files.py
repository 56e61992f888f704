"""Adapters of random weights, as PEFT's folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

import satchel
from satchel.adapt import save_peft
from satchel.core.book import make
from satchel.model.adapters import adapter_parameters, attach, detach
from satchel.model.decoder import Decoder

RANKS = (1, 2, 4, 8, 16, 32)


def adapters(home: Path, model: str, ranks: Sequence[int], targets: str = "") -> list[Path]:
    """Write an adapter of each rank below `home`; `targets` as an adapter spells them, all maps without."""
    decoder = satchel.load(model)
    return [write(decoder, home / f"adapter{number}", rank, number, targets) for number, rank in enumerate(ranks)]


def write(decoder: Decoder, folder: Path, rank: int, seed: int, targets: str = "") -> Path:
    """One adapter, whose update is some hundredths of the weights."""
    rng = torch.Generator().manual_seed(seed)
    attach(decoder, make("adapter", f"lora:rank={rank}" + (f",targets={targets}" if targets else "")), rng)
    with torch.no_grad():
        for name, parameter in adapter_parameters(decoder):
            if name.endswith("B_OR"):
                parameter.normal_(0, 0.02, generator=rng)
    save_peft(decoder, folder)
    detach(decoder)
    return folder
