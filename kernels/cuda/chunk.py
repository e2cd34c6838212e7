"""Starts the tensor-core kernels of `chunk.cu` and `scores.cu`: which shapes they take, tiles, memory they need."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import abi
from ..layout import PageLayout
from ..types import Rows
from .launch import Launcher
from .nvrtc import CHUNK_ROWS

__all__ = ["KvcPartials", "aligned", "launch_chunk", "launch_scores", "takes_chunks"]

THREADS = 128
SCORED_SLOTS = 64  # of a thread block of kvc_scores


class KvcPartials(ctypes.Structure):
    """Mirror of `KvcPartials` in `parameters.h`."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("partial", "partial_max", "partial_sum", "arrived")]


def takes_chunks(layout: PageLayout) -> bool:
    """Whether `chunk.cu` and `scores.cu` take a layout; `attention.cu` takes every one."""
    return layout.head_dim in CHUNK_ROWS and layout.dtype in (torch.float16, torch.bfloat16)


def aligned(x: Tensor) -> Tensor:
    """Queries, keys or values `[batch, heads, tokens, head_dim]` to be loaded 16 bytes at a time: `x`, or a copy."""
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    if x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _name(kernel: str, layout: PageLayout) -> str:
    return f"kvc_{kernel}_{'f16' if layout.dtype is torch.float16 else 'bf16'}"


def launch_chunk(
    launcher: Launcher, c: abi.KvcChunk, rows: Rows, device: torch.device, key_valid: Tensor | None
) -> None:
    """Starts chunk attention, or its log-sum-exp alone where `c.out` is null.

    Args:
        launcher: Where kernels run.
        c: The arguments.
        rows: The packed slots.
        device: Where everything is.
        key_valid: bool `[batch, n_k]`, contiguous: new keys that are seen; `None` = all.
    """
    layout, queries = rows.layout, c.n_q * c.group
    if not c.batch * c.kv_heads * queries:
        return
    choices = CHUNK_ROWS[layout.head_dim]
    tile_rows = next((n for n in choices if n >= queries), choices[-1])
    slots = 32 if layout.head_dim > 128 else 64
    items = c.batch * c.kv_heads * -(-queries // tile_rows)
    # Lengths are on the device: as many blocks as there can be work for, or as fit.
    room = [table.shape[1] * tier.slots for table, tier in zip(rows.tables, layout.tiers, strict=True)]
    tiles = items * max(1, sum(-(-n // slots) for n in (*room, c.tail.capacity, c.n_k)))
    kernel = _name(f"chunk_{layout.head_dim}_{tile_rows}", layout)
    blocks = min(launcher.resident(kernel, THREADS, device), tiles)
    # Every block shares at most its first and its last query tile with others.
    sums = 2 * blocks * tile_rows
    partial = torch.empty(sums, 2 + (layout.head_dim if c.out else 0), device=device)
    arrived = torch.zeros(items, dtype=torch.int32, device=device)
    at = partial.data_ptr()
    w = KvcPartials(at + 8 * sums, at, at + 4 * sums, arrived.data_ptr())
    valid = ctypes.c_void_p(None if key_valid is None else key_valid.data_ptr())
    launcher.launch(kernel, blocks, THREADS, (layout.c, c, valid, w), device)


def launch_scores(
    launcher: Launcher,
    c: abi.KvcScores,
    layout: PageLayout,
    widths: Sequence[int],
    device: torch.device,
    lse: Tensor,
) -> None:
    """Starts the sums over the queries, given their log-sum-exp.

    Args:
        launcher: Where kernels run.
        c: The arguments; what they point to is zero.
        layout: Layout of the pages.
        widths: Slots of the longest row: of each tier, of the tail, and the new tokens.
        device: Where everything is.
        lse: `[batch, q_heads, n_q]`.
    """
    tiles = sum(-(-width // SCORED_SLOTS) for width in widths)
    blocks = c.batch * c.kv_heads * tiles if c.n_q else 0
    arguments = (layout.c, c, ctypes.c_void_p(lse.data_ptr()), ctypes.c_int32(tiles))
    launcher.launch(_name(f"scores_{layout.head_dim}", layout), blocks, THREADS, arguments, device)
