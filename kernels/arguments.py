"""Fills the argument structs of `include/abi.h` from tensors, for the backends that take them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import abi
from .layout import POSITION, PageLayout
from .types import Logits, Rows, Tail

__all__ = ["fill_logits", "fill_rows", "fill_strides", "fill_tail", "pointer"]


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor's first element; `None` for none."""
    return None if tensor is None else tensor.data_ptr()


def fill_rows(operation: ctypes.Structure, rows: Rows) -> None:
    """Sets everything in the `KvcRows` of an operation's struct."""
    c: abi.KvcRows = operation.rows
    c.layout = ctypes.addressof(rows.layout.c)
    c.slabs = rows.slab_addresses.data_ptr()
    c.slab_shift = rows.slab_shift
    c.rows = rows.count
    for tier, (table, length) in enumerate(zip(rows.tables, rows.lengths, strict=True)):
        c.table[tier] = table.data_ptr()
        c.table_stride[tier] = table.stride(0)
        c.length[tier] = length.data_ptr()
    pages = rows.slab_pages
    if pages is None:
        pages = torch.tensor([slab.shape[0] for slab in rows.slabs], dtype=torch.int32)
    c.slab_pages, c.n_slabs = pages.data_ptr(), pages.shape[0]
    c.key_feedback = pointer(rows.key_feedback)
    c.evicted_means, c.evicted_counts = pointer(rows.evicted_means), pointer(rows.evicted_counts)
    operation.slab_pages = pages  # type: ignore[attr-defined]  # lives as long as the struct that points to it


def fill_tail(c: abi.KvcTail, tail: Tail | None) -> None:
    """Sets everything in a `KvcTail`; without a tail it stays all zero."""
    if tail is None:
        return
    c.k, c.v = tail.k.data_ptr(), tail.v.data_ptr()
    c.length, c.position = tail.lengths.data_ptr(), tail.positions.data_ptr()
    c.fields = pointer(tail.fields)
    c.capacity = tail.capacity


def fill_strides(c: ctypes.Structure, name: str, tensor: Tensor) -> None:
    """Sets `<name>_b`, `<name>_h` and `<name>_t` of a `[batch, heads, tokens, head_dim]` tensor."""
    b, h, t, _ = tensor.stride()
    setattr(c, f"{name}_b", b)
    setattr(c, f"{name}_h", h)
    setattr(c, f"{name}_t", t)


def fill_logits(c: ctypes.Structure, logits: Logits, layout: PageLayout, exclude: int = 0) -> None:
    """Sets how logits are made, in the struct of an operation that attends; the struct then points to the sinks.

    Args:
        c: The struct.
        logits: How logits are made.
        layout: Layout of the pages; its field with positions is only named where something depends on them.
        exclude: Distance from which on a query counts for a key (`Backend.window_scores`).
    """
    c.scale, c.softcap, c.window = logits.scale, logits.softcap or 0.0, logits.window or 0
    needed = logits.window is not None or exclude > 0
    c.position_field = layout.fields.index(POSITION) if needed and POSITION in layout.fields else -1
    c.sinks = pointer(logits.sinks)
