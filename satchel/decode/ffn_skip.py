"""Tokens of an answer leave out feed-forwards where these have stopped to change anything.

    x' = x + ffn(norm(x));   if cos(x, x') >= threshold, the token leaves out the feed-forwards of the next `follow`
    layers, runs the one after, and is judged again;   only in layers [first, last), only after `warm` tokens

The similarity rises through the middle of a model and falls at both ends, so the layers before and after that region
always run; so do prompts, and the first tokens of an answer. Attention runs everywhere, so that the cache has every
token in every layer. What is not set is calibrated when the engine starts, on text that the model reads: the region is
the longest run of layers whose mean similarity does not fall, the threshold the lowest at which a token leaves out the
share `target` of all feed-forwards, or less where the text's loss would rise by more than `harm`. Small models may have
no such region, or none that is worth it: they leave out little or nothing, and `stats()["skipped"]` says how much.

Saves reading the weights of what is left out, where few answers run at once; spends a cosine a layer, and quality. What
is left out depends on a token's place in its answer alone, not on the company; but a prompt that repeats an answer may
find keys and values in the pool that were made so.
Paper: https://arxiv.org/abs/2404.03865
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from satchel.core.card import Card
from satchel.core.errors import UserError
from satchel.core.serve_seams import Feed, Skip, Skipper
from satchel.model.forward import HEAD_ROWS, padded

if TYPE_CHECKING:
    from satchel.model.decoder import Decoder
    from satchel.model.tokenizer import Tokenizer

# N tokens of a row, R of them that run a feed-forward, L layers, D width

TEXTS, LENGTH = 4, 128  # to calibrate on: so many, of so many tokens
HALVINGS = 8  # of the similarities among which the threshold lies
SLACK = 0.03  # by which a mean similarity may fall from layer to layer within the region
COLD = 0.1  # below the region's highest: a layer at its ends that is so always runs
Run = Callable[[Tensor], Tensor]


class Skipping(Skipper):
    """Leaves out feed-forwards in one engine."""

    def __init__(self, layers: int, region: range, threshold: float, follow: int, warm: int) -> None:
        self.layers, self.region, self.threshold, self.follow, self.warm = layers, region, threshold, follow, warm

    @property
    def share(self) -> float:
        """Of all feed-forwards of the tokens that may leave some out, those that were."""
        return self.skipped / max(self.eligible, 1)

    def over(self, said_N: Tensor) -> Feed:
        may_N = said_N >= self.warm
        if not self.region or self.threshold == math.inf or not bool(may_N.any()):
            return _all
        self.eligible += int(may_N.sum()) * self.layers
        return _Pass(self, may_N)


def _all(layer: int, run: Run, x_BTD: Tensor, /) -> Tensor:
    return run(x_BTD)


class _Pass:
    """One pass over a row of tokens."""

    def __init__(self, owner: Skipping, may_N: Tensor) -> None:
        self.owner, self.may_N = owner, may_N
        self.left_N = torch.zeros_like(may_N, dtype=torch.int64)  # feed-forwards that each token is to leave out yet

    def __call__(self, layer: int, run: Run, x_BTD: Tensor, /) -> Tensor:
        owner = self.owner
        if layer not in owner.region:
            return run(x_BTD)
        x_ND, out_N = x_BTD[0], self.left_N > 0
        self.left_N -= out_N.long()
        owner.skipped += int(out_N.sum())
        row_R = (~out_N).nonzero()[:, 0]
        y_ND = _run_some(run, x_ND, row_R)
        if layer + 1 in owner.region and len(row_R):
            alike_R = F.cosine_similarity(x_ND[row_R].float(), y_ND[row_R].float(), dim=-1)
            self.left_N[row_R] = owner.follow * (self.may_N[row_R] & (alike_R >= owner.threshold)).long()
        return y_ND[None]


def _run_some(run: Run, x_ND: Tensor, row_R: Tensor) -> Tensor:
    """`run` on some rows, the last of them repeated up to a number of rows that steps have."""
    if len(row_R) == len(x_ND):
        return run(x_ND)
    if not len(row_R):
        return x_ND
    row_R = torch.cat([row_R, row_R[-1:].expand(padded(len(row_R)) - len(row_R))])
    return x_ND.index_copy(0, row_R, run(x_ND[row_R]))


@dataclass(frozen=True, kw_only=True)
class FFNSkip(Skip):
    """See the file's docstring."""

    card = Card(
        paper="https://arxiv.org/abs/2404.03865",
        saves=("traffic", "compute"),
        spends=("quality",),
        fidelity="approx",
        claim="25 to 30% of LLaMA-2's feed-forwards left out with marginal change on MT-Bench and factual questions",
        dial=("target", 0.5, 0.0),
    )

    target: float = 0.25  # share of all feed-forwards that a token leaves out, [0, 0.9]
    harm: float = 0.1  # nats by which the loss of the text that it is calibrated on may rise, (0, inf)
    follow: int = 2  # feed-forwards that are left out after one that changed little, 1 or more
    warm: int = 25  # first tokens of an answer that leave out nothing, 0 or more
    first: int | None = None  # first layer that may be left out; None: calibrated
    last: int | None = None  # layer from which on none is; None: calibrated
    threshold: float | None = None  # least similarity; None: calibrated
    text: str = ""  # file of text to calibrate on; empty: Python's language reference

    def __post_init__(self) -> None:
        self.require(0 <= self.target <= 0.9, f"target={self.target} is outside [0, 0.9]; 0.25 is the authors'")
        self.require(0 < self.harm < math.inf, f"harm={self.harm} is outside (0, inf); 0.1 is a tenth more perplexity")
        self.require(self.follow >= 1, f"follow={self.follow} is below 1; 2 is usual")
        self.require(self.warm >= 0, f"warm={self.warm} is below 0; 25 is usual")

    def start(self, model: Decoder, tokenizer: Tokenizer | None = None) -> Skipping:
        """Calibrated, if target is not 0: it reads 500 tokens ten times."""
        layers = model.config.layers
        first, last = self.first or 0, layers if self.last is None else self.last
        self.require(0 <= first <= last <= layers, f"first={first}, last={last}: the model has {layers} layers")
        self.require(
            model.config.norm_place != "parallel",
            f"{model.config.family} runs attention and feed-forward side by side: neither can be judged; leave it out",
        )
        if not self.target:
            return Skipping(layers, range(0), math.inf, self.follow, self.warm)
        if None not in (self.first, self.last, self.threshold):
            return Skipping(layers, range(first, last), float(self.threshold or 0), self.follow, self.warm)
        self.require(tokenizer is not None, "without a tokenizer there is nothing to read; give first, last, threshold")
        assert tokenizer is not None
        return self.calibrated(model, [tokenizer.encode(text) for text in self._texts()])

    def calibrated(self, model: Decoder, texts: Sequence[Sequence[int]]) -> Skipping:
        """What the texts' tokens say where nothing else was said."""
        alike_LN = similarity(model, texts)
        found = steady(alike_LN.mean(1).tolist())
        first = found.start if self.first is None else self.first
        region = range(first, found.stop if self.last is None else self.last)
        threshold = self.threshold
        if threshold is None:
            threshold = self._threshold(model, texts, region, alike_LN) if len(region) > 1 else math.inf
        return Skipping(model.config.layers, region, threshold, self.follow, self.warm)

    def _threshold(self, model: Decoder, texts: Sequence[Sequence[int]], region: range, alike_LN: Tensor) -> float:
        """The lowest at which the texts' tokens leave out no more than `target` and get no likelier to be wrong than
        `harm` allows."""
        known = alike_LN[region.start : region.stop].flatten().sort().values.tolist()
        most, low, high = loss(model, texts) + self.harm, -1, len(known)
        for _ in range(HALVINGS):
            middle = max((low + high) // 2, 0)
            trial = Skipping(model.config.layers, region, known[middle], self.follow, 0)
            mild = loss(model, texts, trial) <= most and trial.share <= self.target
            low, high = (low, middle) if mild else (middle, high)
        return known[high] if high < len(known) else math.inf

    def _texts(self) -> list[str]:
        """Pieces of text that are long enough."""
        if not self.text:
            return sorted(topics.values(), key=len)[-TEXTS:]
        try:
            whole = Path(self.text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as fault:
            raise UserError(f"{self.name}: text={self.text} cannot be read ({fault}); give UTF-8 text") from None
        size = -(-len(whole) // TEXTS)
        return [whole[start : start + size] for start in range(0, len(whole), size)]


@torch.inference_mode()
def similarity(model: Decoder, texts: Sequence[Sequence[int]]) -> Tensor:
    """The cosine between every token's stream before and after the feed-forward of every layer, [L, N]."""
    found: list[list[Tensor]] = [[] for _ in range(model.config.layers)]

    def noted(layer: int, run: Run, x_BTD: Tensor, /) -> Tensor:
        y_BTD = run(x_BTD)
        found[layer].append(F.cosine_similarity(x_BTD[0].float(), y_BTD[0].float(), dim=-1))
        return y_BTD

    for text in texts:
        _read(model, text, noted)
    return torch.stack([torch.cat(some) for some in found])


@torch.inference_mode()
def loss(model: Decoder, texts: Sequence[Sequence[int]], trial: Skipping | None = None) -> float:
    """The mean loss of the texts' tokens, nats, if all of them may leave out what the trial says."""
    total = 0.0
    for text in texts:
        read_T = torch.tensor(text[:LENGTH], device=model.device)
        x_TD = _read(model, text, trial.over(torch.arange(len(read_T))) if trial else _all)
        for x_RD, next_R in zip(x_TD[:-1].split(HEAD_ROWS), read_T[1:].split(HEAD_ROWS), strict=True):
            total += float(F.cross_entropy(model.logits(x_RD[None])[0].float(), next_R, reduction="sum"))
    return total / sum(len(text[:LENGTH]) - 1 for text in texts)


def _read(model: Decoder, text: Sequence[int], feed: Feed) -> Tensor:
    return model.hidden(torch.tensor([text[:LENGTH]], device=model.device), feed=feed)[0]


def steady(mean_L: Sequence[float]) -> range:
    """The longest run of layers over which the mean similarity does not fall, without those that are far below it."""
    best, start = range(0), 0
    for layer in range(len(mean_L)):
        if layer and mean_L[layer] < mean_L[layer - 1] - SLACK:
            start = layer
        best = max(best, range(start, layer + 1), key=len)
    warm = [layer for layer in best if mean_L[layer] >= max(mean_L[i] for i in best) - COLD]
    region = range(warm[0], warm[-1] + 1) if warm else best
    return region if len(region) > 1 else range(0)
