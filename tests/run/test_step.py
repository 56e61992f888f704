"""One optimizer step is one large batch, however it is cut into pieces and packed into rows."""

import math

import numpy as np
import pytest
import torch

from satchel.run.assemble import assemble
from satchel.run.data import Corpus, read_dataset
from satchel.run.packing import pack
from satchel.run.step import StepLoss, gradient_norm, mean_loss, take_step, train_step
from tests.run.toys import VOCABULARY, CharTokenizer, toy_decoder, toy_job
from tests.tolerances import TOLERANCE

EXACT = TOLERANCE[torch.float32]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def uneven(seed=0, count=12):
    """Documents of uneven lengths of which uneven parts are learnt."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 30, size=count)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(4, VOCABULARY, size=starts[-1]).astype(np.int32)
    learnt = np.concatenate([np.arange(n) >= rng.integers(0, n - 1) for n in lengths])
    return Corpus(tokens, learnt, starts, "completion")


def accumulate(assembly, batches):
    """The step's metrics, its gradient left in `.grad`."""
    closure = StepLoss(assembly, lambda: batches)
    closure()
    return closure.metrics


def gradients(assembly):
    return {name: p.grad.clone() for name, p in assembly.parameters if p.grad is not None}


def close(ours, theirs):
    scale = max(g.abs().max() for g in theirs.values())
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).abs().max() <= EXACT * scale for name in theirs)


@pytest.mark.parametrize("adapter", ["none", "lora:rank=4"])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_micro_batches_of_uneven_lengths_equal_one_large_batch(tmp_path, adapter, micro_batch):
    assembly = assemble(toy_job(tmp_path, adapter=adapter, clip=0.0), toy_decoder())
    rows = pack(uneven(), np.arange(12), 32)
    chosen = range(len(rows))
    whole = accumulate(assembly, rows.batches(chosen, len(rows)))
    expected = gradients(assembly)
    assembly.optimizer.zero_grad()
    parts = accumulate(assembly, rows.batches(chosen, micro_batch))
    close(gradients(assembly), expected)
    assert math.isclose(parts["loss"], whole["loss"], rel_tol=EXACT)
    assert math.isclose(parts["grad_norm"], whole["grad_norm"], rel_tol=EXACT)


def test_packed_rows_give_the_loss_and_gradient_of_single_documents(tmp_path):
    assembly = assemble(toy_job(tmp_path, clip=0.0, adapter="none"), toy_decoder())
    packed, single = (pack(uneven(), np.arange(12), 64, packing) for packing in (True, False))
    assert len(packed) < len(single) == 12
    one = accumulate(assembly, packed.batches(range(len(packed)), 4))
    expected = gradients(assembly)
    assembly.optimizer.zero_grad()
    other = accumulate(assembly, single.batches(range(12), 1))
    close(gradients(assembly), expected)
    assert math.isclose(one["loss"], other["loss"], rel_tol=EXACT)
    assert math.isclose(mean_loss(assembly, packed.batches(range(len(packed)), 3)), float(other["loss"]), rel_tol=EXACT)


def test_the_loss_is_that_of_torch_over_the_learnt_tokens(tmp_path):
    decoder = toy_decoder()
    rows = pack(uneven(), np.arange(12), 64)
    batch = rows.batch(range(len(rows)))
    logits_NV = decoder(batch.tokens_1N, lengths=batch.lengths)[0]
    expected = torch.nn.functional.cross_entropy(logits_NV, batch.targets_1N[0])
    assembly = assemble(toy_job(tmp_path), decoder)
    assert math.isclose(accumulate(assembly, [batch])["loss"], expected.item(), rel_tol=EXACT)


@pytest.mark.parametrize("limit", [0.05, 1e3, 0.0])
def test_clipping_scales_all_gradients_to_the_limit_as_torch_does(tmp_path, limit):
    rows = pack(uneven(), np.arange(12), 32)
    batches = rows.batches(range(len(rows)), 2)
    free = assemble(toy_job(tmp_path, clip=0.0), toy_decoder())
    accumulate(free, batches)
    parameters = [p for _, p in free.parameters]
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    assembly = assemble(toy_job(tmp_path, clip=limit), toy_decoder())
    metrics = accumulate(assembly, batches)
    assert math.isclose(metrics["grad_norm"], norm, rel_tol=EXACT) and norm > 0.05
    close(gradients(assembly), gradients(free))


def test_the_norm_of_gradients_is_that_of_one_vector():
    rng = torch.Generator().manual_seed(0)
    parts = [torch.randn(50, generator=rng), torch.randn(3, 4, generator=rng)]
    whole = torch.cat([p.reshape(-1) for p in parts]).norm()
    assert math.isclose(gradient_norm(parts), whole, rel_tol=EXACT)


class Asking(torch.optim.SGD):
    """Asks for the loss once with gradients and twice without."""

    def step(self, closure):
        with torch.enable_grad():
            self.first, self.left = closure(), [p.grad for group in self.param_groups for p in group["params"]]
        self.zero_grad()
        with torch.no_grad():
            self.others = [closure(), closure()]
        self.silent = all(p.grad is None for group in self.param_groups for p in group["params"])
        return torch.tensor(4.25)


def test_an_optimizer_may_ask_for_the_loss_as_often_as_it_wants_with_and_without_gradients(tmp_path):
    assembly = assemble(toy_job(tmp_path, adapter="lora:rank=4,dropout=0.3"), toy_decoder())
    optimizer = assembly.optimizer = Asking([p for _, p in assembly.parameters], lr=0.0)
    rows, asked = pack(uneven(), np.arange(12), 32), []

    def batches():
        asked.append(torch.manual_seed(3))
        return rows.batches(range(len(rows)), 2)

    metrics = take_step(StepLoss(assembly, batches), 0.25)
    assert len(asked) == 3 and optimizer.silent and all(g is not None for g in optimizer.left)
    assert all(torch.equal(loss, optimizer.first) for loss in optimizer.others)
    assert metrics["loss"] == 4.25  # what the optimizer says that the step's loss is
    assert metrics["grad_norm"] > 0 and optimizer.param_groups[0]["lr"] == 0.25


def test_only_the_last_micro_batch_is_the_last(tmp_path):
    assembly = assemble(toy_job(tmp_path), toy_decoder())
    rows = pack(uneven(), np.arange(12), 32)
    closure, seen = StepLoss(assembly, lambda: rows.batches(range(3), 1)), []
    hook = assembly.parameters[0][1].register_post_accumulate_grad_hook(lambda _: seen.append(closure.last))
    for _ in range(2):
        closure()
    hook.remove()
    assert seen == [False, False, True] * 2


def test_a_failed_step_leaves_no_gradient_and_can_be_tried_again(tmp_path):
    assembly = assemble(toy_job(tmp_path, clip=0.0), toy_decoder())
    rows = pack(uneven(), np.arange(12), 32)
    batches = rows.batches(range(len(rows)), 2)
    accumulate(assembly, batches)
    expected = gradients(assembly)
    assembly.optimizer.zero_grad()

    with pytest.raises(MemoryError):
        accumulate(assembly, BrokenAt(batches, 2))
    assert not gradients(assembly)
    accumulate(assembly, batches)
    close(gradients(assembly), expected)


class BrokenAt(list):
    """Batches of which the second pass, the one that computes, ends in a memory error."""

    def __init__(self, batches, at):
        super().__init__(batches)
        self.at, self.passes = at, 0

    def __iter__(self):
        self.passes += 1
        for index, batch in enumerate(super().__iter__()):
            if self.passes == 2 and index == self.at:
                raise MemoryError
            yield batch


def test_a_step_runs_on_fake_tensors(tmp_path):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        decoder = toy_decoder(torch.bfloat16)
        assembly = assemble(toy_job(tmp_path, dtype="bf16"), decoder)
        rows = pack(uneven(), np.arange(12), 32)
        batches = rows.batches(range(len(rows)), 2)
        for _ in range(2):
            metrics = train_step(assembly, batches, 0.1)
    assert metrics["loss"].shape == () and metrics["grad_norm"].shape == ()


def test_the_adapter_alone_trains_and_learns(tmp_path):
    job = toy_job(tmp_path, steps=30, lr=0.02)
    decoder = toy_decoder()
    frozen = {name: p.clone() for name, p in decoder.named_parameters()}
    dataset = read_dataset(job, CharTokenizer())
    assembly = assemble(job, decoder)
    assert {name.rsplit(".", 1)[1] for name, _ in assembly.parameters} == {"A_RI", "B_OR"}
    steps, total = dataset.train.length(job.batch, job.steps, job.epochs)
    losses = [
        float(train_step(assembly, dataset.train.batches(dataset.train.step_rows(s, 6, 0, total), 6), 0.02)["loss"])
        for s in range(steps)
    ]
    assert losses[-1] < 0.7 * losses[0]
    bases = {name.replace(".base", ""): p for name, p in decoder.named_parameters() if "adapters" not in name}
    assert frozen.keys() == bases.keys() and all(torch.equal(frozen[name], p) for name, p in bases.items())
