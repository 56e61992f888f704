"""What trains, and with what learning rate, follows from the job alone."""

import pytest
import torch

from satchel.core.book import make
from satchel.core.errors import UserError
from satchel.run.assemble import assemble
from tests.run.toys import toy_decoder, toy_job


def test_without_an_adapter_every_weight_trains_at_the_lower_rate(tmp_path):
    decoder = toy_decoder()
    assembly = assemble(toy_job(tmp_path, adapter="none", lr=0.0), decoder)
    assert assembly.lr == 1e-4 and assembly.adapter is None
    assert [id(p) for _, p in assembly.parameters] == [id(p) for p in decoder.parameters()]


def test_with_an_adapter_only_it_trains_and_its_start_follows_the_seed(tmp_path):
    def start(seed):
        return assemble(toy_job(tmp_path, lr=0.0, seed=seed), toy_decoder())

    assembly = start(0)
    assert assembly.lr == 1e-3
    assert all("adapters" in name for name, _ in assembly.parameters)
    assert sum(p.requires_grad for p in assembly.model.parameters()) == len(assembly.parameters)
    first, same, other = (torch.cat([p.flatten() for _, p in start(seed).parameters]) for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("adapter", ["none", "lora:rank=4"])
def test_a_job_without_a_learning_rate_takes_its_optimizers(tmp_path, adapter):
    job = toy_job(tmp_path, lr=0.0, adapter=adapter, optimizer="mezo")
    usual = make("optimizer", "mezo").usual_lr(1e-4, adapted=adapter != "none")
    assembly = assemble(job, toy_decoder())
    assert assembly.lr == usual == assembly.optimizer.param_groups[0]["lr"]
    assert assemble(job.replace(lr=0.5), toy_decoder()).lr == 0.5


def test_the_activations_policy_reaches_the_blocks_and_changes_no_gradient(tmp_path):
    from satchel.run.packing import pack
    from tests.run.test_step import accumulate, gradients, uneven

    rows = pack(uneven(), range(12), 32)
    found = []
    for policy in ("none", "full"):
        assembly = assemble(toy_job(tmp_path, activations=policy), toy_decoder())
        accumulate(assembly, rows.batches(range(len(rows)), 4))
        found.append(gradients(assembly))
    assert assembly.model.activations is not None
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_context_beyond_the_models_names_the_longest(tmp_path):
    with pytest.raises(UserError, match="context=1024 is longer than the model was made for; set context=512"):
        assemble(toy_job(tmp_path, context=1024), toy_decoder())
