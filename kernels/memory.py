"""Memory for pages, in huge OS pages where the system has them.

Decode attention reads cache pages in no particular order. With OS pages of 4 KiB every few hundred tokens cost a
dozen address translations, which made it 20 to 35 % slower out of main memory (Zen 4, Linux 6.18).
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

__all__ = ["page_memory"]

HUGE_PAGE = 2 * 2**20
MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only


def page_memory(pages: int, page_bytes: int) -> Tensor:
    """Allocates zeroed pages on the CPU.

    The operating system is asked for huge pages for every whole 2 MiB; that it may refuse changes nothing but speed.
    The memory goes back to the system with the tensor.

    Args:
        pages: Number of pages.
        page_bytes: Bytes of a page.

    Returns:
        uint8 `[pages, page_bytes]`, its storage exactly that large.
    """
    size = pages * page_bytes
    if MADV_HUGEPAGE is None or size < HUGE_PAGE:
        return torch.zeros(pages, page_bytes, dtype=torch.uint8)
    # Only lengths that are multiples of a huge page are aligned to one by the kernel; what is not touched of the
    # rounded-up length takes no memory.
    length = -(-size // HUGE_PAGE) * HUGE_PAGE
    try:
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(MADV_HUGEPAGE, 0, size // HUGE_PAGE * HUGE_PAGE)
    except OSError:
        return torch.zeros(pages, page_bytes, dtype=torch.uint8)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size).view(pages, page_bytes)
