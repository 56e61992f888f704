"""A small model guesses until it is no longer likely that all of its guesses are right.

    stop as soon as  1 - product over the guesses of chance(state after the guess) > threshold

`chance` is a small head on the small model's last state, trained by `satchel.decode.train_acceptance` on text with both
models frozen. As in the authors' code the newest guess is not among those that are judged: its state is known only once
it has been run, so judging costs no pass of its own. That a threshold is the best rule there is follows from a Markov
decision process; which one depends on what a pass of either model costs: the higher, the longer the guesses.
Saves guesses that would be thrown away where text is hard, and passes where it is easy. Answers are those of plain
decoding, drawn ones included, as with `draft`.
Paper: https://arxiv.org/abs/2405.19715
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from satchel.core.card import Card
from satchel.decode._acceptance import FILE, Acceptance, read_acceptance
from satchel.decode._drafter import Chain, Drafter, Line
from satchel.decode.draft import Draft

if TYPE_CHECKING:
    from satchel.model.decoder import Decoder
    from satchel.model.paged import Pages


class _Judged(Chain):
    """A drafter that hears what its guesses are worth."""

    def __init__(self, model: Decoder, pages: Pages, vocabulary: int, method: SpecDecPP, head: Acceptance) -> None:
        super().__init__(model, pages, method.tokens, vocabulary)
        self.head, self.threshold, self.least = head, method.threshold, method.least

    def rate(self, lines: Sequence[Line], x_RD: Tensor) -> None:
        for line, chance in zip(lines, self.head.chance(x_RD) if lines else (), strict=True):
            line.chance *= chance

    def enough(self, line: Line) -> bool:
        return len(line.guesses) >= self.least and 1 - line.chance > self.threshold


@dataclass(frozen=True, kw_only=True)
class SpecDecPP(Draft):
    """See the file's docstring."""

    card = Card(
        paper="https://arxiv.org/abs/2405.19715",
        saves=("traffic",),
        spends=("compute", "weights", "kv"),
        claim="2.04 to 2.26 times plain decoding's speed on Alpaca, GSM8K and HumanEval, 7 to 11% above a fixed length",
        dial=("threshold", 1.0, 0.0),
        demo={"model": "demo"},
    )

    tokens: int = 20  # guessed at once, at most, [1, 63]
    least: int = 2  # guessed at once, at least, if there is room, [1, 63]
    threshold: float = 0.3  # of the chance that a guess is wrong, [0, 1]
    head: str = ""  # file of the trained head; empty: acceptance.safetensors in the small model's folder

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(1 <= self.least <= 63, f"least={self.least} is outside [1, 63]; 2 is usual")
        self.require(0 <= self.threshold <= 1, f"threshold={self.threshold} is outside [0, 1]; 0.3 is usual")

    def drafter(self, small: Decoder, pages: Pages, vocabulary: int) -> Drafter:
        """What runs the small model and its head."""
        path = Path(self.head or Path(self.model) / FILE).expanduser()
        head = read_acceptance(path, small.config.width)
        return _Judged(small, pages, vocabulary, self, head.to(small.device))
