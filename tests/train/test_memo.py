"""Gradients are the plain job's however many tokens are moved; what stays on the device does not grow with depth."""

import gc
import math
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from satchel.adapt.lora import Lora
from satchel.core.errors import NoDisk, UserError
from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.run.rehearse import rehearse
from satchel.train import _tier
from satchel.train.causal_lm import CausalLM
from satchel.train.memo import Costs, Memo
from tests.tolerances import TOLERANCE
from tests.train.common import adapt, gradients
from tests.train.toys import toy_batch, toy_decoder

EXACT = TOLERANCE[torch.float32]
FAMILIES = {
    "llama": {},
    "sliding window and soft cap": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
    },
    "norms after": {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"},
    "experts": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


def same(ours, plain):
    for one, other in zip(ours, plain, strict=True):
        if one is not None or other is not None:
            torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("alpha", [None, 0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("lengths", [(11, 5, 16), (8, 8, 8)], ids=["a row of documents", "a plain batch"])
def test_gradients_equal_the_plain_jobs(alpha, lengths):
    decoder, batch = toy_decoder(), toy_batch(lengths)
    same(gradients(decoder, Memo(alpha=alpha), batch), gradients(decoder, None, batch))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_gradients_are_bit_identical_where_no_row_is_cut(alpha):
    decoder, batch = toy_decoder(), toy_batch()
    for ours, plain in zip(gradients(decoder, Memo(alpha=alpha), batch), gradients(decoder, None, batch), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_blocks_can_be_moved(family, alpha):
    decoder, batch = toy_decoder(**FAMILIES[family]), toy_batch()
    same(gradients(decoder, Memo(alpha=alpha), batch), gradients(decoder, None, batch))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("targets", [(), ("down_proj",), ("q_proj", "v_proj")])
def test_adapters_train_as_they_would(targets, dropout):
    decoder, batch = toy_decoder(), toy_batch()
    adapt(decoder, Lora(targets=targets, dropout=dropout))
    found = []
    for policy in (Memo(alpha=0.4), None):
        torch.manual_seed(1)
        found.append(gradients(decoder, policy, batch))
    same(*found)


def test_two_passes_whose_backward_comes_later_do_not_write_over_each_other():
    decoder, batches = toy_decoder(), [toy_batch(seed=seed) for seed in (1, 2)]
    found = []
    for policy in (None, Memo(alpha=0.5)):
        decoder.wrap_blocks(policy)
        decoder.zero_grad()
        sum(CausalLM().loss(decoder, batch)[0] for batch in batches).backward()
        found.append([p.grad for p in decoder.parameters()])
    same(*found)


def test_a_graph_is_walked_twice_with_the_same_result():
    decoder = toy_decoder()
    decoder.wrap_blocks(Memo(alpha=0.5))
    x_BTD = decoder.hidden(toy_batch().tokens_1N)
    first, second = (
        torch.autograd.grad(x_BTD.sum(), decoder.layers[0].mlp.up_proj.weight, retain_graph=True) for _ in range(2)
    )
    assert torch.equal(first[0], second[0])


def test_nothing_is_left_of_the_file_and_its_room_is_used_again(tmp_path):
    decoder, written = toy_decoder(), []
    decoder.wrap_blocks(Memo(alpha=1.0), tmp_path)
    for _ in range(3):
        CausalLM().loss(decoder, toy_batch())[0].backward()
        (descriptor,) = (int(p.name) for p in Path("/proc/self/fd").iterdir() if str(tmp_path) in os.path.realpath(p))
        written.append(os.fstat(descriptor).st_size)
    assert list(tmp_path.iterdir()) == [] and len(set(written)) == 1
    decoder.wrap_blocks(None)
    gc.collect()
    assert not any(str(tmp_path) in os.path.realpath(p) for p in Path("/proc/self/fd").iterdir())


def test_a_full_disk_says_so_and_costs_nothing_but_the_step(tmp_path, monkeypatch):
    decoder = toy_decoder()
    decoder.wrap_blocks(Memo(alpha=1.0), tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(_tier.os, "pwrite", full)
        with pytest.raises(NoDisk, match="no disk left"):
            CausalLM().loss(decoder, toy_batch())
    same(gradients(decoder, Memo(alpha=1.0), toy_batch()), gradients(decoder, None, toy_batch()))


SHAPE = {"model_type": "llama", "vocab_size": 256, "hidden_size": 256, "intermediate_size": 640, "rms_norm_eps": 1e-5}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}


@cache
def rehearsed(spelling, layers=24):
    job = TuneJob(model="m", data="d", activations=spelling, batch=1, micro_batch=1, context=1024)
    return rehearse(job, ModelConfig.from_hf(SHAPE | {"num_hidden_layers": layers}))


def activations(spelling, layers):
    """Rehearsed bytes of tensors beside the weights, and bytes in the second tier."""
    found = rehearsed(spelling, layers)
    phase = next(phase for phase in found.phases if phase.name == "train")
    lasting = sum(phase.accounts.get(name, 0) for name in ("weights", "adapter", "optimizer", "gradients"))
    return phase.peak_bytes - lasting, found.second_tier_bytes


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_what_stays_on_the_device_does_not_grow_with_depth_but_the_second_tier_does(alpha):
    (shallow, few), (deep, many) = (activations(f"memo:alpha={alpha}", layers) for layers in (4, 24))
    assert deep <= 1.01 * shallow
    assert many == pytest.approx(few * 23 / 3, rel=1e-3)  # the last block moves nothing
    full, none = activations("full", 24)
    assert deep < 0.6 * full and none == 0


def test_more_tokens_moved_are_more_bytes_in_the_second_tier():
    moved = [activations(f"memo:alpha={alpha}", 24)[1] for alpha in (0, 0.5, 1)]
    assert moved == sorted(moved) and moved[1] - moved[0] == pytest.approx(moved[2] - moved[1], rel=0.01)


times = st.floats(1e-4, 1e2)
sizes = st.floats(1, 1e10)


@given(sizes, sizes, times, times, st.floats(1e6, 1e11), st.booleans(), st.one_of(sizes, st.just(math.inf)))
def test_the_chosen_share_is_the_best_of_all(whole, rest, forward, again, bandwidth, beside, room):
    costs = Costs(whole, rest, forward, again, bandwidth, beside)
    most = min(1.0, max(0.0, (room - whole) / rest))
    every = min(costs.seconds(most * step / 1000) for step in range(1001))
    best = costs.best(room)
    assert 0 <= best <= most and costs.seconds(best) <= every * (1 + 1e-9)


def test_a_fast_second_tier_moves_everything_and_a_slow_one_little():
    quick, slow = (Costs(1e6, 1e7, 0.1, 0.05, bandwidth, beside=False).best() for bandwidth in (1e10, 1e7))
    assert (quick, slow) == (1.0, 0.0)


def test_a_share_out_of_range_is_refused():
    with pytest.raises(UserError, match="is outside"):
        Memo(alpha=1.5)


def test_it_computes_less_again_than_full_recomputation():
    """Attention and the last block are not repeated."""
    flops = {
        spelling: sum(item.flops * count for item, count in rehearsed(spelling).work.items())
        for spelling in ("memo:alpha=1", "memo:alpha=0.5", "memo:alpha=0", "full")
    }
    assert list(flops.values()) == sorted(flops.values()) and len(set(flops.values())) == 4
    assert flops["memo:alpha=0"] < 0.95 * flops["full"]
