import pytest
import torch

from satchel.core.errors import UserError
from satchel.train.full import Full
from satchel.train.selective import Selective
from tests.train.common import gradients, saved_bytes
from tests.train.toys import toy_batch, toy_decoder


@pytest.mark.parametrize("keep", [0.0, 0.25, 0.5, 1.0])
def test_gradients_are_bit_identical_to_keeping_everything(keep):
    decoder, batch = toy_decoder(), toy_batch()
    for ours, plain in zip(
        gradients(decoder, Selective(keep=keep), batch), gradients(decoder, None, batch), strict=True
    ):
        assert torch.equal(ours, plain)


def test_bytes_rise_with_the_dial_from_full_to_everything():
    decoder = toy_decoder()
    sizes = [saved_bytes(decoder, Selective(keep=keep)) for keep in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 5
    assert (sizes[0], sizes[-1]) == (saved_bytes(decoder, Full()), saved_bytes(decoder, None))


@pytest.mark.parametrize("depth", [1, 5, 30])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.7, 1.0])
def test_the_share_of_kept_blocks_is_as_asked(depth, keep):
    block = torch.nn.Identity()
    kept = [Selective(keep=keep).wrap(block, index, depth) is block for index in range(depth)]
    assert abs(sum(kept) - keep * depth) < 1


def test_a_share_out_of_range_is_refused():
    with pytest.raises(UserError, match="is outside"):
        Selective(keep=1.5)
