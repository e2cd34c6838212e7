"""What the operations on pages work on: rows of packed slots, and the tail; and how they make logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import PageLayout

__all__ = ["Logits", "Rows", "Tail"]


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """How an attention layer makes logits: `scale * q.k`, then `softcap * tanh(logit / softcap)`.

    Two of them are equal only if they are the same object, so that comparing them never reads a tensor.

    Args:
        scale: Factor on the dot products.
        softcap: Soft cap of the logits; `None` = none.
        window: Sliding window in tokens: a key is seen if `position of the query - position of the key < window`;
            `None` = every key up to the query's position. Needs the slot field `"position"` once anything is packed.
        sinks: float32 `[q_heads]`, contiguous: an extra logit in each softmax denominator; `None` = none.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None


@dataclass
class Rows:
    """Where the packed slots of some rows live. Rows are ordered `[batch][kv_heads]`.

    Args:
        layout: The layout of the pages.
        slabs: Page storage, each `uint8 [pages, page_bytes]`.
        slab_addresses: `int64 [n_slabs]`, on the device of the slabs: the address of each slab's first byte.
        slab_shift: A page id is `slab << slab_shift | page inside the slab`.
        tables: Per tier `int32 [rows, cap]`: the page ids of each row, in slot order. The last dimension is contiguous.
        lengths: Per tier `int32 [rows]`: slots in use. Table entries beyond them are never read.
        slab_pages: Pages of each slab, `int32 [n_slabs]` on the host; `None` = as the slabs say.
        widths: Per tier the slots of the longest row, where the host knows; it spares asking the device.
        key_feedback: bfloat16 `[rows, 2, rank, head_dim]`, contiguous: how rotated keys are rounded that are written
            (`quantize.quantize`); `None` = each channel for itself. Reading does not need it.
        evicted_means: Native dtype `[rows, 2, head_dim]`, contiguous: the mean key and the mean value of the slots that
            were evicted from each row, as the tail would hold them. Attention takes them as one more slot, which every
            query sees and whose logit has the logarithm of their number added; no field counts it. `None` where they
            are forgotten.
        evicted_counts: `int32 [rows]`, contiguous: how many slots these are; a row with 0 is attended to as without.
    """

    layout: PageLayout
    slabs: list[Tensor]
    slab_addresses: Tensor
    slab_shift: int
    tables: list[Tensor]
    lengths: list[Tensor]
    widths: list[int] | None = None
    slab_pages: Tensor | None = None
    key_feedback: Tensor | None = None
    evicted_means: Tensor | None = None
    evicted_counts: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of rows: batch x KV heads."""
        return self.lengths[0].shape[0]

    def width(self, tier: int) -> int:
        """Slots of the longest row in a tier."""
        if self.widths is not None:
            return self.widths[tier]
        lengths = self.lengths[tier]
        return int(lengths.max()) if lengths.numel() else 0


@dataclass
class Tail:
    """The newest slots of every row, in the native dtype, not yet packed.

    Args:
        k: Keys `[batch, kv_heads, capacity, head_dim]`, contiguous.
        v: Values, like `k`.
        lengths: `int32 [batch]`: slots in use.
        positions: `int32 [batch, capacity]`: logical positions.
        fields: `int32 [n_fields, batch, kv_heads, capacity]` or `None`; float fields are float32 bit patterns
            (`.view(torch.float32)`). Indexed as `PageLayout.fields`.
        used: As many slots as no row of the tail exceeds, where the host knows; it spares a backend asking the device.
    """

    k: Tensor
    v: Tensor
    lengths: Tensor
    positions: Tensor
    fields: Tensor | None = None
    used: int | None = None

    @property
    def capacity(self) -> int:
        """Slots a row's tail can hold."""
        return self.k.shape[2]

    def float_fields(self) -> Tensor:
        """The fields as float32, sharing memory.

        Raises:
            ValueError: The tail has no fields.
        """
        if self.fields is None:
            raise ValueError("this tail has no slot fields")
        return self.fields.view(torch.float32)
