"""One token a step, nothing guessed.

    token[t] = choose(logits[t - 1])

What every other method of decoding is compared with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from satchel.core.card import Card
from satchel.core.serve_seams import Decoding, Draft, Proposer, Speaker

if TYPE_CHECKING:
    from torch import nn

    from satchel.model.paged import Pages
    from satchel.model.tokenizer import Tokenizer


class _Silent(Proposer):
    """Guesses nothing."""

    def propose(self, speakers: Sequence[Speaker], room: Sequence[int], fed: Sequence[int]) -> list[Draft]:
        return [Draft() for _ in speakers]


@dataclass(frozen=True, kw_only=True)
class Plain(Decoding):
    """See the file's docstring."""

    card = Card(paper="https://arxiv.org/abs/1706.03762")

    def start(self, model: "nn.Module", pages: "Pages | None" = None, tokenizer: "Tokenizer | None" = None) -> Proposer:
        """A proposer that guesses nothing."""
        return _Silent()
