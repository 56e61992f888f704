"""A small model guesses the next tokens one by one; the large one checks them all in one pass.

    guess[i]  = choose(draft logits[i], noise of position i)        token[i] = choose(logits[i], noise of position i)
    kept as long as guess[i] = token[i]

Both choices are argmax(logit / temperature + Gumbel noise) with the same noise, a function of the answer's seed and the
position. So what is said does not depend on the guesses at all: it is plain decoding's text, drawn or greedy, rather
than another text of the same distribution, as the usual rule of rejection gives. The price is a little of the
acceptance: it is at least (1 - d) / (1 + d), where rejection keeps 1 - d; d is the two models' distance in total
variation. Saves passes through the large model where the small one is often right and much cheaper; spends its weights
and its part of the pool, which are counted before anything is loaded.
Paper: https://arxiv.org/abs/2211.17192 (speculative decoding), https://arxiv.org/abs/2408.07978 (one noise for both)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from satchel.core.book import make
from satchel.core.card import Card
from satchel.core.errors import ModelError
from satchel.core.serve_seams import Decoding, Proposer, Second
from satchel.decode._drafter import Chain, Drafter
from satchel.model.load import load
from satchel.model.source import find_source, load_tokenizer
from satchel.model.storage import storage

if TYPE_CHECKING:
    from satchel.model.decoder import Decoder
    from satchel.model.paged import Pages
    from satchel.model.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Draft(Decoding):
    """See the file's docstring."""

    card = Card(
        paper="https://arxiv.org/abs/2211.17192",
        saves=("traffic",),
        spends=("compute", "weights", "kv"),
        claim="2 to 3 times the speed of T5-XXL, with T5-small as the draft, without any change of the outputs",
        dial=("tokens", 16, 1),
        demo={"model": "demo"},
    )

    model: str = ""  # the small one: a Hugging Face folder, a .gguf file, or a hub id, with the large one's tokenizer
    tokens: int = 4  # guessed at once, at most, [1, 63]
    format: str = "auto"  # of the small one's weights: as --format has it

    def __post_init__(self) -> None:
        self.require(1 <= self.tokens <= 63, f"tokens={self.tokens} is outside [1, 63]; 4 is usual")
        self.require(bool(self.model), f"there is no small model; name one: {self.name}:model=FOLDER")

    def beside(self) -> Second:
        """The small model."""
        return Second(find_source(self.model), self.format)

    def start(self, model: Decoder, pages: Pages | None = None, tokenizer: Tokenizer | None = None) -> Proposer:
        """Loads the small model, in the large one's dtype."""
        assert pages is not None
        source = find_source(self.model)
        rows = source.config.learned_positions
        self.require(
            not rows or pages.context <= source.config.context,
            f"'{self.model}' knows {source.config.context} positions and answers may have {pages.context} tokens; "
            f"serve with context={source.config.context}, or take another small model",
        )
        if tokenizer is not None:
            require_same_tokens(tokenizer, load_tokenizer(source), self.model)
        format = make("format", storage(self.format, source, model.device, model.dtype))
        small = load(source, model.dtype, model.device, format, frozen=True)
        return self.drafter(small.requires_grad_(False), pages, model.config.vocab)

    def drafter(self, small: Decoder, pages: Pages, vocabulary: int) -> Drafter:
        """What runs the small model."""
        return Chain(small, pages, self.tokens, vocabulary)


def require_same_tokens(large: Tokenizer, small: Tokenizer, name: str) -> None:
    """Raises ModelError if an id that both tokenizers know stands for another token in one than in the other."""
    ours, theirs = ({id: token for token, id in t.backend.get_vocab().items()} for t in (large, small))
    wrong = sorted(id for id in ours.keys() & theirs.keys() if ours[id] != theirs[id])
    if wrong:
        raise ModelError(
            f"'{name}' has another vocabulary: token {wrong[0]} is '{theirs[wrong[0]]}' there and '{ours[wrong[0]]}' "
            f"here, and {len(wrong) - 1} more differ; take a small model of the same family, or decoding=lookup"
        )
