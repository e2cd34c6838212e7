"""What a cache file looks like: known to who writes it and to who reads it."""

import torch

__all__ = ["BLOCK", "FORMAT", "FORMAT_VERSIONS", "ORDERS", "live_entries", "most_capacity"]

FORMAT = "kvcompress_hf.cache"
# 2: a store says whether its values are rotated; in files of 1 none are. 3: means of evicted slots may be there.
FORMAT_VERSIONS = (1, 2, 3)
ORDERS = ("canonical", "cpu")  # inner orders of pages that may be in a file
BLOCK = 8 * 2**20  # bytes of pages worked on at a time


def live_entries(lengths: torch.Tensor, slots: int, columns: int) -> torch.Tensor:
    """Which entries of a table have a page behind them.

    Args:
        lengths (`torch.Tensor`): Slots of each row, `int32` `[rows]`.
        slots (`int`): Slots of a page.
        columns (`int`): Width of the table.

    Returns:
        `torch.Tensor`: `bool` `[rows, columns]`, true where an entry has a page behind it.
    """
    pages = (lengths - 1) // slots + 1  # of 0 slots none; and no sum that 32 bits do not hold
    return torch.arange(columns, device=lengths.device) < pages[:, None]


def most_capacity(used: int, every: int) -> int:
    """Most tokens that a file may say a tail has room for.

    Args:
        used (`int`): Tokens in it.
        every (`int`): Tokens that gather before the tail is packed.

    Returns:
        `int`: The most tokens that the tail may have room for.
    """
    return max(every, 2 * (used + 1))
