import torch

from satchel.serve.recompute import Recompute


def test_nothing_is_kept():
    shelf = Recompute().start(torch.zeros(2, 3))
    shelf.keep(b"a", 0)
    assert not shelf.has(b"a") and shelf.fetch([(b"a", 1)]).wait() == 0
    assert shelf.moved_out == shelf.moved_in == 0
