"""From events to what clients read: whole answers, and server-sent events piece by piece.

A `Form` says how one route writes an answer; everything else is the same for all.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from satchel.core.request import Event, Logprob, Usage
from satchel.run.server.faults import Fault, broken, unavailable
from satchel.run.server.house import House
from satchel.run.server.worker import Stream

FINISH = {"": None, "stop": "stop", "length": "length", "deadline": "length"}  # in OpenAI's words
DONE = b"data: [DONE]\n\n"


@dataclass
class Said:
    """One answer, as far as it came."""

    number: int  # among the request's choices
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: tuple[Logprob | None, ...] = ()
    finish: str = ""

    @property
    def begun(self) -> bool:
        """Whether anything came before."""
        return bool(self.tokens or self.finish)

    def hear(self, event: Event) -> None:
        """A piece more."""
        self.text += event.text
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        self.prompt_logprobs += event.prompt_logprobs
        self.finish = event.finish


class Form(ABC):
    """How a route writes its answers."""

    prefix: str  # of the reply's id
    whole: str  # `object` of a whole reply
    piece: str  # and of a piece of it

    @abstractmethod
    def choice(self, said: Said) -> dict[str, Any]:
        """A finished answer."""

    @abstractmethod
    def pieces(self, said: Said, event: Event) -> list[dict[str, Any]]:
        """What an event adds to an answer; `said` is how it stood before."""


class Reply:
    """The answers to the requests of one body."""

    def __init__(self, house: House, form: Form, stream: Stream, model: str, request_id: str) -> None:
        self.form, self.stream = form, stream
        self.head = {"id": f"{form.prefix}-{request_id}", "created": int(time.time()), "model": model}
        self.usages: list[Usage] = []
        self._said: dict[tuple[int, int], Said] = {}
        self.timer = house.metrics.begin()
        self.on_end: Callable[[Reply], None] = lambda reply: None

    async def whole(self) -> dict[str, Any]:
        """Everything at once. Raises Fault if an answer failed; ends the requests if it is cancelled."""
        try:
            async for told in self.stream.batches():
                for number, event in told:
                    self._hear(number, event)
        finally:
            self.close()
        said = sorted(self._said.values(), key=lambda one: one.number)
        if said and all(not one.tokens for one in said) and any(one.finish == "deadline" for one in said):
            raise Fault(408, "the deadline passed before the first token", kind="timeout_error", code="deadline")
        choices = [self.form.choice(one) for one in said]
        return {**self._header(self.form.whole), "choices": choices, "usage": self.usage}

    async def chunks(self, with_usage: bool) -> AsyncGenerator[bytes, None]:
        """Server-sent events, as many together as have come; an error is the last one."""
        header = json.dumps(self._header(self.form.piece))[:-1]
        nothing = ', "usage": null' if with_usage else ""
        try:
            async for told in self.stream.batches():
                choices = [choice for number, event in told for choice in self._pieces(number, event)]
                yield b"".join(
                    f'data: {header}, "choices": [{json.dumps(choice)}]{nothing}}}\n\n'.encode() for choice in choices
                )
            if with_usage:
                yield f'data: {header}, "choices": [], "usage": {json.dumps(self.usage)}}}\n\n'.encode()
        except Fault as fault:
            yield f"data: {json.dumps(fault.body)}\n\n".encode()
        finally:
            self.close()
        yield DONE

    def close(self) -> None:
        """Ends what has not ended, and counts it."""
        self.stream.close()
        self.timer.end(self.usages)
        self.on_end(self)

    @property
    def usage(self) -> dict[str, Any]:
        """Of all requests together."""
        asked, said = sum(u.prompt_tokens for u in self.usages), sum(u.completion_tokens for u in self.usages)
        cached, right = sum(u.cached_tokens for u in self.usages), sum(u.accepted_tokens for u in self.usages)
        wrong = sum(u.guessed_tokens for u in self.usages) - right
        return {
            "prompt_tokens": asked,
            "completion_tokens": said,
            "total_tokens": asked + said,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"accepted_prediction_tokens": right, "rejected_prediction_tokens": wrong},
        }

    def _header(self, kind: str) -> dict[str, Any]:
        return {**self.head, "object": kind}

    def _pieces(self, number: int, event: Event) -> list[dict[str, Any]]:
        require_good(event)
        said = self._one(number, event)
        pieces = self.form.pieces(said, event)
        self._hear(number, event)
        return pieces

    def _hear(self, number: int, event: Event) -> None:
        require_good(event)
        said = self._one(number, event)
        said.hear(event)
        self.timer.hear(event)
        if event.usage is not None:
            self.usages.append(event.usage)

    def _one(self, number: int, event: Event) -> Said:
        key = (number, event.index)
        if key not in self._said:
            self._said[key] = Said(number * self.stream.requests[number].n + event.index)
        return self._said[key]


def require_good(event: Event) -> None:
    """Raises Fault for an answer that did not end as its client meant it to."""
    if event.finish in ("error", "cancelled"):
        raise broken(event.error) if event.error else unavailable("the server ended this answer; ask again")
