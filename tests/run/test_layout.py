"""A plan of addresses is never worse than best fit, never better than what is alive at once, and collides nowhere."""

from itertools import combinations, permutations

import numpy as np
import pytest

from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.run.layout import Request, alive_at_once, best_fit, lay_out, two_levels
from satchel.run.rehearse import rehearse
from satchel.run.tracker import Segment

pytest.importorskip("scipy")


def trace(seed, count=9):
    rng = np.random.default_rng(seed)
    begins, spans, sizes = rng.integers(0, 12, count), rng.integers(1, 7, count), rng.integers(1, 40, count)
    return [Request(int(s) * 64, int(b), int(b + n)) for s, b, n in zip(sizes, begins, spans, strict=True)]


def collide(requests, offsets):
    both = combinations(zip(requests, offsets, strict=True), 2)
    return [(a, b) for (a, x), (b, y) in both if a.meets(b) and x < y + b.size and y < x + a.size]


def exhaustive(requests):
    """The best peak of all orders in which requests can be stacked, each as low as those before it let it."""
    best = sum(r.size for r in requests)
    for order in permutations(range(len(requests))):
        offsets = {}
        for i in order:
            offsets[i] = max(
                (offsets[j] + requests[j].size for j in offsets if requests[j].meets(requests[i])), default=0
            )
        best = min(best, max(offsets[i] + requests[i].size for i in order))
    return best


def test_on_random_traces_the_plan_lies_between_what_is_alive_and_best_fit():
    layouts = []
    for seed in range(20):
        requests = trace(seed)
        layout = lay_out(requests)
        assert layout.least_bytes <= layout.peak_bytes <= layout.best_fit_bytes
        assert not collide(requests, layout.offsets) and not collide(requests, best_fit(requests))
        assert layout.peak_bytes == max(o + r.size for o, r in zip(layout.offsets, requests, strict=True))
        layouts.append(layout)
    assert any(layout.peak_bytes < layout.best_fit_bytes for layout in layouts)


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_is_the_best_of_all_orders(seed):
    requests = trace(seed + 100, count=6)
    assert lay_out(requests).peak_bytes == exhaustive(requests)


def test_what_is_alive_at_once_counts_instants_and_not_touches():
    assert alive_at_once([Request(5, 0, 2), Request(7, 2, 4), Request(1, 1, 3)]) == 8
    assert alive_at_once([]) == 0 == lay_out([]).peak_bytes


def test_best_fit_takes_the_tightest_gap():
    """The largest first; the small one fits below the two that follow it, where the largest was, or between them."""
    requests = [Request(10, 0, 9), Request(10, 5, 9), Request(30, 0, 2), Request(8, 3, 5)]
    assert best_fit(requests) == [30, 0, 0, 0] and lay_out(requests).peak_bytes == 40
    assert best_fit([Request(9, 0, 4), Request(5, 0, 2), Request(4, 0, 4), Request(3, 2, 4)]) == [0, 9, 14, 9]


def test_a_layer_is_one_request_of_the_second_level():
    def layer(name, number, kept):
        passing = [
            (number, 60),
            (number + 1, 40),
            (number, -60),
            (number + 2, 60),
            (number + 1, -40),
            (number + 2, -60),
        ]
        return Segment(("train", "forward", name), [*passing, (kept, 10)])

    segments = [layer(0, 10, 1), layer(1, 20, 2), Segment(("train", "head"), [(1, -10), (2, -10)])]
    inner, outer = two_levels(segments)
    assert (inner.peak_bytes, inner.least_bytes) == (100, 100)
    assert len(outer.offsets) == 4 and outer.least_bytes == 100 + 20


def test_a_rehearsed_step_can_be_laid_out():
    """What runs on fake tensors has a plan that needs little more than what is alive."""
    hf = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "rms_norm_eps": 1e-5}
    hf |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6, "max_position_embeddings": 128}
    job = TuneJob(model="m", data="d", batch=1, context=128, activations="memo:alpha=0")
    found = rehearse(job, ModelConfig.from_hf(hf))
    layer, step = two_levels(found.step, patience_s=2)
    assert 0 < layer.least_bytes <= layer.peak_bytes <= layer.best_fit_bytes
    assert step.least_bytes <= step.peak_bytes <= step.best_fit_bytes < 1.3 * step.least_bytes
