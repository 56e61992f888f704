"""A small model that runs ahead of the one whose answers count.

It sees every token that the large model sees, one step before it, and keeps its keys and values in the same slots of
the same blocks: so a block that is shared, found again, copied or moved is so for both, and nothing has to be kept in
step by hand. It guesses level by level: the guesses at one position, one in a chain, more in a tree. A chain's are
chosen as the engine will choose, with the answer's own settings and the answer's own noise.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from satchel.core.serve_seams import Draft, Proposer, Speaker
from satchel.model.forward import Part, groups, hidden, logits, padded, states
from satchel.model.paged import PAGE, Pages, Row, Stretch
from satchel.model.sampling import History, choose, mix, sound

if TYPE_CHECKING:
    from satchel.model.decoder import Decoder

# N tokens of a row, R of them that are guessed after, L of these in one line, D width, V vocabulary


@dataclass
class Line:
    """The guesses for one answer."""

    speaker: Speaker
    most: int  # of them
    guesses: list[int] = field(default_factory=list[int])
    chance: float = 1.0  # that all but the last of them are right
    broken: bool = False  # the drafter's logits are no numbers
    parents: list[int] = field(default_factory=list[int])  # of each guess: a guess before it, -1: the last token
    level: range = range(-1, 0)  # the newest guesses; -1: the last token
    depth: int = 0  # levels
    ran: int = 0  # guesses that the drafter has run

    @property
    def at(self) -> int:
        """Position of the newest guesses."""
        return len(self.speaker.tokens) + self.depth - 1

    def add(self, tokens: Sequence[int], parents: Sequence[int]) -> None:
        """One level more."""
        self.level = range(len(self.guesses), len(self.guesses) + len(tokens))
        self.guesses += tokens
        self.parents += parents
        self.depth += 1

    def path(self, guess: int) -> list[int]:
        """The tokens from the first guess to this one."""
        tokens = []
        while guess >= 0:
            tokens.append(self.guesses[guess])
            guess = self.parents[guess]
        return tokens[::-1]

    def history(self, guess: int) -> History:
        """What the answer has said after this guess, where its request asks."""
        request = self.speaker.request
        if not request.sampling.penalises:
            return History()
        return History(request.prompt, [*self.speaker.tokens[len(request.prompt) :], *self.path(guess)])


Some = TypeVar("Some", bound=Line)


class Drafter(Proposer, Generic[Some]):
    """Guesses for the answers of one engine, all of them in one pass a level."""

    def __init__(self, model: Decoder, pages: Pages, tokens: int, vocabulary: int) -> None:
        """At most `tokens` guesses at once, of the first `vocabulary` ids, which are all that the large model knows."""
        self.model, self.pages, self.most, self.vocabulary = model, pages, tokens, vocabulary
        self.lines: dict[tuple[int, int], Some] = {}  # of this step
        self.unseen: set[tuple[int, int]] = set()  # answers whose last guess was right, and not run by the drafter

    def propose(self, speakers: Sequence[Speaker], room: Sequence[int], fed: Sequence[int]) -> list[Draft]:
        parts = self._parts(speakers, fed)
        x_ND = hidden(self.model, self.pages, parts)
        lines = [self.line(speaker, most) for speaker, most in zip(speakers, room, strict=True)]
        going = [line for line in lines if line.most]
        x_RD = x_ND[[part.all_rows.stop - 1 for part, most in zip(parts, room, strict=True) if most]]
        while going:
            self._guess(going, x_RD)
            going = [line for line in going if self._goes_on(line)]
            x_RD = self._run(going)
            self.rate(going, x_RD)
        late = [line for line in lines if line.ran < len(line.guesses)]
        self._run([line for line in late if (line.at + 1) % PAGE == 0])  # others may take that block
        self.lines = {(line.speaker.id, line.speaker.index): line for line in lines}
        return [Draft(line.guesses, line.parents) for line in lines]

    def learn(self, speaker: Speaker, draft: Draft, path: Sequence[int]) -> None:
        key = speaker.id, speaker.index
        if path and path[-1] >= self.lines[key].ran:
            self.unseen.add(key)

    def forget(self, speaker: Speaker) -> None:
        key = speaker.id, speaker.index
        self.lines.pop(key, None)
        self.unseen.discard(key)

    @abstractmethod
    def line(self, speaker: Speaker, most: int) -> Some:
        """A line without guesses."""

    @abstractmethod
    def grow(self, line: Some, logits_LV: Tensor) -> None:
        """One level more, from the logits after the newest guesses."""

    def rate(self, lines: Sequence[Some], x_RD: Tensor) -> None:
        """Hears the states after the newest guesses, before the next are chosen."""

    def enough(self, line: Some) -> bool:
        """Whether a line should end here, before it is full."""
        return False

    def _goes_on(self, line: Some) -> bool:
        return len(line.guesses) < line.most and not line.broken and not self.enough(line)

    def _parts(self, speakers: Sequence[Speaker], fed: Sequence[int]) -> list[Part]:
        """What the large model is about to see; and the token before, where the drafter has not run it."""
        parts, first = [], 0
        for speaker, count in zip(speakers, fed, strict=True):
            start = speaker.cached - self._behind(speaker)
            tokens = self._known(speaker.tokens[start : speaker.cached + count])
            parts.append(Part(tokens, Draft(), speaker.table, start, first))
            first += len(tokens)
        return parts

    def _behind(self, speaker: Speaker) -> bool:
        """What was preempted since comes back with whole blocks, which are never behind."""
        key = speaker.id, speaker.index
        behind = key in self.unseen and speaker.cached % PAGE > 0
        self.unseen.discard(key)
        return behind

    def _known(self, tokens: Sequence[int]) -> Sequence[int]:
        """Ids that the drafter has no embedding for are another."""
        rows = self.model.config.vocab
        return tokens if rows >= self.vocabulary else [token if token < rows else 0 for token in tokens]

    def _run(self, lines: Sequence[Some]) -> Tensor:
        """The states [R, D] after the lines' newest guesses."""
        if not lines:
            return torch.empty(0)
        stretches, tokens = [], []
        for line in lines:
            past = len(line.speaker.tokens) + line.level.start
            stretches.append(Stretch(line.speaker.table, past, len(line.level), line.parents))
            tokens += line.guesses[line.level.start :]
            line.ran = len(line.guesses)
        return states(self.model, Row(self.pages, stretches, padded(len(tokens))), tokens)[: len(tokens)]

    def _guess(self, lines: Sequence[Some], x_RD: Tensor) -> None:
        """One level more for each line."""
        first = 0
        for some in groups(lines, lambda line: len(line.level)):
            counts = [len(line.level) for line in some]
            logits_RV = logits(self.model, x_RD[first : first + sum(counts)])[:, : self.vocabulary]
            for line, logits_LV in zip(some, logits_RV.split(counts), strict=True):
                line.broken = not all(sound(logits_LV))
                if not line.broken:
                    self.grow(line, logits_LV)
            first += sum(counts)


class Chain(Drafter[Line]):
    """A drafter of one guess a level."""

    def line(self, speaker: Speaker, most: int) -> Line:
        return Line(speaker, most)

    def grow(self, line: Line, logits_LV: Tensor) -> None:
        how, guess = line.speaker.request.sampling, line.level[-1]
        token = choose(logits_LV[-1], how, mix(line.speaker.key, line.at + 1), line.history(guess))
        line.add([token], [guess])
