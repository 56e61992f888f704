"""What an operator takes beside its result, where the library inside of torch allocates it unseen."""

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from satchel.run.memory import install_pool
from satchel.run.tracker import Tracker

OPERATORS = {
    "a wider operand": lambda b, f: b * f,
    "a wider operand that is broadcast": lambda b, f: b * f[:, :1],
    "a result that is narrower": lambda b, f: b.mul_(f),
    "a narrower operand": lambda b, f: f.add_(b),
    "two narrower operands": lambda b, f: torch.addcmul(f, b, b),
    "a number": lambda b, f: b * torch.tensor(2.0),
    "one type": lambda b, f: f.mul_(f),
    "a copy": lambda b, f: f.copy_(b),
}


@pytest.mark.skipif(install_pool() is None, reason="no page pool")
@pytest.mark.parametrize("name", OPERATORS)
def test_operands_of_two_types_take_what_the_pool_measures(name):
    pool, operator = install_pool(), OPERATORS[name]
    real = torch.ones(700, 900).bfloat16(), torch.ones(700, 900)
    gc.collect()  # what an earlier test left is not let go in between
    pool.reset_peak()
    before = pool.peak_bytes
    results = [operator(*real)]  # alive until the end
    measured = pool.peak_bytes - before
    with FakeTensorMode():
        fake = torch.empty(700, 900, dtype=torch.bfloat16), torch.empty(700, 900)
        with Tracker() as tracker:
            tracker.label(fake, "weights")
            results.append(operator(*fake))
            tracker.mark("end")
    sums, total = [0], 0
    for number, size in tracker.segments[0].events:
        total += size if number not in tracker.labels else 0
        sums.append(total)
    assert max(sums) == pytest.approx(measured, abs=1 << 14)
