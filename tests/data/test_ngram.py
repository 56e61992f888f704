"""What is likely under an n-gram model stays; held against counts in dictionaries, which no gram shares."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from satchel.core.errors import UserError
from satchel.data.ngram import PRIOR, UNIFORM, Counts, Ngram
from satchel.run.sources import read_sources
from tests.run.toys import CharTokenizer, toy_pretraining, toy_text
from tests.tolerances import TOLERANCE

RNG = np.random.default_rng(0)
PLAIN = [np.tile(np.arange(20), 4)[start : start + 60] for start in range(20)]
NOISE = [RNG.integers(0, 20, size=60) for _ in range(20)]


def expected(document, texts, order):
    """The same score from exact counts."""
    grams = [Counter() for _ in range(order + 1)]
    for text in texts:
        padded = [-1] * order + [int(t) for t in text]
        for i in range(order, len(padded)):
            for k in range(1, order + 1):
                grams[k][tuple(padded[i - k + 1 : i + 1])] += 1
    tokens = sum(map(len, texts))
    padded, total = [-1] * order + [int(t) for t in document], 0.0
    for i in range(order, len(padded)):
        p, context = UNIFORM, tokens
        for k in range(1, order + 1):
            count = grams[k][tuple(padded[i - k + 1 : i + 1])]
            p = (count + PRIOR * p) / (max(context, count) + PRIOR)
            context = grams[k][tuple(padded[i - k : i])]
        total += math.log(p)
    return total / len(document)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_scores_are_those_of_exact_counts(order):
    counts = Counts(order)
    for text in PLAIN:
        counts.add(text)
    for document in (NOISE[0], PLAIN[3], NOISE[1][:1]):
        found = counts.score(document, own=False)
        assert found == pytest.approx(expected(document, PLAIN, order), rel=TOLERANCE[torch.float64])


def test_a_document_that_was_counted_itself_is_taken_out_again():
    counts = Counts(4)
    for text in PLAIN:
        counts.add(text)
    others = PLAIN[:5] + PLAIN[6:]
    assert counts.score(PLAIN[5], own=True) == pytest.approx(
        expected(PLAIN[5], others, 4), rel=TOLERANCE[torch.float64]
    )


@pytest.mark.parametrize("reference", [0, 2])
def test_the_regular_half_stays_and_by_worst_the_other(reference):
    mixed = [*PLAIN, *NOISE[:10]]
    good = [PLAIN[0], PLAIN[7]]
    best, rest = Ngram(keep=0.5, reference=reference).choose([mixed, good], 0)
    assert rest.all() and best[:20].sum() == 15 and not best[20:].any()
    worst, _ = Ngram(keep=1 / 3, reference=reference, by="worst").choose([mixed, good], 0)
    assert worst[20:].all() and not worst[:20].any()


def test_a_share_of_the_tokens_stays_whatever_the_lengths():
    documents = [RNG.integers(0, 50, size=size) for size in RNG.integers(2, 200, size=300)]
    chosen, _ = Ngram(keep=0.3).choose([documents, documents], 0)
    kept = sum(len(d) for d, stays in zip(documents, chosen, strict=True) if stays)
    whole = sum(map(len, documents))
    assert 0 <= kept - 0.3 * whole < 200


def test_chance_is_a_function_of_the_seed():
    first, same, other = (Ngram(keep=0.5, by="chance").choose([NOISE], seed)[0] for seed in (0, 0, 1))
    assert (first == same).all() and (first != other).any() and first.sum() == 10


def test_growing_shares_keep_what_smaller_ones_kept():
    kept = [Ngram(keep=keep).choose([[*PLAIN, *NOISE]], 0)[0] for keep in (0.1, 0.4, 0.7, 1.0)]
    assert all((larger | smaller == larger).all() for smaller, larger in pairwise(kept)) and kept[-1].all()


def test_a_reference_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="reference=3: there are 2 sources"):
        Ngram(reference=3).choose([PLAIN, NOISE], 0)


def test_a_job_trains_on_what_was_chosen_and_evaluates_what_it_would_have(tmp_path):
    toy_text(tmp_path / "large.jsonl")
    whole, part = (
        read_sources(toy_pretraining(tmp_path, selector=selector), CharTokenizer())
        for selector in ("none", "ngram:keep=0.25")
    )
    assert part.held_out.digest() == whole.held_out.digest()
    assert part.train.parts["small"].digest() == whole.train.parts["small"].digest()
    assert 0.2 < part.train.parts["large"].tokens / whole.train.parts["large"].tokens < 0.32
