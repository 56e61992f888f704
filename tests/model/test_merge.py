import copy

import pytest
import torch
from torch import nn

from satchel.adapt.dora import Dora
from satchel.adapt.lora import Lora
from satchel.adapt.rslora import RsLora
from satchel.compress.int4 import Int4
from satchel.compress.int8 import Int8
from satchel.compress.nf4 import Nf4
from satchel.core.errors import ModelError, UserError
from satchel.model.adapters import adapted, adapter_parameters, attach
from satchel.model.linear import linears, swap
from satchel.model.merge import merge
from tests.adapt.toys import Toy, stir
from tests.tolerances import TOLERANCE, same


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def tuned(method=None, dtype=torch.float32, bias=True, format=None) -> nn.Module:
    model = Toy(dtype=dtype, bias=bias)
    for path, linear in linears(model).items() if format else ():
        packed = format.pack(linear.weight.detach())
        packed.bias = linear.bias
        swap(model, path, packed)
    attach(model, method or Lora(rank=4), rng())
    stir(adapter_parameters(model))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", [None, Int8(), Nf4(), Int4()], ids=str)
@pytest.mark.parametrize("method", [Lora(rank=4), RsLora(rank=4), Dora(rank=4)], ids=str)
def test_merged_model_computes_what_the_unmerged_did(method, format, dtype):
    model, x = tuned(method, dtype, format=format), torch.randn(16, 64, dtype=dtype)
    before = model(x).detach()  # as it was trained: in inference packed maps may round x
    with torch.no_grad():
        report = merge(model)
        assert (model(x) - before).norm() <= TOLERANCE[dtype] * before.norm()
    assert not list(adapted(model)) and len(report) == 4
    assert all(isinstance(m, nn.Linear) and m.weight.dtype == dtype for m in linears(model).values())
    assert all(0.9 < merged.kept < 1.1 for merged in report)


def test_merging_returns_the_very_modules_that_were_adapted_and_they_train_again():
    model = Toy()
    before = dict(model.named_modules())
    attach(model, Lora(rank=4), rng())
    stir(adapter_parameters(model))
    merge(model)
    assert dict(model.named_modules()) == before and all(p.requires_grad for p in model.parameters())


def test_dropout_does_not_disturb_the_check():
    model = tuned(Lora(rank=4, dropout=0.5)).train()
    merge(model)
    assert model.training


def refused(model: nn.Module, complaint: str) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=complaint):
        merge(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(
        torch.equal(
            before[name],
            after[name],
        )
        or before[name].isnan().any()
        for name in before
    )


def test_layer_whose_change_is_zero_is_refused_by_name():
    model = tuned()
    model.layers[1].up_proj.adapters["default"].B_OR.data.zero_()
    refused(model, "change nothing at layers.1.up_proj: the adapter is zero there")


def test_expert_that_was_never_routed_to_may_stay_as_it_was():
    model = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(2))})
    attach(model, Lora(rank=2), rng())
    model["experts"][0].adapters["default"].B_OR.data.fill_(0.1)
    merge(model)
    attach(model, Lora(rank=2), rng())
    refused(model, "change nothing at experts.0, experts.1")


def test_broken_numbers_are_refused_by_name():
    model = tuned()
    model.layers[1].down_proj.adapters["default"].A_RI.data[0, 0] = float("nan")
    refused(model, "layers.1.down_proj: the merged matrix is not finite")


def test_change_that_rounding_would_swallow_is_refused():
    model = tuned(dtype=torch.bfloat16)
    for name, parameter in adapter_parameters(model):
        parameter.data.mul_(1e-6 if name.endswith("B_OR") else 1)
    for _, place in adapted(model):
        place.base.weight.data.fill_(1)
    refused(model, "layers.0.up_proj: the change is below bfloat16's rounding step; load the model in float32")


def test_delta_that_is_not_what_the_adapter_computes_is_refused():
    model = tuned()
    model.layers[0].down_proj.methods["default"] = Wrong(rank=4)
    refused(model, "layers.0.down_proj: the merged map differs from the unmerged one")


class Wrong(Lora):
    def delta(self, module, base):
        return module.product() * 1.01


def test_adapter_without_a_delta_is_refused():
    model = tuned()
    model.layers[0].down_proj.methods["default"] = Unmergeable(rank=4)
    refused(model, "layers.0.down_proj: .* cannot be merged")


class Unmergeable(Lora):
    def delta(self, module, base):
        return None


def test_matrix_that_another_module_uses_is_refused():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "embed": nn.Embedding(8, 8)})
    model["embed"].weight = model["a"].weight
    attach(model, Lora(rank=2), rng())
    stir(adapter_parameters(model))
    refused(model, "a: the matrix is used elsewhere")


def test_model_without_adapters_is_refused():
    with pytest.raises(UserError, match="no adapter"):
        merge(Toy())


def test_conv1d_merges_into_its_transposed_weight():
    from transformers.pytorch_utils import Conv1D

    model, x = nn.Sequential(Conv1D(6, 4)), torch.randn(3, 4)
    attach(model, Dora(rank=2), rng())
    stir(adapter_parameters(model))
    before = copy.deepcopy(model)(x)
    merge(model)
    assert isinstance(model[0], Conv1D) and same(model(x), before)
