"""The decoder's contract: documents of a row, policies around blocks, tied heads, and building without data."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from satchel.core.errors import ModelError
from satchel.core.seams import Activations
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.functional import chunked_cross_entropy
from tests.model.families import CASES, SHAPE, hf_config
from tests.tolerances import TOLERANCE

ROW = torch.randint(0, 101, (1, 18), generator=torch.Generator().manual_seed(0))


def decoder_of(**changes: object) -> Decoder:
    decoder = Decoder(ModelConfig.from_hf(SHAPE | {"model_type": "llama"} | changes))
    decoder.init_weights(torch.Generator().manual_seed(1), std=0.2)
    return decoder


def assert_close(ours: Tensor, expected: Tensor) -> None:
    assert (ours - expected).abs().max() <= TOLERANCE[torch.float32] * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "mixtral"])
@pytest.mark.parametrize("lengths", [(6, 6, 6), (3, 10, 5), (18,), (1,) * 18])
@torch.no_grad()
def test_documents_of_a_row_are_as_if_alone(family: str, lengths: tuple[int, ...]) -> None:
    own = {"ffn_dim": 80} if family == "opt" else {"num_local_experts": 4} if family == "mixtral" else {}
    decoder = decoder_of(model_type=family, **own)
    logits = decoder(ROW, lengths=lengths)
    assert_close(logits, torch.cat([decoder(document) for document in ROW.split(lengths, dim=1)], 1))


def test_lengths_that_do_not_fit_the_row_are_refused() -> None:
    with pytest.raises(ModelError, match="one row of 17 tokens"):
        decoder_of()(ROW, lengths=(8, 9))


def test_more_tokens_than_learned_positions_are_refused() -> None:
    decoder = decoder_of(model_type="opt", ffn_dim=80, max_position_embeddings=17)
    with pytest.raises(ModelError, match="18 tokens exceed the 17 positions"):
        decoder(ROW)


def test_a_tied_head_is_the_embedding() -> None:
    decoder = decoder_of(tie_word_embeddings=True)
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight


class Recomputed(Activations):
    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def wrap(self, block: Callable[..., Tensor], index: int, depth: int) -> Callable[..., Tensor]:
        self.calls.append((index, depth))
        return lambda *args: checkpoint(block, *args, use_reentrant=False)


@pytest.mark.parametrize("lengths", [None, (3, 10, 5)])
def test_a_policy_around_blocks_changes_nothing_but_memory(lengths: tuple[int, ...] | None) -> None:
    decoder, gradients = decoder_of(model_type="gemma2", sliding_window=4), []
    recomputed = Recomputed()
    for policy in (None, recomputed):
        decoder.wrap_blocks(policy)
        decoder.zero_grad()
        hidden = decoder.hidden(ROW, lengths=lengths)[0]
        chunked_cross_entropy(hidden, decoder.lm_head.weight, ROW[0].roll(-1)).backward()
        gradients.append([p.grad.clone() for p in decoder.parameters()])
    assert recomputed.calls == [(0, 3), (1, 3), (2, 3)]
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("case", CASES)
def test_training_runs_without_data(case: str) -> None:
    config = ModelConfig.from_hf(hf_config(case).to_dict())
    with FakeTensorMode():
        decoder = Decoder(config, dtype=torch.bfloat16)
        hidden = decoder.hidden(torch.zeros(1, 18, dtype=torch.long), lengths=(3, 10, 5))
        loss = chunked_cross_entropy(hidden[0], decoder.lm_head.weight, torch.zeros(18, dtype=torch.long), chunk=4)
        loss.backward()
        assert all(p.grad.shape == p.shape for p in decoder.parameters())


def test_a_model_of_any_size_is_built_without_memory() -> None:
    big = dataclasses.replace(decoder_of().config, width=8192, layers=4, hidden=28672, vocab=128256)
    decoder = Decoder(big, dtype=torch.bfloat16, device="meta")
    assert sum(p.numel() for p in decoder.parameters()) == big.parameters > 4e9
    assert all(isinstance(m, nn.Linear) for name, m in decoder.named_modules() if name.endswith("_proj"))


class Refusing(Activations):
    def wrap(self, block: Callable[..., Tensor], index: int, depth: int) -> Callable[..., Tensor]:
        def run(*_: object) -> Tensor:
            raise AssertionError

        return run


def test_without_gradients_no_policy_is_asked() -> None:
    decoder = decoder_of()
    decoder.wrap_blocks(Refusing())
    with torch.no_grad():
        decoder(ROW)
    with pytest.raises(AssertionError):
        decoder(ROW)
