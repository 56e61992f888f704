"""Write text with a decoder: sampling, a cache of the past, and text that appears as it is made.

generate(model, tokenizer, "The sky is", temperature=0)            continues plain text
generate(model, tokenizer, [{"role": "user", "content": "Hi"}])    answers a conversation
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from satchel.core.errors import UserError
from satchel.model.cache import Cache
from satchel.model.decoder import Decoder
from satchel.run.text import TextStream

if TYPE_CHECKING:
    from satchel.model.tokenizer import Tokenizer

# T tokens, D width, V vocabulary

PREFILL = 512  # prompt tokens that go through the model at once: bounds the memory of a long prompt


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str | Sequence[dict[str, str]],
    *,
    max_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The continuation of a text, or the answer to messages of `role` and `content`; without special tokens.

    `temperature` 0 takes the likeliest token, otherwise one is drawn from the likeliest that hold `top_p` of the
    probability. `on_text` receives the text piece by piece, whole characters only. Ends at the model's stop tokens, at
    `max_tokens` or at the model's context. Raises UserError for a setting out of range and a prompt that is too long.
    """
    _check(max_tokens, temperature, top_p)
    ids = tokenizer.encode(prompt, special=True) if isinstance(prompt, str) else _conversation(tokenizer, prompt)
    room = model.config.context - len(ids)
    if not ids or room < 1:
        raise UserError(f"the prompt has {len(ids)} tokens; this model takes 1 to {model.config.context - 1}")
    rng = torch.Generator().manual_seed(seed)
    pieces: list[str] = []
    stream = TextStream(tokenizer)
    for token in continue_tokens(model, ids, min(max_tokens, room), lambda l_V: sample(l_V, temperature, top_p, rng)):
        if token in tokenizer.stop_ids:
            break
        _emit(stream.push(token), pieces, on_text)
    _emit(stream.rest(), pieces, on_text)
    return "".join(pieces)


def continue_tokens(model: Decoder, ids: Sequence[int], count: int, pick: Callable[[Tensor], int]) -> Iterator[int]:
    """`count` tokens after `ids`, one by one; `pick` chooses each from logits_V (float32, on the CPU)."""
    weight = model.model.embed_tokens.weight
    cache = Cache(model.config, weight.dtype, weight.device)
    training = model.training
    model.eval()
    try:
        for _ in range(count):
            ids = [pick(_last_logits(model, ids, cache))]
            yield ids[0]
    finally:
        model.train(training)


def sample(logits_V: Tensor, temperature: float, top_p: float, rng: torch.Generator) -> int:
    """A token drawn from softmax(logits / temperature), cut to the fewest likeliest tokens that hold `top_p`."""
    if temperature == 0:
        return int(logits_V.argmax())
    p_V, order_V = torch.softmax(logits_V / temperature, dim=0).sort(descending=True)
    kept_V = p_V * (p_V.cumsum(0) - p_V < top_p)
    return int(order_V[torch.multinomial(kept_V, 1, generator=rng)])


@torch.inference_mode()
def _last_logits(model: Decoder, ids: Sequence[int], cache: Cache) -> Tensor:
    """logits_V after the last of the ids, which are added to the cache."""
    tokens_1T = torch.tensor([ids], device=model.model.embed_tokens.weight.device)
    for part_1T in tokens_1T.split(PREFILL, dim=1):
        x_1TD = model.hidden(part_1T, cache=cache)
    return model.logits(x_1TD[:, -1:])[0, 0].float().cpu()


def _conversation(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    return tokenizer.encode(tokenizer.chat(messages, generate=True))


def _emit(text: str, pieces: list[str], on_text: Callable[[str], None] | None) -> None:
    if text:
        pieces.append(text)
        if on_text:
            on_text(text)


def _check(max_tokens: int, temperature: float, top_p: float) -> None:
    for name, value, holds, cure in (
        ("max_tokens", max_tokens, max_tokens >= 1, "an answer has at least 1 token"),
        (
            "temperature",
            temperature,
            0 <= temperature < float("inf"),
            "0 takes the likeliest token, 1 draws as trained",
        ),
        ("top_p", top_p, 0 < top_p <= 1, "it lies in (0, 1]; 1 draws from all tokens"),
    ):
        if not holds:
            raise UserError(f"generate: {name}={value} is not allowed; {cure}")
