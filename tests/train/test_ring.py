"""What goes into a ring comes out, whatever its size, and nobody waits for a thread that has given up."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from satchel.train._ring import Ring, Stopped

DTYPES = [torch.uint8, torch.int16, torch.bfloat16, torch.float32, torch.int64]


def tensors(shapes, seed):
    """Random bits of every dtype in turn; every second matrix lies transposed."""
    rng = torch.Generator().manual_seed(seed)
    made = []
    for number, (rows, columns) in enumerate(shapes):
        dtype = DTYPES[number % len(DTYPES)]
        bits = torch.randint(0, 256, (rows, columns * dtype.itemsize), dtype=torch.uint8, generator=rng)
        made.append(bits.view(dtype).T if number % 2 else bits.view(dtype))
    return made


def raw(tensor):
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def through(ring, given):
    """The bytes of some tensors after they have gone through a ring, and the longest piece."""
    thread = threading.Thread(target=lambda: [ring.put(tensor) for tensor in given])
    thread.start()
    pieces = [bytes(piece) for piece in ring.take(sum(tensor.nbytes for tensor in given))]
    thread.join()
    return b"".join(pieces), max(map(len, pieces), default=0)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=9),
    size=st.integers(1, 500),
    seed=st.integers(0, 99),
)
def test_bytes_come_out_as_they_went_in(shapes, size, seed):
    given = tensors(shapes, seed)
    ring = Ring(torch.zeros(size, dtype=torch.uint8))
    for _ in range(2):  # the second time from wherever the first one ended
        out, longest = through(ring, given)
        assert out == b"".join(map(raw, given)) and longest <= size


def test_tensors_larger_than_what_is_read_at_once_keep_their_order():
    given = [torch.arange(70_000).view(2, 35_000).T, torch.arange(40_000, dtype=torch.float32)[::2]]
    assert through(Ring(torch.zeros(1000, dtype=torch.uint8)), given)[0] == b"".join(map(raw, given))


@pytest.mark.parametrize("end", ["put", "take"])
def test_whoever_waits_gives_up_when_the_other_has(end):
    ring, stopped = Ring(torch.zeros(8, dtype=torch.uint8)), threading.Event()

    def wait():
        with pytest.raises(Stopped):
            ring.put(torch.zeros(9, dtype=torch.uint8)) if end == "put" else list(ring.take(1))
        stopped.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not stopped.wait(0.05)
    ring.stop()
    assert stopped.wait(5)
    thread.join()
