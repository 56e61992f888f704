"""Batches in whole sizes: few of them, little waste, and the same loss."""

import torch

from satchel.model.batch import IGNORE, Batch, whole


def test_whole_sizes_are_few_and_waste_a_quarter_at_most():
    sizes = {whole(n) for n in range(1, 8193)}
    assert len(sizes) < 40
    assert all(n <= whole(n) for n in range(1, 8193))
    assert all(whole(n) < 1.25 * n for n in range(256, 8193))
    assert all(whole(size) == size for size in sizes)


def test_a_filled_batch_has_the_same_targets_and_one_more_document():
    batch = Batch(torch.arange(1000)[None], torch.arange(1, 1001)[None], (600, 400), 1000).filled()
    assert batch.lengths == (600, 400, 24) and batch.filler == 24 and batch.count == 1000
    assert batch.tokens_1N.shape == batch.targets_1N.shape == (1, 1024)
    assert (batch.targets_1N[0, 1000:] == IGNORE).all() and torch.equal(
        batch.targets_1N[0, :1000], torch.arange(1, 1001)
    )


def test_a_whole_batch_is_left_as_it_is():
    batch = Batch(torch.zeros(1, 512, dtype=torch.int64), torch.zeros(1, 512, dtype=torch.int64), (512,), 512)
    assert batch.filled() is batch
