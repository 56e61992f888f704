import pytest
import torch

from satchel.compress.int8 import Int8, Int8Linear
from satchel.core.errors import UserError


def test_storage_is_a_byte_a_weight_and_two_a_scale():
    for group, groups in ((0, 1), (32, 4)):
        state = Int8(group=group).pack(torch.randn(96, 128)).state_dict()
        assert sum(t.nbytes for t in state.values()) == 96 * 128 + 2 * 96 * groups


def test_each_row_is_exact_at_its_largest_weight_and_finer_than_the_matrix():
    weight = torch.randn(4, 64) * torch.tensor([[1e-3], [1.0], [10.0], [1e-6]])
    dense = Int8().pack(weight).dense()
    error, largest = (dense - weight).abs().amax(1), weight.abs().amax(1)
    assert (error <= largest / 253).all()


def test_scales_are_rounded_up_so_that_no_weight_is_clipped():
    packed = Int8Linear(torch.randn(512, 64), 64)
    assert packed.q_OI.abs().max() == 127 or packed.q_OI.abs().max() == 126
    assert packed.q_OI.min() >= -127


def test_negative_group_is_refused():
    with pytest.raises(UserError, match="int8: group=-1"):
        Int8(group=-1)
