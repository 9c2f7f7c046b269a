"""One thread a test process: the tensors are small, and threads would only fight."""

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Also after a test of a benchmark, which sets its own number."""
    yield
    torch.set_num_threads(1)
