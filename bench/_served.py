"""A model as `satchel serve` loads it."""

import torch

from satchel.core.book import make
from satchel.model.decoder import Decoder
from satchel.model.load import load
from satchel.model.source import Source
from satchel.model.storage import storage


def served_model(source: Source, format: str = "auto") -> Decoder:
    """In bfloat16 on the CPU, its weights as they lie by themselves, or in another format."""
    return load(source, torch.bfloat16, format=make("format", storage(format, source, "cpu")), frozen=True)
