"""BAdam is the authors' package, step by step; one layer trains at a time and the backward pass ends there."""

import pytest
import torch

from satchel.core.errors import UserError
from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.optim._shared import join
from satchel.optim.badam import BAdam
from satchel.run.rehearse import rehearse
from tests.optim import common
from tests.optim.test_lisa import DEEP, JOBS, LAYERS, assembled, layer_of, watched
from tests.run.real import needs_pool, real_peaks
from tests.run.toys import toy_decoder
from tests.tolerances import REHEARSED, TOLERANCE

KNOBS = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-7, "weight_decay": 0.1}
EXACT = TOLERANCE[torch.float32]


def give(named, step):
    """Every parameter that trains its gradient of this step, as a backward pass would."""
    common.give_gradients(named, step)
    for _, p in named:
        p.grad = p.grad if p.requires_grad else None


@pytest.mark.filterwarnings("ignore:BAdam expect model to be loaded")
@pytest.mark.parametrize(("order", "dtype"), [("ascending", torch.float32), ("descending", torch.bfloat16)])
def test_every_step_equals_the_authors_package(order, dtype):
    """Of a layer in bfloat16 they keep a float32 master while it is its turn, as exact rounding does."""
    badam = pytest.importorskip("badam")
    ours, theirs = (
        [pair for pair in toy_decoder(dtype, layers=4).named_parameters() if pair[1].ndim > 1] for _ in "ab"
    )
    optimizer = BAdam(period=3, order=order, rounding="fp32", moments="fp32", **KNOBS).build(ours, common.LR, 0)
    adamw = torch.optim.AdamW([p for _, p in theirs], lr=common.LR, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.1)
    reference = badam.BlockOptimizer(adamw, theirs, switch_block_every=3, switch_mode=order, verbose=0)
    reference.global_step = -1  # its first turn is a step short otherwise
    moved = set()
    for step in range(12):
        assert [p.requires_grad for _, p in ours] == [p.requires_grad for _, p in theirs]
        moved |= {layer_of(name) for name, p in ours if p.requires_grad}
        give(ours, step)
        give(theirs, step)
        optimizer.step()
        reference.step()
        masters = reference.param_idx2hp
        for number, ((name, p), (_, q)) in enumerate(zip(ours, theirs, strict=True)):
            state = optimizer.state.get(p, {})
            if "low" in state:
                p, q = join(p.detach().view(-1), state["low"]), masters[number].detach().view(-1)
            if "low" in state or dtype == torch.float32:
                torch.testing.assert_close(p, q, rtol=EXACT, atol=1e-6, msg=name)
    assert moved == {0, 1, 2, 3}


@pytest.mark.parametrize("changes", JOBS[1:3], ids=str)
def test_one_layer_has_gradients_and_state_and_all_have_their_turn(tmp_path, changes):
    assembly, micro_batches = assembled(tmp_path, "badam:period=2", **changes)
    before, turns = {name: p.detach().clone() for name, p in assembly.parameters}, []
    for number, (trains, graded, kept, after) in enumerate(watched(assembly, micro_batches, 2 * LAYERS)):
        (layer,) = {layer_of(name) for name in graded}
        assert graded == trains == {name for name in before if layer_of(name) == layer}
        assert kept == (set() if number % 2 else graded)  # no layer's turn comes twice in a row here
        assert {name for name in before if not torch.equal(before[name], after[name])} <= graded
        assert any(not torch.equal(before[name], after[name]) for name in graded)
        before = after
        turns.append(layer)
    assert turns[::2] == turns[1::2] and sorted(turns[::2]) == list(range(LAYERS))


def test_nothing_is_kept_of_the_layers_below_the_one_in_turn():
    decoder = toy_decoder(layers=4)
    BAdam(order="descending").build(list(decoder.named_parameters()), common.LR, 0)
    seen = []
    for block in decoder.layers:
        block.register_forward_hook(lambda block, inputs, y: seen.append(y.requires_grad))
    decoder(torch.arange(6)[None]).sum().backward()
    assert seen == [False, False, False, True]


def test_state_bytes_are_one_layers_moments():
    named = list(toy_decoder(layers=LAYERS).named_parameters())
    optimizer = BAdam(moments="fp32").build(named, common.LR, 0)
    give(named, 0)
    optimizer.step()
    assert common.state_bytes(optimizer) == 8 * sum(p.numel() for name, p in named if layer_of(name) == 0)


@needs_pool
def test_the_rehearsed_peak_is_that_of_the_longest_backward_pass(tmp_path):
    job = TuneJob(model="toy", data="demo", adapter="none", context=64, batch=2, out=str(tmp_path))
    jobs = [job.replace(optimizer=f"badam:order={order}", micro_batch=2) for order in ("ascending", "descending")]
    jobs.append(jobs[0].replace(activations="memo"))  # in which each block frees what the one before it kept
    first, last, moved = (peaks["train"] for peaks in real_peaks([(DEEP, job, ()) for job in jobs]))
    rehearsals = [rehearse(job, ModelConfig.from_hf(DEEP)) for job in jobs[1:]]  # whatever layer is the first in turn
    rehearsed = [next(p for p in found.phases if p.name == "train").peak_bytes for found in rehearsals]
    assert rehearsed == pytest.approx([first, moved], rel=REHEARSED) and first > 1.02 * last


@pytest.mark.parametrize("knobs", [{"period": 0}, {"order": "shuffled"}, {"moments": "4bit"}])
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        BAdam(**knobs)
