"""From a recipe's budget to the bytes or pages a sequence may keep."""

import math
from dataclasses import dataclass

from kvcompress_hf.recipe import Budget
from kvcompress_hf.units import parse_bytes


@dataclass(frozen=True)
class RowGroup:
    """Rows of one sequence that share a page layout.

    Args:
        rows (`int`): Number of rows (layers x KV heads).
        slots_per_page (`int`): Slots of a page.
        page_bytes (`int`): Bytes of a page.
        dense_slot_bytes (`int`): Bytes of one token in one row of a dense cache, keys and values.
        tail_bytes (`int`): Bytes the tail and the tables take for one sequence; they come out of a byte budget.
        window (`int`, *optional*): Sliding window; a dense cache holds no more tokens than this per row.
    """

    rows: int
    slots_per_page: int
    page_bytes: int
    dense_slot_bytes: int
    tail_bytes: int
    window: int | None = None


def allowed_bytes(budget: Budget, groups: list[RowGroup], tokens: int) -> int:
    """The bytes of pages that one sequence may keep.

    A token budget is rounded up to whole pages over all rows together: `ceil(C * rows / b)` pages (KV-Compress,
    max-cache-tokens). Fractions and bytes count everything: pages with their metadata, fields and rounding, and the
    tail, which is set aside.

    Args:
        budget (`Budget`): The recipe's budget.
        groups (`list[RowGroup]`): The rows of the sequence.
        tokens (`int`): Tokens the budget is a fraction of (seen so far, or the prompt's length while it is read).

    Returns:
        `int`: Bytes of pages; at least 0.
    """
    amount = budget.amount
    if isinstance(amount, int):
        return sum(math.ceil(amount * group.rows / group.slots_per_page) * group.page_bytes for group in groups)
    aside = sum(group.tail_bytes for group in groups)
    if isinstance(amount, str):
        return max(0, parse_bytes(amount) - aside)
    dense = sum(
        group.rows * group.dense_slot_bytes * (tokens if group.window is None else min(tokens, group.window))
        for group in groups
    )
    return max(0, int(amount * dense) - aside)
