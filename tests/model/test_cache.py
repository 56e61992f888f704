"""Decoding with a cache gives the logits of the whole sequence, however the tokens arrive."""

import pytest
import torch

from satchel.model.cache import STEP, Cache, LayerCache
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from tests.model.families import SHAPE
from tests.tolerances import TOLERANCE

TOKENS = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(0))
FAMILIES = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "gemma2": {"model_type": "gemma2", "sliding_window": 4, "attn_logit_softcapping": 2.0},
    "gpt_neox": {"model_type": "gpt_neox"},
}


def decoder_of(family: str) -> Decoder:
    decoder = Decoder(ModelConfig.from_hf(SHAPE | FAMILIES[family]))
    decoder.init_weights(torch.Generator().manual_seed(1), std=0.2)
    return decoder.eval()


@pytest.mark.parametrize("steps", [[12], [5, 1, 1, 1, 4], [1] * 12])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_do_not_depend_on_how_tokens_arrive(family: str, steps: list[int]) -> None:
    decoder = decoder_of(family)
    cache = Cache(decoder.config, torch.float32)
    logits = torch.cat([decoder(tokens, cache=cache) for tokens in TOKENS.split(steps, dim=1)], 1)
    expected = decoder(TOKENS)
    assert (logits - expected).abs().max() <= TOLERANCE[torch.float32] * expected.abs().max()
    assert cache.length == 12


@torch.no_grad()
def test_truncation_takes_tokens_back() -> None:
    decoder = decoder_of("llama")
    cache = Cache(decoder.config, torch.float32)
    decoder(TOKENS, cache=cache)
    cache.truncate(7)
    again = decoder(TOKENS[:, 7:], cache=cache)
    assert (again - decoder(TOKENS)[:, 7:]).abs().max() <= TOLERANCE[torch.float32] * again.abs().max()


def test_growth_keeps_what_was_stored_and_counts_its_bytes() -> None:
    layer = LayerCache(torch.float32)
    rows = torch.randn(1, 3 * STEP, 2, 4, generator=torch.Generator().manual_seed(0))
    for part in rows.split(STEP - 5, dim=1):
        keys, values = layer.append(part, -part)
    assert torch.equal(keys, rows) and torch.equal(values, -rows)
    assert layer.length == 3 * STEP and layer.nbytes == 2 * layer.capacity * 2 * 4 * 4
    assert layer.capacity < 5 * STEP
