"""The bench of activations finds the longest context that fits, and compares the same documents."""

import json
from types import SimpleNamespace

import pytest
import torch

from bench import _activations_run, activations
from bench._activations_run import documents, padded, text_N, together
from docs.headlines import headline
from satchel.model.batch import IGNORE, Batch, whole
from satchel.train.causal_lm import CausalLM
from tests.tolerances import TOLERANCE
from tests.train.toys import toy_decoder


def test_contexts_are_the_sizes_that_batches_have():
    sizes = _activations_run.contexts()
    assert sizes == sorted(set(sizes)) and all(whole(size) == size for size in sizes)
    assert set(range(64, 512, 64)) <= set(sizes) and sizes[-1] == _activations_run.LONGEST


@pytest.mark.parametrize("most", [63, 64, 3000, 1 << 20])
def test_the_longest_context_is_the_last_that_fits(monkeypatch, most):
    rehearsal = SimpleNamespace(peak=SimpleNamespace(peak_bytes=1), second_tier_bytes=0)

    def rung(job):
        return SimpleNamespace(fits=job.context <= most, job=job, peak_bytes=2, seconds_per_step=3, rehearsal=rehearsal)

    monkeypatch.setattr(_activations_run, "Pricing", lambda *_: SimpleNamespace(rung=rung))
    monkeypatch.setattr(_activations_run, "device", lambda kind: None)
    monkeypatch.setattr(_activations_run, "warm_up", lambda *_: None)
    found = _activations_run.longest("full", 0)
    fitting = [size for size in _activations_run.contexts() if size <= most]
    assert found.get("context") == (fitting[-1] if fitting else None)


def test_packed_and_padded_documents_have_the_same_loss_and_gradient():
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(97, (1, n + 1), generator=rng) for n in (11, 3, 18)]
    alone = [Batch(row[:, :-1], row[:, 1:], (row.shape[1] - 1,), row.shape[1] - 1) for row in rows]
    found = []
    for batch in (together(alone), padded(alone)):
        decoder = toy_decoder()
        loss = CausalLM().loss(decoder, batch)[0]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in decoder.parameters())])
    assert padded(alone).tokens_1N.shape == (1, 54) and (padded(alone).targets_1N == IGNORE).sum() == 54 - 32
    for packed, wide in zip(*found, strict=True):
        torch.testing.assert_close(packed, wide, rtol=TOLERANCE[torch.float32], atol=TOLERANCE[torch.float32])


def test_documents_follow_one_another_in_the_text():
    first, second = documents([5, 9])
    assert torch.equal(torch.cat([first.tokens_1N, second.tokens_1N], 1)[0], text_N(14))
    assert first.targets_1N[0, -1] == second.tokens_1N[0, 0]


def test_the_table_has_a_row_for_each_policy_also_where_a_run_failed():
    ran = {"context": 512, "predicted_bytes": 1 << 30, "predicted_s": 2.0, "peak_bytes": 1 << 30}
    ran |= {"predicted_tensor_bytes": 99, "tensor_bytes": 100, "tokens_per_second": 99.6}
    rows = [
        {"policy": "none", "1.00 GiB": ran, "4.00 GiB": {}},
        {
            "policy": "lemo",
            "1.00 GiB": {"context": 64, "predicted_s": 2.0, "error": "no memory"},
            "4.00 GiB": ran | {"tokens_per_second": None},
        },
    ]
    lossy = [
        {"policy": p, "at_random": r, "after": a} for p, r, a in (("none", False, 2.0), ("lemo:keep=0.5", False, 2.1))
    ]
    first, second = activations.table(rows, [1 << 30, 4 << 30], lossy)
    assert (first["tokens/s, 1.00 GiB"], first["longest context, 4.00 GiB"]) == (100, "does not fit")
    assert (second["peak, 1.00 GiB"], second["held-out loss ratio"]) == ("failed", "1.0500")
    assert (first["tensors rehearsed, 1.00 GiB"], second["tokens/s, 4.00 GiB"]) == ("-1.0%", "256 predicted")
    assert first.keys() == second.keys() and json.dumps([first, second])
    said = headline("activations", [first, second])
    assert said == "longest context, 1.00 GiB none 512, lemo 64; longest context, 4.00 GiB none does not fit, lemo 512"


def test_every_policy_of_the_book_is_tried():
    from satchel.core import book

    tried = {policy.partition(":")[0] for policy in activations.POLICIES}
    assert tried == {"none", *(entry.name for entry in book.entries() if entry.slot == "activations")}
