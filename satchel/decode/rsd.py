"""A small model guesses a tree of distinct tokens; the large one checks all of its branches in one pass.

    children of a guess  the best of  log p + Gumbel noise: draws from p without replacement, in this order
    RSD-C                as many of each as `branches` says, level by level
    RSD-S                the best `width` of each level by  -log(exp(-g of the parent) - exp(-max g) + exp(-g)),  where
                         g = log p of the whole branch + Gumbel noise: branches without replacement
    accept               a child with chance min(1, q / p); if it is not, q = norm(max(q - p, 0)), p = norm(p without
                         it), and the next one is tried; after the last the token is drawn from what q is then

p and q are what the two models draw from, by temperature, top_k, top_p, min_p and penalties; p is cut to 128 tokens. So
what is said is drawn from q, however bad the guesses are. Without a temperature children are the likeliest tokens, the
best those whose branch is the fewest logits below the likeliest, and the text is plain decoding's.
By rejection the text that a seed gives depends on the guesses, and so on the room that others leave for them; what it
is drawn from does not. `rule=noise` gives plain decoding's text to drawn answers too, as `draft` does: a tree is then
guessed by the answer's own noise, and a child is kept if it is what plain decoding draws; fewer of them are.
Saves passes through the large model beyond what a chain of as many levels does; spends tokens in both that are thrown
away. A tree has at most 63 guesses.
Paper: https://arxiv.org/abs/2402.14160
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from satchel.core.card import Card
from satchel.core.request import Sampling
from satchel.core.serve_seams import Speaker
from satchel.decode._drafter import Drafter, Line
from satchel.decode.draft import Draft
from satchel.model.sampling import adjusted, gumbel, kept, likeliest, mix, probabilities

if TYPE_CHECKING:
    from satchel.model.decoder import Decoder
    from satchel.model.paged import Pages

# L nodes of a level, C tokens that may be children of one, V vocabulary

CANDIDATES = 128  # likeliest tokens among which children are drawn
GUESS, ACCEPT = 0x67756573, 0x61636370  # set the noise of guesses and of acceptance apart from that of answers


class Law(NamedTuple):
    """What the children of a node were drawn from."""

    token_C: Tensor
    share_C: Tensor  # float64, sums to 1


@dataclass
class Tree(Line):
    """The guesses for one answer, with what is needed to go on and to judge them."""

    how: Sampling = Sampling()  # the children's
    log_share: list[float] = field(default_factory=lambda: [0.0])  # of the branches down to the root and each guess
    score: list[float] = field(
        default_factory=lambda: [0.0]
    )  # of the root and each guess; the highest of a level are kept
    laws: dict[int, Law] = field(default_factory=dict[int, Law])  # by guess; -1: the root

    @property
    def said(self) -> int:
        """Tokens of the answer, without guesses."""
        return len(self.speaker.tokens) - len(self.speaker.request.prompt)


class Children(NamedTuple):
    """What may follow a node, best first."""

    parent: int
    token_C: Tensor
    score_C: Tensor  # float64
    log_share_C: Tensor  # of the branch, float64


class Branching(Drafter[Tree]):
    """A drafter of trees."""

    def __init__(self, model: Decoder, pages: Pages, vocabulary: int, method: RSD) -> None:
        super().__init__(model, pages, method.size, vocabulary)
        self.method, self.width = method, max(method.widths)

    def line(self, speaker: Speaker, most: int) -> Tree:
        asked = speaker.request.sampling
        if asked.greedy:  # only their order matters
            change = {"temperature": 1.0, "top_k": CANDIDATES, "top_p": 1.0, "min_p": 0.0}
        else:
            change = {"top_k": min(asked.top_k or CANDIDATES, CANDIDATES)}
        return Tree(speaker, most, how=dataclasses.replace(asked, **change))

    def enough(self, line: Tree) -> bool:
        left = line.speaker.request.max_tokens - line.said - 1
        return line.depth >= min(len(self.method.widths), left)

    def grow(self, line: Tree, logits_LV: Tensor) -> None:
        """The best children of all nodes of the newest level, as many as there may be; the best come first."""
        each = self.method.branches[line.depth] if self.method.branches else CANDIDATES
        found = [self._children(line, node, row_V, each) for node, row_V in zip(line.level, logits_LV, strict=True)]
        parent_X = torch.cat([torch.full_like(some.token_C, some.parent) for some in found])
        token_X, score_X = torch.cat([some.token_C for some in found]), torch.cat([some.score_C for some in found])
        log_share_X = torch.cat([some.log_share_C for some in found])
        count = min(self.method.widths[line.depth], line.most - len(line.guesses), len(token_X))
        best = score_X.topk(count).indices
        line.score += score_X[best].tolist()
        line.log_share += log_share_X[best].tolist()
        line.add(token_X[best].tolist(), parent_X[best].tolist())

    def accept(self, speaker: Speaker, at: int, logits_V: Tensor) -> int | None:
        line = self.lines.get((speaker.id, speaker.index))
        if line is None or at not in line.laws:
            return None
        children = [token for token, parent in zip(line.guesses, line.parents, strict=True) if parent == at]
        position = len(speaker.tokens)
        chances = [uniform(mix(speaker.key, position, ACCEPT, k)) for k in range(len(children))]
        q_V = probabilities(logits_V, speaker.request.sampling, line.history(-1))  # the branch is said by now
        token, rest_V = judge(q_V, line.laws[at], children, chances)
        return draw(rest_V, mix(speaker.key, position)) if token is None else token

    def _children(self, line: Tree, node: int, logits_V: Tensor, most: int) -> Children:
        """The best `most` of a node's."""
        logit_C, token_C = kept(adjusted(logits_V, line.how, line.history(node)), line.how)
        share_C = logit_C.double().softmax(0)
        log_share_C = line.log_share[node + 1] + share_C.log()
        asked, key = line.speaker.request.sampling, (line.speaker.key, line.at + 1)
        if asked.greedy or self.method.rule == "noise":
            noise_C = 0.0 if asked.greedy else gumbel(mix(*key), token_C)
            value_C = (logit_C + noise_C).double()
            score_C = line.score[node + 1] + value_C - value_C.max()
        else:
            line.laws[node] = Law(token_C, share_C)
            noise_C = gumbel(mix(*key, GUESS, node + 1), token_C)
            score_C = conditioned(log_share_C + noise_C, line.score[node + 1])
        best = score_C.topk(min(most, int((share_C > 0).sum()))).indices
        return Children(node, token_C[best], score_C[best], log_share_C[best])


def conditioned(noisy_C: Tensor, highest: float) -> Tensor:
    """Perturbed logarithms, float64, given that the highest of them is `highest`; their order stays.

    Source: https://arxiv.org/abs/1903.06059, appendix B.3.
    """
    gap_C = highest - noisy_C + (-torch.expm1(noisy_C - noisy_C.max())).log()
    return highest - gap_C.clamp(min=0) - (-gap_C.abs()).exp().log1p()


def judge(q_V: Tensor, law: Law, children: Sequence[int], chances: Sequence[float]) -> tuple[int | None, Tensor]:
    """The first of the children that is accepted, None if none is, and what the next token is drawn from then.

    `children` were drawn from `law` one after the other without replacement; `chances` are uniform in (0, 1), one a
    child. Whatever the law, tokens found like this have the distribution `q_V`.
    """
    rest_V, share_C = q_V.double(), law.share_C.clone()
    for child, chance in zip(children, chances, strict=True):
        (at,) = (law.token_C == child).nonzero()[0].tolist()
        if chance * float(share_C[at]) < float(rest_V[child]):
            return child, rest_V
        rest_V[law.token_C] = (rest_V[law.token_C] - share_C).clamp(min=0)
        share_C[at] = 0
        if not bool(rest_V.any()):  # the two laws are equal, up to rounding
            return child, rest_V
        rest_V /= rest_V.sum()
        if not bool(share_C.any()):  # nothing else could be drawn
            break
        share_C /= share_C.sum()
    return None, rest_V


def draw(share_V: Tensor, key: int) -> int:
    """A token of these probabilities, by the noise of `key`."""
    token_C = share_V.nonzero().flatten()
    return int(token_C[likeliest(share_V[token_C].log() + gumbel(key, token_C))])


def uniform(key: int) -> float:
    """A number in (0, 1), a function of 64 mixed bits."""
    return ((key >> 12) + 0.5) * 2.0**-52


@dataclass(frozen=True, kw_only=True)
class RSD(Draft):
    """See the file's docstring."""

    card = Card(
        paper="https://arxiv.org/abs/2402.14160",
        saves=("traffic",),
        spends=("compute", "weights", "kv"),
        claim="more tokens a call than chains and SpecTr's trees of the same length, with Llama 2 and OPT",
        dial=("width", 8, 1),
        demo={"model": "demo"},
    )

    tokens: int = 63  # guessed at once, at most, [1, 63]
    width: int = 3  # guesses at one position, of the beam, [1, 63]
    depth: int = 4  # tokens ahead, of the beam, [1, 63]
    branches: tuple[int, ...] = ()  # of every guess, level by level, such as 3+1+1; none: a beam
    rule: str = "rejection"  # what keeps a guess of a drawn answer: rejection, noise

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(1 <= self.width <= 63, f"width={self.width} is outside [1, 63]; 3 is usual")
        self.require(1 <= self.depth <= 63, f"depth={self.depth} is outside [1, 63]; 4 is usual")
        self.require(all(each >= 1 for each in self.branches), f"branches={self.branches}: every guess has 1 or more")
        self.require(self.rule in ("rejection", "noise"), f"no rule '{self.rule}'; there is rejection, noise")

    @property
    def widths(self) -> list[int]:
        """Guesses of each level, within `tokens`."""
        widths, left = [], self.tokens
        for level in range(len(self.branches) or self.depth):
            whole = (widths[-1] if widths else 1) * self.branches[level] if self.branches else self.width
            widths.append(min(whole, left))
            left -= widths[-1]
        return [width for width in widths if width]

    @property
    def size(self) -> int:
        """Guesses of a tree."""
        return sum(self.widths)

    def drafter(self, small: Decoder, pages: Pages, vocabulary: int) -> Drafter:
        """What runs the small model."""
        return Branching(small, pages, vocabulary, self)
