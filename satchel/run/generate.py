"""Write text with a decoder: one request to an engine of its own, and text that appears as it is made.

generate(model, tokenizer, "The sky is", temperature=0)            continues plain text
generate(model, tokenizer, [{"role": "user", "content": "Hi"}])    answers a conversation
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from satchel.core.errors import UserError
from satchel.core.request import Request, Sampling
from satchel.model.decoder import Decoder
from satchel.model.paged import PAGE
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits

if TYPE_CHECKING:
    from satchel.model.tokenizer import Tokenizer

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
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    ids = tokenizer.encode(prompt, special=True) if isinstance(prompt, str) else _conversation(tokenizer, prompt)
    room = model.config.context - len(ids)
    if not ids or room < 1:
        raise UserError(f"the prompt has {len(ids)} tokens; this model takes 1 to {model.config.context - 1}")
    request = Request(
        prompt=tuple(ids), max_tokens=min(max_tokens, room), sampling=sampling, stop_tokens=tuple(tokenizer.stop_ids)
    )
    training = model.training
    try:
        return _answer(_engine_for(request, model, tokenizer), request, on_text)
    finally:
        model.train(training)


def _engine_for(request: Request, model: Decoder, tokenizer: Tokenizer) -> Engine:
    """An engine whose pool holds this one request, and whose rotary positions are scaled for its length."""
    total = len(request.prompt) + request.max_tokens
    return Engine(model, Limits(-(-total // PAGE), 1, PREFILL, total), tokenizer)


def _answer(engine: Engine, request: Request, on_text: Callable[[str], None] | None) -> str:
    pieces: list[str] = []
    engine.submit(request)
    while not engine.idle:
        for event in engine.step():
            if event.error:
                raise UserError(event.error)
            if event.text:
                pieces.append(event.text)
                if on_text:
                    on_text(event.text)
    return "".join(pieces)


def _conversation(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    return tokenizer.encode(tokenizer.chat(messages, generate=True))
