"""One answer while it is made: its tokens, its blocks, its text, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from torch import Tensor

from satchel.core.request import Constraint, Logprob, Request
from satchel.core.serve_seams import Arrival
from satchel.run.adapters import Adapter
from satchel.run.blocks import Digest
from satchel.run.text import StopTexts, TextStream


@dataclass(eq=False)
class Sequence:
    """An answer to a request, from submission to its end. What an admission may know of it are plain attributes."""

    id: int  # of the request
    index: int  # which of its answers
    request: Request
    key: int  # of its randomness
    arrival_s: float
    tokens: list[int]  # prompt and answer
    adapter: Adapter | None = None
    stream: TextStream | None = None  # None: the engine has no tokenizer
    stops: StopTexts | None = None
    constraint: Constraint | None = None
    cached: int = 0  # tokens whose keys and values lie in `table`
    table: list[int] = field(default_factory=list)  # blocks
    arrival: Arrival | None = None  # of the blocks behind those of `cached`, from the shelf
    digests: list[Digest] = field(default_factory=list)  # of the full blocks of `tokens`, as far as they were needed
    charged: int = 0  # tokens that the tenant has paid for; what is computed again costs nothing
    reused: int = 0  # tokens of the prompt that the pool had
    preempted: int = 0  # times
    guessed: int = 0  # tokens of the answer that were guessed ahead,
    right: int = 0  # and kept
    logprob: float = 0.0  # of the answer so far
    prompt_logprobs: list[Logprob | None] = field(default_factory=list)
    state_D: Tensor | None = None  # sum over the first `summed` tokens, float32
    summed: int = 0
    embedding: tuple[float, ...] = ()
    finish: str = ""
    stopped_by: str | int | None = None

    @property
    def root(self) -> Digest:
        """What its blocks depend on beside tokens."""
        return self.adapter.root if self.adapter else b""

    @property
    def pending(self) -> int:
        """Tokens that the model has not seen, the newest included; 1 while an answer grows token by token."""
        return len(self.tokens) - self.cached

    @property
    def said(self) -> Items[int]:
        """The answer so far."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def said_count(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens that the model has to see at most before the answer ends."""
        return self.pending + self.request.max_tokens - self.said_count

    @property
    def priority(self) -> int:
        """Of the request; higher is more urgent."""
        return self.request.priority

    @property
    def tenant(self) -> str:
        """Whose request it is."""
        return self.request.tenant

    @property
    def deadline_s(self) -> float:
        """When the answer becomes worthless, on the engine's clock."""
        limit = self.request.deadline_s
        return float("inf") if limit is None else self.arrival_s + limit

    def append(self, token: int) -> str:
        """One token more; the text that became certain. Sets `finish` if the answer ends with it."""
        self.tokens.append(token)
        if self.constraint is not None:
            self.constraint.advance(token)
        if token in self.request.stop_tokens:
            self.finish, self.stopped_by = "stop", token
            return self._rest()
        text = self._certain(self.stream.push(token)) if self.stream else ""
        if self.stops is not None and self.stops.met is not None:
            self.finish, self.stopped_by = "stop", self.stops.met
        elif self.said_count >= self.request.max_tokens:
            self.finish = "length"
            text += self._rest()
        return text

    def end(self, finish: str) -> str:
        """Ends the answer as it is; the text that was held back."""
        self.finish = finish
        return self._rest()

    def _certain(self, text: str) -> str:
        return self.stops.push(text) if self.stops is not None else text

    def _rest(self) -> str:
        """All that is held back: half characters, and what might have become a stop text."""
        text = self._certain(self.stream.rest()) if self.stream else ""
        if self.stops is not None:
            if self.stops.met is not None:
                self.finish, self.stopped_by = "stop", self.stops.met
            text += self.stops.rest()
        return text
