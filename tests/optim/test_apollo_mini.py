import pytest
import torch

from satchel.optim.adamw import AdamW
from satchel.optim.apollo_mini import ApolloMini
from tests.optim import common
from tests.optim.test_apollo import check_every_step_equals

apollo_torch = pytest.importorskip("apollo_torch.apollo")


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_every_step_equals_apollo_torch_on_matrices_and_adamw_elsewhere(weight_decay, monkeypatch):
    check_every_step_equals(apollo_torch, ApolloMini(weight_decay=weight_decay), "tensor", monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_identical(dtype):
    common.check_resume_is_bit_identical(ApolloMini(gap=4), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_give_the_same_state(dtype):
    common.check_fake_tensors_give_the_same_state(ApolloMini(gap=4), dtype)


def test_a_hundredth_of_adamws_state_on_projected_layers():
    shapes, size = {"mlp.up.weight": (512, 384)}, {}
    for method in (ApolloMini(), AdamW()):
        named = common.parameters(shapes=shapes)
        optimizer = method.build(named, common.LR, 0)
        common.run(optimizer, named, range(1))
        size[method.name] = common.state_bytes(optimizer)
    assert size["apollo_mini"] <= 0.01 * size["adamw"]


def test_one_scale_moves_a_matrix_along_its_gradient():
    named = common.parameters(shapes={"mlp.up.weight": (64, 48)})
    before = named[0][1].detach().clone()
    common.run(ApolloMini().build(named, common.LR, 0), named, range(1))
    moved, gradient = (named[0][1].detach() - before).view(-1), named[0][1].grad.view(-1)
    assert torch.nn.functional.cosine_similarity(moved, gradient, dim=0).item() == pytest.approx(-1, abs=1e-4)
