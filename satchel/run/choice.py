"""What a sequence says next, and how likely it was: logits to tokens, as its request asks for it."""

from __future__ import annotations

import torch
from torch import Tensor

from satchel.core.request import Logprob
from satchel.model.decoder import Decoder
from satchel.model.forward import HEAD_ROWS, Part, logits
from satchel.model.sampling import History, allow, choose, logprob_of, mix
from satchel.run.sequence import Sequence

# N tokens of a step, R rows of them, D width, V vocabulary


def next_token(s: Sequence, logits_V: Tensor) -> int | None:
    """The next token; None if the constraint leaves none."""
    allowed = s.constraint.allowed() if s.constraint is not None else None
    if allowed is not None:
        if not allowed:
            return None
        logits_V = allow(logits_V, allowed)
    how = s.request.sampling
    history = History(s.request.prompt, s.said) if how.penalises else History()
    return choose(logits_V, how, mix(s.key, len(s.tokens)), history)


def rated(s: Sequence, token: int, logits_V: Tensor) -> list[Logprob]:
    """The token's logarithm if the request wants it; the sequence's own sum of them goes on."""
    if s.request.logprobs is None and s.request.answers == s.request.n:
        return []
    found = logprob_of(logits_V, token, s.request.logprobs or 0)
    s.logprob += found.logprob
    return [] if s.request.logprobs is None else [found]


def rate_prompt(s: Sequence, part: Part, model: Decoder, x_ND: Tensor) -> None:
    """Logarithms of the prompt's tokens that follow those of this part, into the sequence."""
    s.prompt_logprobs = s.prompt_logprobs or [None]
    stop = min(part.past + len(part.tokens) + 1, len(s.request.prompt))
    missing = range(max(part.past + 1, len(s.prompt_logprobs)), stop)
    for start in range(missing.start, missing.stop, HEAD_ROWS):
        some = range(start, min(start + HEAD_ROWS, missing.stop))
        x_RD = x_ND[[part.first + at - 1 - part.past for at in some]]
        s.prompt_logprobs += _rated_rows([s.tokens[at] for at in some], model, x_RD, s.request.logprobs or 0)


def add_states(s: Sequence, part: Part, x_ND: Tensor) -> None:
    """Adds up the states of the prompt's tokens, into the sequence; those that are run a second time do not count."""
    known = max(s.summed - part.past, 0)
    new_ND = x_ND[part.first + known : part.first + len(part.tokens)]
    total_D = new_ND.sum(0, dtype=torch.float32)
    s.state_D = total_D if s.state_D is None else s.state_D + total_D
    s.summed += len(new_ND)


def mean_state(s: Sequence) -> tuple[float, ...]:
    """The mean of the states that were added up."""
    assert s.state_D is not None
    return tuple((s.state_D / s.summed).tolist())


def _rated_rows(tokens: list[int], model: Decoder, x_RD: Tensor, top: int) -> list[Logprob]:
    return [logprob_of(row_V, token, top) for token, row_V in zip(tokens, logits(model, x_RD), strict=True)]
