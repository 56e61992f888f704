"""From a request to the sequences of its answers: what can never run is refused here, with the numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from satchel.core.errors import UserError
from satchel.core.request import Request
from satchel.model.paged import PAGE
from satchel.model.sampling import mix
from satchel.run.adapters import Adapter
from satchel.run.scheduler import Limits
from satchel.run.sequence import Sequence
from satchel.run.text import StopTexts, TextStream

if TYPE_CHECKING:
    from satchel.model.tokenizer import Tokenizer


def check(request: Request, limits: Limits, vocabulary: int, adapter: Adapter | None, speaks: bool) -> None:
    """Raises UserError for a request that an engine can never run; `speaks`: it has a tokenizer."""
    total = len(request.prompt) + request.max_tokens
    if total > limits.context:
        raise UserError(
            f"{len(request.prompt)} tokens of prompt and max_tokens={request.max_tokens} make {total}; "
            f"this engine takes {limits.context} together"
        )
    left = limits.blocks - (adapter.blocks if adapter else 0)
    if (needs := -(-total // PAGE)) > left:
        beside = f" beside adapter '{adapter.name}'" if adapter else ""
        raise UserError(
            f"{total} tokens need {needs} blocks of {PAGE} and the pool has {left}{beside}; "
            f"ask for {left * PAGE} tokens or less, or give the engine more memory"
        )
    for name, tokens in (("prompt", request.prompt), ("logit_bias", request.sampling.logit_bias)):
        if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
            raise UserError(f"{name}: token {wrong[0]} is not among the model's {vocabulary}")
    if request.stop and not speaks:
        raise UserError("stop: this engine has no tokenizer, so it knows no text; give stop_tokens")


def begin(
    id: int, request: Request, seed: int, now_s: float, adapter: Adapter | None, tokenizer: Tokenizer | None
) -> list[Sequence]:
    """The answers to a request, none of them begun. `seed` is the engine's, for requests that bring none."""
    own = mix(seed, id) if request.sampling.seed is None else request.sampling.seed
    return [
        Sequence(
            id=id,
            index=index,
            request=request,
            key=mix(own, index),
            arrival_s=now_s,
            tokens=list(request.prompt),
            adapter=adapter,
            stream=TextStream(tokenizer) if tokenizer else None,
            stops=StopTexts(request.stop) if request.stop else None,
            constraint=request.constraint() if request.constraint else None,
        )
        for index in range(request.answers)
    ]
