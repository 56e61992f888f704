"""Rows hold every target once, are well filled, and come in an order that seed and step alone decide."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from satchel.model.batch import IGNORE
from satchel.run.data import Corpus
from satchel.run.packing import best_fit, fill, pack


def corpus(lengths, learnt=None):
    tokens = np.arange(sum(lengths), dtype=np.int32)
    learnt = np.ones(len(tokens), dtype=bool) if learnt is None else learnt
    return Corpus(tokens, learnt, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), "text")


def everything(lengths, context, packing=True):
    documents = corpus(lengths)
    return pack(documents, np.arange(len(lengths)), context, packing)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=40), st.integers(2, 17), st.booleans())
def test_every_token_is_fed_and_predicted_once(lengths, context, packing):
    rows = everything(lengths, context, packing)
    batch = rows.batch(range(len(rows)))
    ends = np.cumsum(lengths) - 1
    fed = np.setdiff1d(np.arange(sum(lengths)), ends)
    assert sorted(batch.tokens_1N[0].tolist()) == fed.tolist()
    assert (batch.targets_1N == batch.tokens_1N + 1).all()  # tokens count up, so the next one is one more
    assert sum(batch.lengths) == batch.tokens_1N.shape[1] == rows.tokens and batch.count == len(fed)
    assert all(sum(rows.batch([r]).lengths) <= context for r in range(len(rows)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_best_fit_leaves_no_two_rows_that_would_fit_in_one(lengths):
    rows = best_fit(np.array(lengths), 64)
    assert sorted(p for row in rows for p in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[p] for p in row) for row in rows)
    assert filled[-1] <= 64 and (len(rows) == 1 or filled[0] + filled[1] > 64)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(2, 17), st.data())
def test_filled_rows_are_full_but_the_last_and_feed_every_token_of_the_chosen_documents_once(lengths, context, data):
    documents = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    rows = fill(corpus(lengths), documents, context)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    fed = [t for m in documents for t in range(starts[m], starts[m + 1] - 1)]
    assert rows.tokens == len(fed) and len(rows) == -(-len(fed) // context)
    assert (rows.tokens_R[:-1] == context).all()
    if not fed:
        return
    batch = rows.batch(range(len(rows)))
    assert batch.tokens_1N[0].tolist() == fed and (batch.targets_1N == batch.tokens_1N + 1).all()
    ends = np.cumsum(batch.lengths)  # a document begins a piece, and so does a row: no others
    assert {fed[i] for i in [0, *ends[:-1]]} == {starts[m] for m in documents if lengths[m] > 1} | set(fed[::context])


def test_the_fullest_row_has_the_most_tokens_and_of_these_the_most_documents():
    assert pack(corpus([5, 3, 3, 9, 2]), np.arange(5), 4).fullest() in ((2, 2), (2, 1, 1))
    assert fill(corpus([9, 2, 2, 2, 2, 3]), np.arange(6), 4).fullest() == (1, 1, 1, 1)


def test_tokens_fed_are_counted_row_by_row_through_the_epochs():
    rows = fill(corpus([7, 9, 4]), np.arange(3), 5)
    stream = [rows.tokens_R[row] for row in rows.drawn(0, 3 * len(rows), seed=4)]
    assert [rows.fed(count, 4) for count in range(len(stream) + 1)] == [sum(stream[:n]) for n in range(len(stream) + 1)]


def test_packing_fills_rows_and_without_it_each_row_is_one_document():
    lengths = np.random.default_rng(0).integers(2, 64, size=300).tolist()
    packed, single = everything(lengths, 256), everything(lengths, 256, packing=False)
    assert packed.tokens == single.tokens and len(single) == 300
    assert packed.tokens / (256 * len(packed)) > 0.97
    assert all(len(single.batch([r]).lengths) == 1 for r in range(300))


def test_only_learnt_tokens_are_targets():
    learnt = np.array([0, 0, 1, 1, 0, 1], dtype=bool)
    rows = pack(corpus([4, 2], learnt), np.arange(2), 8)
    batch = rows.batch([0])
    assert batch.lengths == (3, 1) and batch.count == 3
    assert batch.targets_1N.tolist() == [[IGNORE, 2, 3, 5]]


@pytest.mark.parametrize("batch", [1, 3, 7, 25])
def test_each_epoch_sees_every_row_once_in_its_own_order(batch):
    rows = everything([9] * 20, 8)
    steps, total = rows.length(batch, 0, 3)
    stream = np.concatenate([rows.step_rows(s, batch, 5, total) for s in range(steps)])
    epochs = stream.reshape(3, len(rows))
    assert all(sorted(epoch) == list(range(len(rows))) for epoch in epochs)
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()
    assert len(rows.step_rows(steps, batch, 5, total)) == 0


def test_the_order_is_a_function_of_seed_and_step():
    rows = everything([9] * 50, 8)
    assert (rows.step_rows(7, 4, 1, 200) == rows.step_rows(7, 4, 1, 200)).all()
    assert (rows.step_rows(7, 4, 1, 200) != rows.step_rows(7, 4, 2, 200)).any()


def test_half_an_epoch_is_half_of_the_rows():
    rows = everything([9] * 40, 8)
    assert rows.length(8, 0, 0.5) == (3, 20) and rows.length(8, 0, 0.01) == (1, 1) and rows.length(40, 0, 1) == (1, 40)
    assert rows.length(8, 7, 0.5) == (7, 56)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 8])
def test_micro_batches_hold_the_rows_of_the_whole_step(micro_batch):
    rows = everything(np.random.default_rng(1).integers(2, 30, size=60).tolist(), 16)
    chosen = rows.step_rows(0, 8, 0, 1000)
    parts = rows.batches(chosen, micro_batch)
    whole = rows.batch(chosen)
    assert sorted(sum((part.lengths for part in parts), ())) == sorted(whole.lengths)
    assert sorted(np.concatenate([p.tokens_1N[0] for p in parts]).tolist()) == sorted(whole.tokens_1N[0].tolist())
    assert sum(part.count for part in parts) == whole.count


def test_a_sample_holds_whole_rows_in_their_order_and_is_a_function_of_the_seed():
    rows = everything(np.random.default_rng(0).integers(2, 64, size=300).tolist(), 128)
    every = [rows.batch([r]).tokens_1N.tolist() for r in range(len(rows))]
    some = rows.sample(7, seed=3)
    places = [every.index(some.batch([r]).tokens_1N.tolist()) for r in range(len(some))]
    assert len(places) == 7 and places == sorted(set(places)) and places != list(range(7))
    assert some.digest() == rows.sample(7, seed=3).digest() != rows.sample(7, seed=4).digest()
