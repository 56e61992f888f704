"""What a client asks of the engine, and what it hears back: plain values without torch.

A request is a prompt of token ids and how to continue it; `Event`s carry the answer piece by piece. Every request that
was accepted ends with exactly one event that has a `usage`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from satchel.core.errors import UserError

LIKELIEST = 20  # alternatives that may be reported beside each token, as OpenAI's clients know it
CHOICES = 128  # answers to one request at most


class Constraint(Protocol):
    """What one answer may say, such as a grammar's state; made anew for every answer, and told each token of it."""

    def allowed(self) -> list[int] | None:
        """The ids that may come next; None: any. An empty list ends the answer."""
        ...

    def advance(self, token: int) -> None:
        """This token came next."""
        ...


class MakesConstraint(Protocol):
    """Makes the constraint of each answer of a request."""

    def __call__(self) -> Constraint: ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. The defaults take the likeliest one. Raises UserError for a value out of range."""

    temperature: float = 0.0  # 0 takes the likeliest token, 1 draws as trained, [0, inf)
    top_k: int = 0  # draw from so many likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the likeliest that hold this share of the probability, (0, 1]
    min_p: float = 0.0  # draw from those at least this many times as likely as the likeliest, [0, 1]
    repetition_penalty: float = 1.0  # divides the logits of tokens in prompt and answer, (0, inf)
    presence_penalty: float = 0.0  # taken off the logits of tokens that the answer has, [-2, 2]
    frequency_penalty: float = 0.0  # taken off for each time that it has them, [-2, 2]
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])  # added to logits, by token id
    seed: int | None = None  # the same seed gives the same answer in any company; None: the engine's own

    def __post_init__(self) -> None:
        for name, holds, cure in (
            ("temperature", 0 <= self.temperature < math.inf, "0 takes the likeliest token, 1 draws as trained"),
            ("top_k", self.top_k >= 0, "it is 0 (all tokens) or above"),
            ("top_p", 0 < self.top_p <= 1, "it lies in (0, 1]; 1 draws from all tokens"),
            ("min_p", 0 <= self.min_p <= 1, "it lies in [0, 1]; 0 draws from all tokens"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "it is above 0; 1 changes nothing"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "it lies in [-2, 2]; 0 changes nothing"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "it lies in [-2, 2]; 0 changes nothing"),
            ("logit_bias", all(map(math.isfinite, self.logit_bias.values())), "a bias is a finite number"),
        ):
            if not holds:
                raise UserError(f"sampling: {name}={getattr(self, name)} is not allowed; {cure}")

    @property
    def greedy(self) -> bool:
        """Whether chance plays no part."""
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether what was said before matters."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it. Raises UserError for a value out of range; the engine checks the rest."""

    prompt: tuple[int, ...]  # token ids
    max_tokens: int = 256  # longest answer, tokens
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: tuple[int, ...] = ()  # ids that end the answer; they are in `tokens`, not in `text`
    stop: tuple[str, ...] = ()  # texts that end the answer and are cut from it; need an engine with a tokenizer
    n: int = 1  # answers
    best_of: int = 0  # answers from which the n likeliest are taken; 0: n
    logprobs: int | None = None  # likeliest tokens reported beside each token, [0, 20]; None: no logarithms at all
    prompt_logprobs: bool = False  # report the prompt's tokens too, in the first event
    embed: bool = False  # no answer, but one event with the mean of the prompt's states before the head
    adapter: str = ""  # name of a registered adapter; empty: the bare model
    priority: int = 0  # higher goes first, where the admission heeds it
    deadline_s: float | None = None  # seconds from submission after which the answer is worthless
    tenant: str = ""  # whose request it is, where the admission shares among tenants
    constraint: MakesConstraint | None = None  # what each answer may say

    def __post_init__(self) -> None:
        for name, holds, cure in (
            ("prompt", bool(self.prompt), "it has at least 1 token"),
            ("max_tokens", self.max_tokens >= 1, "an answer has at least 1 token"),
            ("n", 1 <= self.n <= CHOICES, f"there are 1 to {CHOICES} answers"),
            ("best_of", self.best_of == 0 or self.n <= self.best_of <= CHOICES, f"it lies in [{self.n}, {CHOICES}]"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= LIKELIEST, f"it lies in [0, {LIKELIEST}]"),
            ("deadline_s", self.deadline_s is None or self.deadline_s > 0, "it is above 0"),
            ("embed", not self.embed or self.answers == 1, "a prompt has one embedding; leave n and best_of out"),
            ("stop", all(self.stop), "an empty text would end every answer at once"),
        ):
            if not holds:
                raise UserError(f"request: {name}={getattr(self, name)!r} is not allowed; {cure}")

    @property
    def runs_prompt(self) -> bool:
        """Whether the model has to see every token of the prompt, whatever the pool has of it."""
        return self.prompt_logprobs or self.embed

    @property
    def answers(self) -> int:
        """Sequences that run for it."""
        return max(self.n, self.best_of)


@dataclass(frozen=True)
class Logprob:
    """The natural logarithm of a token's probability under the model, before temperature and penalties."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens there, falling


@dataclass(frozen=True)
class Usage:
    """Tokens of a whole request."""

    prompt_tokens: int
    completion_tokens: int  # of all answers, those that best_of dropped included
    cached_tokens: int = 0  # of the prompt, found in the pool
    guessed_tokens: int = 0  # ahead of the model,
    accepted_tokens: int = 0  # and kept


@dataclass(frozen=True)
class Event:
    """A piece of an answer."""

    id: int  # what `submit` gave
    index: int = 0  # which of the n answers
    tokens: tuple[int, ...] = ()  # new since the last event of this answer
    text: str = ""  # theirs, as far as it is certain; without stop tokens and stop texts
    logprobs: tuple[Logprob, ...] = ()  # one for each of `tokens`, if asked for
    prompt_logprobs: tuple[Logprob | None, ...] = ()  # one for each token of the prompt, None for the first
    embedding: tuple[float, ...] = ()  # if asked for
    finish: str = ""  # the answer ended: stop, length, cancelled, deadline, error
    stopped_by: str | int | None = None  # the stop text or stop token that ended it
    error: str = ""  # what went wrong, with finish='error'
    usage: Usage | None = None  # with the last event of the request
