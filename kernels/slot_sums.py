"""Sums over chosen slots of every row in plain torch: the reference, and what devices without an own kernel run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .types import Rows

_BYTES = 1 << 28  # of keys and values that are read at a time


def slot_sums(
    rows: Rows, tier: int, chosen: Tensor, read_slots: Callable[[Rows, int, int], tuple[Tensor, Tensor]]
) -> Tensor:
    """As `Backend.slot_sums` says, some rows at a time.

    Args:
        rows: The rows.
        tier: The tier.
        chosen: bool `[rows, width]`.
        read_slots: Reads the slots of rows in a tier (`Backend.read_slots`).

    Returns:
        float32 `[rows, 2, head_dim]`.
    """
    count, width = chosen.shape
    sums = torch.zeros(count, 2, rows.layout.head_dim, device=chosen.device)
    filled = torch.arange(width, device=chosen.device) < rows.lengths[tier][:, None]
    weight = (chosen & filled).float()[:, None]
    step = max(1, _BYTES // (8 * max(1, width) * rows.layout.head_dim))
    for first in range(0, count, step) if width else ():
        part = slice(first, first + step)
        tables, lengths = ([each[part] for each in tensors] for tensors in (rows.tables, rows.lengths))
        some = Rows(rows.layout, rows.slabs, rows.slab_addresses, rows.slab_shift, tables, lengths)
        sums[part] = torch.cat([weight[part] @ states for states in read_slots(some, tier, width)], dim=1)
    return sums
