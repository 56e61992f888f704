"""First order on top, zeroth order below: two optimizers of which neither sees the other's parameters."""

import pytest
import torch
from torch import nn

from satchel.core.errors import UserError
from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.optim.adamw import AdamW
from satchel.optim.mezo import MeZO
from satchel.optim.mezo_hybrid import MeZOHybrid, first_of_top
from satchel.run.assemble import assemble
from satchel.run.packing import pack
from satchel.run.rehearse import rehearse
from satchel.run.step import train_step
from tests.optim import zeroth
from tests.run.test_rehearse import TOY
from tests.run.test_step import uneven
from tests.run.toys import toy_decoder, toy_job

SHAPES = ((12, 8), (6, 5), (7,))
LR, SCALE = 1e-2, 0.1


def test_the_top_takes_adamws_step_and_the_rest_mezos():
    ours, loss, _ = zeroth.quadratic(shapes=SHAPES)
    theirs, other, _ = zeroth.quadratic(shapes=SHAPES)
    hybrid = MeZOHybrid(last=2, scale=SCALE).build(ours, LR, 0)
    below, top = MeZO().build(theirs[:1], LR * SCALE, 0), AdamW().build(theirs[1:], LR, 0)
    for _ in range(10):
        hybrid.step(loss)
        below.step(other)
        top.zero_grad()
        top.step(other)
        hybrid.zero_grad()
    for (_, p), (_, q) in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(p, q)
    torch.testing.assert_close(ours[0][1], theirs[0][1], rtol=1e-3, atol=1e-4)  # losses of other sizes are subtracted


def test_the_graph_ends_where_the_top_begins():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    x, kept = torch.randn(5, 8), []

    def loss():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            value = model(x).square().mean()
        if torch.is_grad_enabled():
            assert [p.requires_grad for p in model.parameters()] == [False] * 6 + [True] * 2
            value.backward()
        return value

    optimizer = MeZOHybrid(last=1).build(list(model.named_parameters()), 1e-3, 0)
    optimizer.step(loss)
    assert len(kept) <= 4  # of the last map and the loss; four maps would keep three more
    assert all(p.requires_grad for p in model.parameters())
    assert [p.grad is not None for p in model.parameters()] == [False] * 6 + [True] * 2


def test_parameters_ask_for_gradients_again_when_the_loss_raises():
    named, loss, _ = zeroth.quadratic(shapes=SHAPES)

    def fail():
        if torch.is_grad_enabled():
            raise MemoryError
        return loss()

    with pytest.raises(MemoryError):
        MeZOHybrid(last=1).build(named, LR, 0).step(fail)
    assert all(p.requires_grad for _, p in named)


def test_the_top_is_the_last_blocks_and_what_comes_behind_them():
    names = [
        "model.embed.weight",
        *(f"model.layers.{i}.experts.{j}.w" for i in range(3) for j in range(2)),
        "norm",
        "head",
    ]
    assert [names[first_of_top(names, last)] for last in (0, 1, 3)] == ["norm", names[5], names[1]]
    assert first_of_top(names, 4) == 0


@pytest.mark.parametrize(
    ("last", "complaint"), [(3, "leaves nothing below"), (4, "leaves nothing below"), (0, "leaves nothing on top")]
)
def test_one_way_for_all_parameters_is_refused(last, complaint):
    named, _, _ = zeroth.quadratic(shapes=SHAPES)
    with pytest.raises(UserError, match=f"mezo_hybrid: last={last} {complaint}"):
        MeZOHybrid(last=last).build(named, LR, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_uninterrupted_one(dtype):
    def run(stop=None):
        named, loss, _ = zeroth.quadratic(dtype, SHAPES)
        optimizer = MeZOHybrid(last=1, radius=0.05).build(named, LR, 0)
        for step in range(8):
            if step == stop:
                saved, optimizer = optimizer.state_dict(), MeZOHybrid(last=1, radius=0.05).build(named, 1.0, 9)
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            optimizer.step(loss)
        return [p.detach() for _, p in named]

    assert all(map(torch.equal, run(), run(stop=4)))


def test_it_learns_faster_than_mezo_over_an_adapter(tmp_path):
    ends = []
    for optimizer, lr in (("mezo_hybrid:last=1", 1e-2), ("mezo", 1e-3)):
        job = toy_job(tmp_path, optimizer=optimizer, lr=lr)
        assembly = assemble(job, toy_decoder())
        batches = pack(uneven(), range(12), 32).batches(range(6), 2)
        metrics = [train_step(assembly, batches, lr) for _ in range(20)]
        ends.append(float(metrics[-1]["loss"] / metrics[0]["loss"]))
        assert ("grad_norm" in metrics[0]) == ("hybrid" in optimizer)
    assert ends[0] < 0.9 < ends[1]


def test_the_peak_rises_with_the_top():
    job = TuneJob(model="toy", data="demo", context=128, batch=4, micro_batch=2, adapter="none", dtype="fp32")
    found = []
    for optimizer in ("mezo", "mezo_hybrid:last=1", "mezo_hybrid:last=2", "adamw"):
        phases = rehearse(job.replace(optimizer=optimizer), ModelConfig.from_hf(TOY)).phases
        found.append(next(phase.peak_bytes for phase in phases if phase.name == "train"))
    assert found == sorted(set(found))


def test_learning_rates_are_adamws_and_mezos_below():
    adamw = 1e-4
    assert MeZOHybrid().usual_lr(adamw, adapted=False) == adamw
    named, _, _ = zeroth.quadratic(shapes=SHAPES)
    (group, *_) = MeZOHybrid(last=1).build(named, LR, 0).param_groups
    assert group["scale"] * adamw == pytest.approx(MeZO().usual_lr(adamw, adapted=False))


@pytest.mark.parametrize("knobs", [{"last": -1}, {"scale": -0.1}])
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        MeZOHybrid(**knobs)
