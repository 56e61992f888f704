"""One optimizer step is one large batch, however it is cut into pieces and packed into rows."""

import copy
import math

import numpy as np
import pytest
import torch

from satchel.run.assemble import assemble
from satchel.run.data import Corpus, read_dataset
from satchel.run.packing import pack
from satchel.run.step import accumulate, clip_gradients, mean_loss, train_step
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


def test_clipping_scales_all_gradients_to_the_limit():
    parameters = [torch.nn.Parameter(torch.zeros(50)), torch.nn.Parameter(torch.zeros(3, 4))]
    ours, theirs = copy.deepcopy(parameters), copy.deepcopy(parameters)
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        q.grad = p.grad.clone()
    norm, expected = clip_gradients(ours, 0.5), torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    assert math.isclose(norm, expected, rel_tol=EXACT)
    assert all(torch.allclose(p.grad, q.grad, rtol=EXACT) for p, q in zip(ours, theirs, strict=True))
    before = ours[0].grad.clone()
    assert math.isclose(clip_gradients(ours, 0.0), 0.5, rel_tol=1e-4) and torch.equal(before, ours[0].grad)


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
