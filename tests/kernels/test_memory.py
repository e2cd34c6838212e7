"""Page memory is zeroed, writable, and exactly as large as asked for."""

from __future__ import annotations

import pytest
import torch

from kvcompress_hf.kernels import memory


@pytest.mark.parametrize("pages, page_bytes", [(1, 64), (256, 9600), (512, 8192), (3, 5 * 2**20)])
def test_size_and_contents(pages, page_bytes):
    slab = memory.page_memory(pages, page_bytes)
    assert slab.shape == (pages, page_bytes) and slab.dtype == torch.uint8
    assert slab.untyped_storage().nbytes() == pages * page_bytes
    assert slab.data_ptr() % 64 == 0
    assert not slab.any()
    slab.fill_(7)
    assert int(slab[-1, -1]) == 7


def test_without_huge_pages(monkeypatch):
    monkeypatch.setattr(memory, "MADV_HUGEPAGE", None)
    assert memory.page_memory(256, 16384).shape == (256, 16384)
