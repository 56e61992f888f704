import pytest
import torch

from satchel.compress.int4 import Int4
from satchel.core.errors import UserError


@pytest.mark.parametrize("symmetric", [False, True])
def test_storage_is_half_a_byte_a_weight_and_two_bytes_a_number_of_a_group(symmetric):
    state = Int4(group=32, symmetric=symmetric).pack(torch.randn(96, 128)).state_dict()
    assert sum(t.nbytes for t in state.values()) == 96 * 128 // 2 + 96 * 4 * (2 if symmetric else 4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_on_the_grid_are_kept_exactly(symmetric):
    q = torch.randint(1, 16, (8, 64))
    q[:, ::16], q[:, 1::16] = 15, 1 if symmetric else 0
    weight = (q - 8) * 0.125 if symmetric else q * 0.125 - 1.5
    assert torch.equal(Int4(group=16, symmetric=symmetric).pack(weight).dense(), weight)


def test_asymmetric_groups_hold_skewed_weights_better():
    weight = torch.rand(32, 128) + 3
    errors = [(Int4(symmetric=s).pack(weight).dense() - weight).norm() for s in (False, True)]
    assert errors[0] < 0.3 * errors[1]


def test_smaller_groups_are_nearer():
    weight = torch.randn(64, 512)
    errors = [(Int4(group=g).pack(weight).dense() - weight).norm() for g in (16, 64, 256)]
    assert errors == sorted(errors) and errors[0] < 0.85 * errors[2]


def test_odd_group_is_refused():
    with pytest.raises(UserError, match="int4: group=63"):
        Int4(group=63)
