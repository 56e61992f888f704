"""The mask holds in the sparse phase and is gone in the dense one; only what is kept takes gradients and state."""

import pytest
import torch
from torch.nn import functional
from torch.utils._pytree import tree_iter

from satchel.core.errors import UserError
from satchel.core.job import PretrainJob
from satchel.model.config import ModelConfig
from satchel.model.linear import linears
from satchel.model.load import draw, load
from satchel.model.save import save
from satchel.run.assemble import assemble
from satchel.run.step import train_step
from satchel.train.spdf import SPDF, MaskedLinear
from tests.tolerances import TOLERANCE, same
from tests.train.toys import toy_batch

JOB = PretrainJob(model="toy", data=("toy",), dtype="fp32", context=64, lr=0.01, schedule="constant:warmup=0")
SIZES = {"model_type": "llama", "vocab_size": 132, "hidden_size": 64, "intermediate_size": 96, "rms_norm_eps": 1e-5}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def toy(tied=True):
    """Random weights, the same each time."""
    return draw(ModelConfig.from_hf(SIZES | {"tie_word_embeddings": tied}), torch.float32, "cpu", 7)


def trained(surgery, steps=3, decoder=None, **changes):
    """A toy after some steps."""
    assembly = assemble(JOB.replace(surgery=surgery, **changes), decoder or toy())
    for _ in range(steps):
        train_step(assembly, [toy_batch()], assembly.lr)
    return assembly


def state_bytes(assembly, names):
    held = {name: assembly.optimizer.state[p] for name, p in assembly.parameters if names in name}
    return sum(t.nbytes for t in tree_iter(held) if isinstance(t, torch.Tensor) and t.ndim)


def maps(model):
    return list(linears(model).values())


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_masked_weights_stay_zero_in_the_sparse_phase_and_learn_in_the_dense_one(tmp_path, sparsity):
    first = trained(f"spdf:sparsity={sparsity}")
    zeros = [m.dense() == 0 for m in maps(first.model)]
    assert all(isinstance(m, MaskedLinear) for m in maps(first.model))
    assert all(z.float().mean() == pytest.approx(sparsity, abs=1 / z.numel()) for z in zeros)
    untouched = trained(f"spdf:sparsity={sparsity}", steps=0)
    assert all(torch.equal(z, m.dense() == 0) for z, m in zip(zeros, maps(untouched.model), strict=True))
    again = load(str(save(first.model, tmp_path / "sparse")), torch.float32)
    assert all(torch.equal(m.weight, n.dense()) for m, n in zip(maps(again), maps(first.model), strict=True))
    dense = trained("none", decoder=again)
    assert all((m.weight[z] != 0).any() for m, z in zip(maps(dense.model), zeros, strict=True))


def test_the_mask_of_zeros_goes_on_with_the_same_weights(tmp_path):
    first = trained("spdf:sparsity=0.75")
    zeros = [m.dense() == 0 for m in maps(first.model)]
    again = load(str(save(first.model, tmp_path / "sparse")), torch.float32)
    second = trained("spdf:sparsity=0.75,mask=zeros", decoder=again)
    assert all(torch.equal(z, m.dense() == 0) for z, m in zip(zeros, maps(second.model), strict=True))
    assert not torch.equal(maps(first.model)[0].dense(), maps(second.model)[0].dense())


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_optimizer_state_is_the_kept_share_of_the_dense_ones(sparsity):
    sparse, dense = trained(f"spdf:sparsity={sparsity}", steps=1), trained("none", steps=1)
    assert state_bytes(sparse, "_proj") == pytest.approx((1 - sparsity) * state_bytes(dense, "_proj"), rel=0.02)
    assert state_bytes(sparse, "norm") == state_bytes(dense, "norm")


def test_values_and_gradients_are_those_of_a_masked_matrix():
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 16, dtype=torch.float64)
    masked = torch.nn.Sequential(torch.nn.Linear(24, 16, dtype=torch.float64))
    masked.load_state_dict({"0.weight": linear.weight, "0.bias": linear.bias})
    SPDF(sparsity=0.6).operate(masked, torch.Generator().manual_seed(1))
    mask_OI = masked[0].dense() != 0
    x_NI = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    theirs = functional.linear(x_NI, linear.weight * mask_OI, linear.bias)
    assert same(masked(x_NI), theirs)
    dy = torch.randn_like(theirs)
    dx, dweight, dbias = torch.autograd.grad(theirs, (x_NI, linear.weight, linear.bias), dy)
    ours = torch.autograd.grad(masked(x_NI), (x_NI, masked[0].values_P, masked[0].bias), dy)
    for mine, expected in zip(ours, (dx, dweight[mask_OI], dbias), strict=True):
        torch.testing.assert_close(mine, expected, rtol=TOLERANCE[torch.float64], atol=TOLERANCE[torch.float64])


def test_with_nothing_left_out_it_is_the_plain_job():
    plain, whole = (trained(surgery, optimizer="adamw:weight_decay=0") for surgery in ("none", "spdf:sparsity=0"))
    for ours, theirs in zip(maps(whole.model), maps(plain.model), strict=True):
        assert same(ours.dense(), theirs.weight.detach())


def test_embeddings_norms_and_head_stay_dense():
    names = {name for name, _ in trained("spdf:sparsity=0.5", steps=0, decoder=toy(tied=False)).parameters}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < names
    assert not [name for name in names if "_proj.weight" in name]


def test_a_seed_draws_the_mask_and_another_seed_another():
    masks = [trained("spdf:sparsity=0.5", steps=0, seed=seed).model.state_dict() for seed in (0, 0, 1)]
    name = "model.layers.0.mlp.up_proj.index_P"
    assert torch.equal(masks[0][name], masks[1][name]) and not torch.equal(masks[0][name], masks[2][name])
    assert not torch.equal(masks[0][name], masks[0][name.replace("up", "gate")])


def test_under_an_adapter_it_is_refused():
    with pytest.raises(UserError, match="leave one of them out"):
        JOB.replace(surgery="spdf", adapter="lora")
