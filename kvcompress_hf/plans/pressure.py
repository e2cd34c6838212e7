"""When memory runs out: the same plan under a smaller allowance."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from kvcompress_hf.plans.base import EVICT, PlanView


def under_pressure(views: Sequence[PlanView], freeing: int) -> list[PlanView]:
    """Lowers what sequences may hold until a number of bytes comes free; those that hold the most give the most.

    Args:
        views (`Sequence[PlanView]`): Every slot of the batch, in one view or in several.
        freeing (`int`): Bytes of pages that must come free over all sequences.

    Returns:
        `list[PlanView]`: The views with smaller allowances, in bytes and in slots per row.
    """
    held = [view.bytes_of(torch.where(view.filled, view.tier, EVICT)) for view in views]
    every = torch.cat(held)
    level = _water_level(every.tolist(), max(0, int(every.sum()) - freeing))
    return [_lowered(view, torch.full_like(mine, level)) for view, mine in zip(views, held, strict=True)]


def _lowered(view: PlanView, allowed: torch.Tensor) -> PlanView:
    if view.allowed_bytes is not None:
        allowed = torch.minimum(allowed, view.allowed_bytes)
    share = (allowed[:, None] // view.page_bytes.numel() // view.page_bytes) * view.slots_per_page[:, 0]
    if view.allowed_slots is not None:
        share = torch.minimum(share, view.allowed_slots)
    return replace(view, allowed_bytes=allowed, allowed_slots=share, counts_slots=False, room=None)


def _water_level(held: list[int], room: int) -> int:
    """The most that every sequence may hold so that all together fit."""
    for i, most in enumerate(sorted(held)):
        level = room // (len(held) - i)
        if level <= most:
            return level
        room -= most
    return max(held, default=0)
