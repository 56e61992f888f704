"""Rows are dealt out so that all parts have as much to do; none is lost, and all ranks deal alike."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from satchel.run.balance import deal
from satchel.run.data import Corpus
from satchel.run.packing import pack

EVEN = 1.05  # the heaviest part over the mean


def uneven(count, seed, context=512):
    """Lengths as texts have them: log-normal, cut at the context."""
    lengths = np.random.default_rng(seed).lognormal(4.5, 0.9, count).astype(np.int64)
    return np.clip(lengths, 2, context)


def heaviest(parts, tokens_R):
    totals = [tokens_R[part].sum() for part in parts]
    return max(totals) / np.mean(totals)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 9))
def test_every_row_is_dealt_once_and_parts_differ_by_a_row_at_most(tokens, parts):
    dealt = deal(np.array(tokens), parts)
    assert sorted(row for part in dealt for row in part.tolist()) == list(range(len(tokens)))
    assert len(dealt) == parts and max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert all((np.diff(part) > 0).all() for part in dealt)


@pytest.mark.parametrize("seed", range(5))
def test_four_ranks_have_as_many_tokens_where_random_dealing_leaves_one_waiting(seed):
    tokens_R, rng = uneven(64, seed), np.random.default_rng(seed)
    shuffled = [heaviest(np.array_split(rng.permutation(64), 4), tokens_R) for _ in range(20)]
    assert heaviest(deal(tokens_R, 4), tokens_R) <= EVEN < np.mean(shuffled)


def rows_of_single_documents(count=48):
    lengths = uneven(count, seed=7, context=128)
    starts = np.concatenate([[0], np.cumsum(lengths + 1)]).astype(np.int64)
    tokens = np.arange(starts[-1], dtype=np.int32)
    return pack(Corpus(tokens, np.ones(len(tokens), dtype=bool), starts, "text"), np.arange(count), 128, packing=False)


def test_micro_batches_of_a_step_are_even():
    rows = rows_of_single_documents()
    parts = rows.batches(range(48), 12)
    totals = [sum(part.lengths) for part in parts]
    assert len(parts) == 4 and max(totals) / np.mean(totals) <= EVEN
    assert sorted(n for part in parts for n in part.lengths) == sorted(rows.batch(range(48)).lengths)


def test_the_ranks_of_a_job_see_each_row_of_a_step_once_and_as_many_tokens():
    """Four ranks, each by itself, by the step's number alone; and again, as after a resume."""
    rows = rows_of_single_documents()
    for step in range(3):
        seen, totals = [], []
        for rank in range(4):
            chosen = rows.step_rows(step, 32, 5, 1000)
            mine = rows.batches(chosen, 4, rank, 4)
            again = rows.batches(rows.step_rows(step, 32, 5, 1000), 4, rank, 4)
            assert [b.tokens_1N.tolist() for b in mine] == [b.tokens_1N.tolist() for b in again]
            assert all(len(b.lengths) <= 4 for b in mine)
            seen += [token for b in mine for token in b.tokens_1N[0].tolist()]
            totals.append(sum(sum(b.lengths) for b in mine))
        assert sorted(seen) == sorted(rows.batch(chosen).tokens_1N[0].tolist())
        assert max(totals) / np.mean(totals) <= EVEN


def test_rows_of_one_length_keep_their_order():
    assert [part.tolist() for part in deal(np.full(7, 9), 3)] == [[0, 1, 2], [3, 4], [5, 6]]
