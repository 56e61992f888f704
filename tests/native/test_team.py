"""The threads that operators share: one crew a process, asleep between calls, and no matter for the results."""

import os
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from satchel.native import linear, rms_norm
from satchel.native.build import compiler
from satchel.native.linear import example, kernel, matrix

pytestmark = pytest.mark.skipif(
    compiler() is None or not Path("/proc/self/task").exists(), reason="needs a C++ compiler and Linux"
)
OUTPUTS, INPUTS = 512, 1024
TILES = example("Q8_0", OUTPUTS, INPUTS, torch.Generator().manual_seed(0))
WEIGHT = matrix(TILES, None, "Q8_0", OUTPUTS, INPUTS)
X_NI = torch.randn(4, INPUTS, generator=torch.Generator().manual_seed(0))
LARGE_ND = torch.randn(2000, 1024)  # one thread does not take it all


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def product() -> torch.Tensor:
    y_NO = torch.empty(len(X_NI), OUTPUTS)
    kernel().linear(WEIGHT, X_NI, y_NO)
    return y_NO


def norm() -> torch.Tensor:
    return rms_norm(LARGE_ND, torch.ones(1024))


def running() -> int:
    return len(os.listdir("/proc/self/task"))


def test_results_do_not_depend_on_the_number_of_threads(threads):
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        found.append((product(), norm()))
    assert all(torch.equal(y, found[0][0]) and torch.equal(n, found[0][1]) for y, n in found)


def test_operators_of_all_libraries_share_their_threads_and_keep_them(threads):
    threads(4)
    product()
    held = running()
    for _ in range(50):
        product()
        norm()
    assert running() == held


def test_threads_sleep_between_calls(threads):
    threads(4)
    product()
    time.sleep(0.05)
    before = psutil.Process().cpu_times()
    time.sleep(0.3)
    after = psutil.Process().cpu_times()
    assert after.user + after.system - before.user - before.system < 0.1


def test_callers_from_many_threads_get_their_own_results(threads):
    threads(3)
    expected, wrong = product(), []

    def call():
        wrong.extend(1 for _ in range(200) if not torch.equal(product(), expected))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_child_of_a_fork_has_threads_of_its_own(threads):
    threads(3)
    expected = product()
    child = os.fork()
    if child == 0:  # nothing of pytest may run here
        right = torch.equal(product(), expected) and running() == 3
        os._exit(0 if right else 1)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child waits for threads that it does not have")
    assert status == 0


def test_a_level_that_was_compiled_apart_shares_them_too(threads):
    threads(2)
    kernels = [kernel(level) for level in linear.levels.supported()]
    product()
    held = running()
    for each in kernels:
        each.linear(WEIGHT, X_NI, torch.empty(len(X_NI), OUTPUTS))
    assert running() == held
