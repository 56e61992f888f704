"""One thread keeps toy-sized tests fast on shared cores, and their sums in one order."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
