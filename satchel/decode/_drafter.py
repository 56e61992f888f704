"""A small model that runs ahead of the one whose answers count.

It sees every token that the large model sees, one step before it, and keeps its keys and values in the same blocks: so
a block that is shared, found again, copied or moved is so for both, and nothing has to be kept in step by hand. What it
then guesses is chosen as the engine will choose, with the answer's own settings and the answer's own noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from satchel.core.serve_seams import Draft, Proposer, Speaker
from satchel.model.forward import HEAD_ROWS, Part, hidden, logits
from satchel.model.paged import PAGE, Pages
from satchel.model.sampling import History, choose, mix

if TYPE_CHECKING:
    from satchel.model.decoder import Decoder

# N tokens of a row, R answers that are guessed for, D width, V vocabulary


@dataclass
class Line:
    """The guesses for one answer."""

    speaker: Speaker
    most: int  # of them
    guesses: list[int] = field(default_factory=list[int])
    chance: float = 1.0  # that all but the last of them are right
    broken: bool = False  # the drafter's logits are no numbers

    @property
    def at(self) -> int:
        """Position of the last guess."""
        return len(self.speaker.tokens) + len(self.guesses) - 1


class Drafter(Proposer):
    """Guesses for the answers of one engine, all of them in one pass a token."""

    def __init__(self, model: Decoder, pages: Pages, tokens: int, vocabulary: int) -> None:
        """At most `tokens` guesses at once, of the first `vocabulary` ids, which are all that the large model knows."""
        self.model, self.pages, self.most, self.vocabulary = model, pages, tokens, vocabulary
        self.unseen: set[tuple[int, int]] = set()  # answers whose last guess was right, and not run by the drafter

    def propose(self, speakers: Sequence[Speaker], room: Sequence[int], fed: Sequence[int]) -> list[Draft]:
        parts = self._parts(speakers, fed)
        x_ND = hidden(self.model, self.pages, parts)
        lines = [Line(speaker, most) for speaker, most in zip(speakers, room, strict=True)]
        going = [line for line in lines if line.most]
        x_RD = x_ND[[part.all_rows.stop - 1 for part, most in zip(parts, room, strict=True) if most]]
        while going:
            self._guess(going, x_RD)
            going = [line for line in going if self._goes_on(line)]
            x_RD = self._run(going)
            self.rate(going, x_RD)
        self._run([line for line in lines if line.guesses and (line.at + 1) % PAGE == 0])  # others may take that block
        return [line.guesses for line in lines]

    def learn(self, speaker: Speaker, guessed: int, right: int) -> None:
        if right == guessed:
            self.unseen.add((speaker.id, speaker.index))

    def forget(self, speaker: Speaker) -> None:
        self.unseen.discard((speaker.id, speaker.index))

    def rate(self, lines: Sequence[Line], x_RD: Tensor) -> None:
        """Hears the states after the newest guesses, one a line, before the next are chosen."""

    def enough(self, line: Line) -> bool:
        """Whether a line should end here, before it is full."""
        return False

    def _goes_on(self, line: Line) -> bool:
        return len(line.guesses) < line.most and not line.broken and not self.enough(line)

    def _parts(self, speakers: Sequence[Speaker], fed: Sequence[int]) -> list[Part]:
        """What the large model is about to see; and the token before, where the drafter has not run it."""
        parts, first = [], 0
        for speaker, count in zip(speakers, fed, strict=True):
            start = speaker.cached - self._behind(speaker)
            tokens = self._known(speaker.tokens[start : speaker.cached + count])
            parts.append(Part(tokens, (), speaker.table, start, first))
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

    def _run(self, lines: Sequence[Line]) -> Tensor:
        """The states [R, D] after the lines' last guesses."""
        parts = [Part(line.guesses[-1:], (), line.speaker.table, line.at, row) for row, line in enumerate(lines)]
        return hidden(self.model, self.pages, parts)[: len(parts)] if parts else torch.empty(0)

    def _guess(self, lines: Sequence[Line], x_RD: Tensor) -> None:
        """One guess more for each line."""
        for start in range(0, len(lines), HEAD_ROWS):
            some = lines[start : start + HEAD_ROWS]
            for line, logits_V in zip(some, logits(self.model, x_RD[start : start + HEAD_ROWS]), strict=True):
                logits_V = logits_V[: self.vocabulary]
                line.broken = not bool(logits_V.amax().isfinite())
                if not line.broken:
                    line.guesses.append(self._choose(line, logits_V))

    @staticmethod
    def _choose(line: Line, logits_V: Tensor) -> int:
        speaker, how = line.speaker, line.speaker.request.sampling
        prompt = speaker.request.prompt
        said = [*speaker.tokens[len(prompt) :], *line.guesses] if how.penalises else ()
        return choose(logits_V, how, mix(speaker.key, line.at + 1), History(prompt, said))
