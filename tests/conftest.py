"""What all tests share: one thread keeps toy-sized ones fast, and their sums in one order; signals are heeded."""

import signal

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def heed_signals():
    """A shell that starts the tests in its background, or under nohup, has them and their children ignore these."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
