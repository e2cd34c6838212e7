"""What a cache file looks like: known to who writes it and to who reads it."""

import torch

from kvcompress_hf.kernels import PageLayout
from kvcompress_hf.paging.store import Geometry

__all__ = ["BLOCK", "FORMAT", "FORMAT_VERSION", "ORDERS", "live_entries", "most_capacity", "tail_shapes"]

FORMAT = "kvcompress_hf.cache"
FORMAT_VERSION = 1
ORDERS = ("canonical", "cpu")  # inner orders of pages that may be in a file
BLOCK = 8 * 2**20  # bytes of pages worked on at a time


def live_entries(lengths: torch.Tensor, slots: int, columns: int) -> torch.Tensor:
    """Which entries of a table have a page behind them.

    Args:
        lengths (`torch.Tensor`): Slots of each row, `int32` `[rows]`.
        slots (`int`): Slots of a page.
        columns (`int`): Width of the table.

    Returns:
        `torch.Tensor`: `bool` `[rows, columns]`.
    """
    pages = (lengths - 1) // slots + 1  # of 0 slots none; and no sum that 32 bits do not hold
    return torch.arange(columns, device=lengths.device) < pages[:, None]


def tail_shapes(
    geometry: Geometry, layout: PageLayout, layers: int, batch: int, used: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of a tail in a file.

    Args:
        geometry (`Geometry`): Shape and dtype of keys and values.
        layout (`PageLayout`): Which fields a slot has.
        layers (`int`): Layers of the store.
        batch (`int`): Sequences.
        used (`int`): Tokens that the tail counts, padding included; a row with fewer slots has zeros behind them.

    Returns:
        `dict[str, tuple[torch.dtype, tuple[int, ...]]]`: Dtype and shape by name.
    """
    heads, dim, fields = geometry.kv_heads, geometry.head_dim, len(layout.fields)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "tail_keys": (geometry.dtype, (layers, batch, heads, used, dim)),
        "tail_values": (geometry.dtype, (layers, batch, heads, used, dim)),
        "tail_positions": (torch.int32, (layers, batch, used)),
    }
    if fields:
        shapes["tail_fields"] = (torch.int32, (layers, fields, batch, heads, used))
    return shapes


def most_capacity(used: int, every: int) -> int:
    """Most tokens that a file may say a tail has room for.

    Args:
        used (`int`): Tokens in it.
        every (`int`): Tokens that gather before the tail is packed.

    Returns:
        `int`: Tokens.
    """
    return max(every, 2 * (used + 1))
