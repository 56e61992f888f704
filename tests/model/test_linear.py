import pytest
import torch
from torch import nn

from satchel.core.errors import ModelError, UnknownName
from satchel.model.adapters import Adapted
from satchel.model.linear import dense_OI, features, linears, swap
from tests.adapt.toys import Toy, tiny_llama
from tests.tolerances import same


def test_default_maps_are_all_but_head_and_router():
    names = ("up_proj", "down_proj")
    assert list(linears(Toy())) == [f"layers.{i}.{name}" for i in range(2) for name in names]


def test_default_maps_of_a_hugging_face_model_are_its_blocks():
    found = linears(tiny_llama())
    assert len(found) == 14 and "lm_head" not in found and "model.layers.1.mlp.down_proj" in found


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (("up_proj",), ["layers.0.up_proj", "layers.1.up_proj"]),
        (("layers.1.*_proj",), ["layers.1.up_proj", "layers.1.down_proj"]),
        (("layers.0.up_proj", "lm_head"), ["layers.0.up_proj", "lm_head"]),
        (("gate",), ["layers.0.gate", "layers.1.gate"]),
    ],
)
def test_targets_name_paths_their_ends_or_shell_patterns(targets, found):
    assert list(linears(Toy(), targets)) == found


def test_target_that_matches_nothing_is_an_error_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'down_proj'"):
        linears(Toy(), ("up_proj", "down_prj"))


def test_conv1d_of_transformers_is_a_map_whose_matrix_is_transposed():
    from transformers.pytorch_utils import Conv1D

    conv, x = Conv1D(6, 4), torch.randn(3, 4)
    assert features(conv) == (4, 6)
    assert same(x @ dense_OI(conv).T + conv.bias, conv(x))
    assert list(linears(nn.Sequential(conv))) == ["0"]


def test_adapted_map_is_found_once_and_keeps_its_shape_and_matrix():
    model = Toy()
    base = model.layers[0].up_proj
    assert swap(model, "layers.0.up_proj", Adapted(base)) is base
    place = linears(model, ("up_proj",))["layers.0.up_proj"]
    assert isinstance(place, Adapted) and features(place) == (64, 128)
    assert torch.equal(dense_OI(place), base.weight)
    assert not hasattr(place, "weight")


def test_other_modules_are_no_maps():
    with pytest.raises(ModelError, match="LayerNorm is no linear map"):
        dense_OI(nn.LayerNorm(3))
