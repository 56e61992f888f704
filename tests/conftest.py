"""What all tests share: one thread keeps toy-sized ones fast, and their sums in one order; ctrl-C is heeded."""

import signal

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def heed_ctrl_c():
    """A shell that starts the tests in its background has them ignore SIGINT, and what they start as well."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
