"""Saving while the loop waits: all is written when `save` returns, and nothing is kept."""

import torch
from safetensors.torch import load

from satchel.model.safetensors_io import Outgoing, header
from satchel.train.blocking import Blocking


def test_a_file_is_what_safetensors_reads_and_is_whole_when_save_returns():
    named = {"a": torch.randn(3, 5), "b": torch.randn(4, 2).bfloat16().T, "c": torch.tensor(7)}
    saver, files = Blocking().start(torch.device("cpu")), {}
    saver.save({"x": named}, lambda streams: files.update({name: b"".join(s) for name, s in streams.items()}))
    head = header([Outgoing(name, tuple(t.shape), t.dtype, t.detach) for name, t in named.items()])
    read = load(head + files["x"])
    assert read.keys() == named.keys() and all(torch.equal(read[name], named[name]) for name in named)
    saver.settle()
    saver.finish()
    assert not saver.buffers()
