"""Updates within the backward pass: the same steps as after it, without the gradients."""

import copy
import math

import pytest
import torch
from torch import nn

from satchel.core.book import make
from satchel.core.errors import Diverged, UserError
from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.optim._fused import FusedStepper
from satchel.optim._shared import Stepper
from satchel.optim.galore import GaLore
from satchel.run.assemble import assemble
from satchel.run.data import read_dataset
from satchel.run.rehearse import rehearse
from satchel.run.step import train_step
from satchel.run.trainer import train
from tests.optim import common
from tests.run.real import needs_pool, real_peaks
from tests.run.test_rehearse import TOY
from tests.run.toys import CharTokenizer, toy_decoder, toy_job
from tests.tolerances import REHEARSED, TOLERANCE

PLAIN, FUSED = (f"galore:rank=8,gap=3{more}" for more in ("", ",layerwise=true"))
METHODS = (PLAIN, "apollo:rank=8,gap=3", "apollo_mini:gap=3", "frugal:gap=3", "gradnormlorp:rank=8,gap=3", "muon")
METHODS += ("natural_galore:rank=8,gap=3", "owlore:rank=8,period=2,mode=uniform", "lisa:gamma=1,period=2")
METHODS += ("adamw", "adamw:rounding=fp32", "adamw8bit", "adafactor", "lion", "badam:period=2")


def trained(tmp_path, optimizer, **changes):
    """Weights and metrics of a run of four steps."""
    job = toy_job(tmp_path, adapter="none", optimizer=optimizer, steps=4, **changes)
    decoder = toy_decoder(torch.bfloat16 if job.dtype == "bf16" else torch.float32)
    assembly, dataset, metrics = assemble(job, decoder), read_dataset(job, CharTokenizer()), []
    for step in range(4):
        torch.manual_seed(step)
        rows = dataset.train.step_rows(step, job.batch, 0, 100)
        metrics.append(train_step(assembly, dataset.train.batches(rows, job.micro_batch), assembly.lr))
    return [p.detach().clone() for _, p in assembly.parameters], metrics


@pytest.mark.parametrize("micro_batch", [6, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_weights_are_those_of_updates_after_the_backward_pass_bit_for_bit(tmp_path, method, micro_batch, dtype):
    changes = {"clip": 0.0, "micro_batch": micro_batch, "dtype": dtype}
    ours, metrics = trained(tmp_path, f"{method}{',' if ':' in method else ':'}layerwise=true", **changes)
    theirs, expected = trained(tmp_path, method, **changes)
    assert all(map(torch.equal, ours, theirs))
    assert [m["loss"] for m in metrics] == [m["loss"] for m in expected]
    assert "grad_norm" not in metrics[0]  # it is never known


@pytest.mark.parametrize("spelling", ["adamw", "adamw:layerwise=true", "lomo", "lomo:form=ada", "lion:layerwise=true"])
def test_a_method_says_that_it_wants_all_rows_at_once_where_it_updates_within_the_backward_pass(spelling):
    method = make("optimizer", spelling)
    fused = isinstance(method.build(common.parameters(), common.LR, 0), FusedStepper)
    assert method.undivided == ("gradients" in method.saves) == fused == (spelling != "adamw")


class Descent(Stepper):
    """Gradient descent, which does not blow up the last bit of a norm that was summed in another order."""

    def update(self, p, state, group, seed):
        p.sub_(p.grad, alpha=group["lr"])


class FusedDescent(FusedStepper, Descent):
    pass


@pytest.mark.parametrize("micro_batch", [6, 2])
def test_clipping_scales_by_the_norm_of_all_gradients(tmp_path, micro_batch):
    found, norms = [], []
    for kind in (Descent, FusedDescent):
        job = toy_job(tmp_path, adapter="none", clip=0.1, micro_batch=micro_batch)
        assembly, dataset = assemble(job, toy_decoder()), read_dataset(job, CharTokenizer())
        assembly.optimizer = kind([{"params": [p for _, p in assembly.parameters]}], 1.0, 0)
        batches = dataset.train.batches(range(6), micro_batch)
        norms.append([float(train_step(assembly, batches, 1.0)["grad_norm"]) for _ in range(3)])
        found.append([p.detach() for _, p in assembly.parameters])
    assert norms[0] == pytest.approx(norms[1], rel=TOLERANCE[torch.float32]) and min(norms[0]) > 0.1
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=TOLERANCE[torch.float32], atol=1e-6)


def test_no_two_gradients_are_alive_together():
    layers = nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in range(5)))
    named = [(f"mlp.{name}", p) for name, p in layers.named_parameters()]
    optimizer, alive = GaLore(rank=8, layerwise=True).build(named, 1e-3, 0), []
    for _, p in named:
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(p.grad is not None for _, p in named)))

    def closure():
        loss = layers(torch.randn(8, 40)).square().mean()
        loss.backward()
        return loss

    before = [p.detach().clone() for _, p in named]
    assert optimizer.step(closure) > 0
    assert alive == [1] * 5 and all(p.grad is None for _, p in named)
    assert not any(torch.equal(p, b) for (_, p), b in zip(named, before, strict=True))
    layers(torch.ones(1, 40)).sum().backward()  # between steps, gradients are the user's
    assert all(p.grad is not None for _, p in named)


def test_a_parameter_that_the_last_micro_batch_does_not_reach_is_updated_too(tmp_path):
    """As an expert is that none of its tokens chose."""

    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            rng = torch.Generator().manual_seed(0)
            self.mlp = nn.ParameterList(torch.randn(12, 12, generator=rng) for _ in range(2))

    class Chosen:
        def loss(self, model, batch, rng):
            return (model.mlp[batch.tokens_1N[0, 0]] * 3).square().sum(), {}

    job, found = toy_job(tmp_path, clip=0.5), []
    for fused in (False, True):
        model, assembly = Switch(), assemble(job, toy_decoder())
        assembly.model, assembly.objective = model, Chosen()
        assembly.parameters = [(n.replace("mlp", "mlp.up"), p) for n, p in model.named_parameters()]
        assembly.parameters = [(f"mlp.up.{i}", p) for i, p in enumerate(model.mlp)]
        assembly.optimizer = GaLore(rank=4, layerwise=fused).build(assembly.parameters, 0.1, 0)
        first = read_dataset(job, CharTokenizer()).train.batch([0])
        batches = []
        for number in (0, 1):
            batch = copy.copy(first)
            object.__setattr__(batch, "tokens_1N", torch.tensor([[number]]))
            batches.append(batch)
        metrics = train_step(assembly, batches, 0.1)
        found.append([*(p.detach().clone() for p in model.mlp), metrics["grad_norm"]])
    assert all(map(torch.equal, *found))
    assert not torch.equal(found[0][0], Switch().mlp[0])


def test_a_step_without_a_closure_says_what_it_needs():
    optimizer = GaLore(rank=8, layerwise=True).build(common.parameters(), 1e-3, 0)
    with pytest.raises(UserError, match=r"within the backward pass: call step\(closure\)"):
        optimizer.step()


def test_a_loss_that_is_no_number_changes_no_weight(tmp_path):
    job = toy_job(tmp_path, adapter="none", optimizer=FUSED, clip=0.0, eval_share=0.0)
    assembly = assemble(job, toy_decoder())
    true, before = assembly.objective, [p.detach().clone() for _, p in assembly.parameters]

    class Spoiled:
        def loss(self, *arguments):
            loss, parts = true.loss(*arguments)
            return loss * math.nan, parts

    assembly.objective = Spoiled()
    with pytest.raises(Diverged, match="step 1: loss is nan"):
        train(job, assembly, read_dataset(job, CharTokenizer()))
    assert all(torch.equal(p, b) for (_, p), b in zip(assembly.parameters, before, strict=True))


@needs_pool
def test_rehearsed_bytes_are_the_measured_ones_and_gradients_do_not_add_up():
    hf, found = TOY | {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 1280}, {}
    cases = [(PLAIN, 2, 0.0), (FUSED, 2, 0.0), (FUSED, 1, 1.0)]
    plain = TuneJob(model="toy", data="demo", adapter="none", context=64, batch=2)
    jobs = [plain.replace(optimizer=name, micro_batch=rows, clip=clip) for name, rows, clip in cases]
    for job, peaks in zip(jobs, real_peaks([(hf, job, ()) for job in jobs]), strict=True):
        phase = next(p for p in rehearse(job, ModelConfig.from_hf(hf)).phases if p.name == "train")
        assert phase.peak_bytes == pytest.approx(peaks["train"], rel=REHEARSED), job
        found[job.optimizer, job.micro_batch] = phase
    plain, fused = found[PLAIN, 2], found[FUSED, 2]
    assert plain.peak_bytes - fused.peak_bytes > 0.5 * plain.accounts["gradients"]
