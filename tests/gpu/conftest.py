"""Tests on a real GPU; skipped with a reason where there is none that the kernels run on."""

from __future__ import annotations

import pytest
import torch

from kvcompress_hf.kernels import get_backend
from kvcompress_hf.kernels.cuda import CudaBackend


@pytest.fixture(scope="session")
def gpu() -> CudaBackend:
    """The CUDA backend of device 0."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    backend = get_backend(torch.device("cuda", 0))
    if not isinstance(backend, CudaBackend):
        pytest.skip(backend.reason)
    return backend
