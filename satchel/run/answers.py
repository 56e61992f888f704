"""What is told of each request, and when it is over: exactly one event of it carries a usage, and none follows."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace

from satchel.core.errors import SatchelError
from satchel.core.request import Event, Logprob, Request, Usage
from satchel.run.sequence import Sequence


@dataclass
class _Open:
    """A request that has not ended."""

    request: Request
    left: int  # answers that have not ended
    said: int = 0  # tokens of those that have
    reused: int = 0
    guessed: int = 0
    right: int = 0
    held: dict[int, list[Event]] = field(default_factory=dict)  # by answer, until the best are known
    score: dict[int, float] = field(default_factory=dict)  # mean logarithm of an answer's tokens


class Answers:
    """The requests that are open."""

    def __init__(self) -> None:
        self.open: dict[int, _Open] = {}

    def begin(self, id: int, request: Request) -> None:
        """A request was accepted."""
        self.open[id] = _Open(request, request.answers)

    def say(
        self, s: Sequence, tokens: Items[int] = (), text: str = "", logprobs: Items[Logprob] = (), error: str = ""
    ) -> list[Event]:
        """An answer goes on by these tokens, and ends if the sequence has a `finish`; the events of it."""
        first = s.index == 0 and bool(s.prompt_logprobs)
        noted, s.prompt_logprobs = (tuple(s.prompt_logprobs), []) if first else ((), s.prompt_logprobs)
        event = Event(
            s.id,
            s.index,
            tuple(tokens),
            text,
            tuple(logprobs),
            noted,
            s.embedding,
            s.finish,
            s.stopped_by,
            error,
        )
        request = self.open[s.id]
        if request.request.answers == request.request.n:
            events = [event]
        else:
            request.held.setdefault(s.index, []).append(event)
            events = []
        return self._end(s, request, events) if s.finish else events

    def _end(self, s: Sequence, request: _Open, events: list[Event]) -> list[Event]:
        request.left -= 1
        request.said += s.said_count
        request.reused = max(request.reused, s.reused)
        request.guessed, request.right = request.guessed + s.guessed, request.right + s.right
        request.score[s.index] = s.logprob / max(s.said_count, 1)
        if request.left:
            return events
        del self.open[s.id]
        events = events or _best(request)
        usage = Usage(len(request.request.prompt), request.said, request.reused, request.guessed, request.right)
        return [*events[:-1], replace(events[-1], usage=usage)]

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises SatchelError where the sequences that are under way are not those of the open requests."""
        under_way: dict[int, int] = {}
        for sequence in sequences:
            under_way[sequence.id] = under_way.get(sequence.id, 0) + 1
        if under_way != {id: request.left for id, request in self.open.items()}:
            raise SatchelError(f"engine: {under_way} answers are under way, {list(self.open)} are open")


def _best(request: _Open) -> list[Event]:
    """The likeliest n answers, each as one event."""
    best = sorted(request.held, key=lambda index: request.score[index], reverse=True)[: request.request.n]
    noted = request.held[0][0].prompt_logprobs if 0 in request.held else ()
    return [_whole(request.held[index], number, noted if not number else ()) for number, index in enumerate(best)]


def _whole(events: Items[Event], index: int, noted: tuple[Logprob | None, ...]) -> Event:
    return replace(
        events[-1],
        index=index,
        tokens=tuple(token for event in events for token in event.tokens),
        text="".join(event.text for event in events),
        logprobs=tuple(logprob for event in events for logprob in event.logprobs),
        prompt_logprobs=noted,
    )
