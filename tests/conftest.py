"""One thread for the whole suite: tiny models gain nothing from two, and two that spin on a busy machine lose."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
