"""The seams of serving: who runs next, what becomes of what makes room, how an answer's next tokens are found, and how
the past is kept.

Torch appears in annotations only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from satchel.core.request import Request
from satchel.core.seams import Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from satchel.model.paged import Pages
    from satchel.model.source import Source
    from satchel.model.tokenizer import Tokenizer


class Ticket(Protocol):
    """What an admission may know of an answer that waits or runs."""

    @property
    def arrival_s(self) -> float:
        """When the request came, on the engine's clock."""
        ...

    @property
    def priority(self) -> int:
        """What the client gave it; higher is more urgent."""
        ...

    @property
    def deadline_s(self) -> float:
        """When the answer becomes worthless, on the engine's clock; inf: never."""
        ...

    @property
    def remaining(self) -> int:
        """Tokens that the model has to see at most before the answer ends."""
        ...


class Admission(Method):
    """Who runs next, and who makes room for whom."""

    slot = "admission"

    @abstractmethod
    def rank(self, ticket: Ticket, served: float, now_s: float) -> tuple[float, ...]:
        """The lowest enters first and makes room last. `served` is what the ticket's tenant got so far, in tokens.

        Equal ranks go by arrival. Ranks of one method are of one length.
        """

    def displaces(self, waiting: Ticket, running: Ticket) -> bool:
        """Whether one that waits may stop one that runs if there is no room for both; by default it never may."""
        return False


@dataclass(frozen=True)
class Draft:
    """Guesses at the next tokens of an answer: a tree, of which a chain is the plainest. No guess has two children of
    one token."""

    tokens: Sequence[int] = ()
    parents: Sequence[int] = ()  # of each: the number of a guess before it, -1: the answer's last token

    @staticmethod
    def chain(tokens: Sequence[int]) -> Draft:
        """Each guess after the one before."""
        return Draft(tokens, range(-1, len(tokens) - 1))

    def __len__(self) -> int:
        return len(self.tokens)

    def child(self, at: int, token: int) -> int | None:
        """The guess of `token` after guess `at`, -1: after the answer's last token; None: it was not guessed there."""
        later = range(at + 1, len(self))
        return next((n for n in later if self.parents[n] == at and self.tokens[n] == token), None)


class Speaker(Protocol):
    """What a proposer may know of an answer."""

    @property
    def id(self) -> int:
        """Of the request; with `index` it names the answer."""
        ...

    @property
    def index(self) -> int:
        """Which answer to the request."""
        ...

    @property
    def tokens(self) -> Sequence[int]:
        """Prompt and answer so far."""
        ...

    @property
    def request(self) -> Request:
        """What was asked for, and how tokens are chosen."""
        ...

    @property
    def key(self) -> int:
        """Of its randomness: the noise at a position is a function of `mix(key, position)` and the token alone."""
        ...

    @property
    def cached(self) -> int:
        """Tokens whose keys and values lie in `table`."""
        ...

    @property
    def table(self) -> Sequence[int]:
        """Its blocks; they have room for what this step runs and for the guesses that are asked for."""
        ...


class Proposer(ABC):
    """What guesses at tokens for the answers of one engine. It never calls the model that checks them.

    The engine runs the model on the guesses and keeps those along one path, as long as each is the token that comes
    there. What comes is a function of logits, key and position, so that guessing changes no answer: one who knows the
    key may choose by the same noise, and a guess fails only where the two models' probabilities part. One who would
    rather guess by chances of its own says itself what comes (`accept`), by a rule that keeps the model's distribution.
    """

    most: int = 0  # guesses for one answer at once, at most,
    width: int = 1  # and of these at one position

    @abstractmethod
    def propose(self, speakers: Sequence[Speaker], room: Sequence[int], fed: Sequence[int]) -> list[Draft]:
        """Guesses for each answer of a step, at most `room` of them, down to none.

        The model is about to see `fed` tokens of each answer, from `cached` on; those who do not yet see all of theirs
        have no room for guesses.
        """

    def accept(self, speaker: Speaker, at: int, logits_V: Tensor) -> int | None:
        """The token after guess `at` of the answer's draft, -1: after its last token, by the model's logits there.

        None: the one that plain decoding would choose. The answer has the tokens up to there by now.
        """
        return None

    def learn(self, speaker: Speaker, draft: Draft, path: Sequence[int]) -> None:  # noqa: B027
        """The guesses of these numbers were right; the answer has them and one more by now."""

    def forget(self, speaker: Speaker) -> None:  # noqa: B027
        """The answer ended."""


@dataclass(frozen=True)
class Second:
    """A model that runs beside the one that answers."""

    source: Source
    format: str = "auto"  # of its weights


class Decoding(Method):
    """How an answer's next tokens are found."""

    slot = "decoding"

    def beside(self) -> Second | None:
        """The second model that it runs, whose keys and values lie in the pool's blocks too; None: there is none."""
        return None

    @abstractmethod
    def start(self, model: nn.Module, pages: Pages | None = None, tokenizer: Tokenizer | None = None) -> Proposer:
        """What guesses for one engine, whose model this is. `pages`: of the second model. Raises UserError."""


class Feed(Protocol):
    """What runs the feed-forwards of one pass over a row of tokens."""

    def __call__(self, layer: int, run: Callable[[Tensor], Tensor], x_BTD: Tensor, /) -> Tensor:
        """The residual stream after the feed-forward of a layer, [B, T, D]: `run(x)`, or less than that.

        `run` takes any tokens' streams, [..., D], and gives them back with what the feed-forward adds.
        """
        ...


class Skipper(ABC):
    """What decides for the answers of one engine which feed-forwards their tokens leave out."""

    skipped: int = 0  # feed-forwards of single tokens that were left out,
    eligible: int = 0  # of those of all tokens that might have left some out

    @abstractmethod
    def over(self, said_N: Tensor) -> Feed:
        """For one pass: how many tokens of its answer came before each token of the row; below 0 in a prompt."""


class Skip(Method):
    """Which feed-forwards a token of an answer leaves out."""

    slot = "skip"

    @abstractmethod
    def start(self, model: nn.Module, tokenizer: Tokenizer | None = None) -> Skipper:
        """What decides in one engine, whose model this is; calibrates itself if need be. Raises UserError."""


class Arrival(Protocol):
    """Blocks on their way back into the pool."""

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        ...

    def wait(self) -> int:
        """How many of them are there, from the first on, once no copy is under way."""
        ...


class Shelf(ABC):
    """Where blocks of keys and values go when their places in the pool are needed. Known by digest: equal digests mean
    equal contents, for good. Copies may go on beside the engine's steps: nobody writes to a block that was foreseen
    before `keep` or `settle` of it has returned, nor to one that was fetched before its arrival has been waited for."""

    moved_out: int = 0  # blocks that were copied away
    moved_in: int = 0  # blocks that came back
    copies: int = 0  # in which they moved

    def foresee(self, blocks: Sequence[tuple[bytes, int]]) -> None:  # noqa: B027
        """Blocks of the pool, each (digest, block), that will be overwritten next, the last of them first: the time to
        begin to copy them."""

    @abstractmethod
    def keep(self, digest: bytes, block: int) -> None:
        """Block `block` is overwritten when this has returned; copy it if it is worth it and not here already."""

    def settle(self, block: int) -> None:  # noqa: B027
        """Returns when no copy of block `block` is under way."""

    @abstractmethod
    def has(self, digest: bytes) -> bool:
        """Whether `fetch` may be tried."""

    @abstractmethod
    def fetch(self, blocks: Sequence[tuple[bytes, int]]) -> Arrival:
        """Copy blocks back, each (digest, block of the pool): up to the first that is no longer here."""


class Preemption(Method):
    """What becomes of keys and values that lose their place in the pool."""

    slot = "preemption"

    @abstractmethod
    def start(self, data: Tensor) -> Shelf:
        """The shelf of a pool: `data` is [blocks, ...], one block contiguous."""


class KV(Method):
    """How the keys and values of a token lie in the pool's blocks.

    A token's are some parts, each a few numbers of one dtype, for every layer and head. They follow from its own
    numbers alone, never from its neighbours or its company: so blocks are filled token by token, found again, shared,
    copied and moved by whoever holds them, without knowing what is in them.
    """

    slot = "kv"

    kernel: ClassVar[int | None] = None  # how native/pages.h calls these parts; None: it does not know them

    @abstractmethod
    def parts(self, dim: int, dtype: torch.dtype) -> tuple[tuple[torch.dtype, int], ...]:
        """Of the keys, or the values, of a token and head of `dim` numbers of `dtype`: each part's dtype and count."""

    @abstractmethod
    def encode(self, x_NKE: Tensor) -> tuple[Tensor, ...]:
        """The parts, [N, K, n] each."""

    @abstractmethod
    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Numbers of parts, [..., n] each: [..., E] of `dtype`."""
