"""What is remembered of evicted slots: of each row their mean key, their mean value, and how many they were.

One slot that stands for all of them, with the logarithm of their number added to its logit, is what attention to them
would be if their keys were all alike. What it leaves to the slots that are kept is then closer to what these had. Two
vectors do for any number of slots.

The means are of keys and values as the tail holds them (centred; values rotated where the store rotates them), and in
their dtype: in float32 they would take the room of eight more slots of 4 and 2 bits per row, which at small budgets is
more than they are worth. A mean in bfloat16 is off by a 500th, and no longer follows where less than that changes at a
time; both are far less than what one slot for many leaves out.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from kvcompress_hf.paging.sequence_tensors import Declared, SequenceTensors
from kvcompress_hf.paging.waiting import to_device

if TYPE_CHECKING:
    from kvcompress_hf.paging.store import PagedStore

_ROW = ("layers", "batch", "kv_heads")
EVICTED = (
    # No eviction is ever taken back, so these are not either.
    Declared("evicted_means", None, (*_ROW, 2, "head_dim"), kind="metadata", changed_by="owner"),
    Declared("evicted_counts", torch.int32, _ROW, kind="metadata", changed_by="owner"),
)
# Of keys and values that are read at a time: on a CPU as much as its caches hold, elsewhere enough to fill the device.
_BYTES_ON_CPU, _BYTES = 1 << 22, 1 << 28


class EvictedMeans:
    """The means of all rows of a store; none until something is evicted whose mean is to be kept.

    Args:
        tensors (`SequenceTensors`): The store's tensors, the means among them.
    """

    def __init__(self, tensors: SequenceTensors) -> None:
        self.tensors = tensors

    def of(self, part: slice) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Shows those of some rows.

        Args:
            part (`slice`): The rows.

        Returns:
            `tuple[torch.Tensor | None, torch.Tensor | None]`: Mean key and value, `[rows, 2, head_dim]`; and the number
            of slots, `int32` `[rows]`. They share memory with the store's.
        """
        values = self.tensors.values
        if "evicted_counts" not in values:
            return None, None
        return values["evicted_means"].flatten(0, 2)[part], values["evicted_counts"].flatten()[part]

    def add(self, part: slice, sums: torch.Tensor, counts: torch.Tensor) -> None:
        """Adds slots to the means of some rows.

        Args:
            part (`slice`): The rows.
            sums (`torch.Tensor`): Sums of their keys and of their values, float32 `[rows, 2, head_dim]`.
            counts (`torch.Tensor`): How many they are, `int32` `[rows]`.
        """
        if "evicted_counts" not in self.tensors.values:
            for each in EVICTED:
                self.tensors.make(each.name)
            self.tensors.moved()  # plans of before know nothing of them
        means, known = self.of(part)
        if means is not None and known is not None:
            known += counts
            change = (sums - counts[:, None, None] * means.float()) / known.clamp(min=1)[:, None, None]
            means.copy_(means.float() + change)


def remember_evicted(store: "PagedStore", tier: int, gone: torch.Tensor, counts: torch.Tensor) -> None:
    """Adds slots that are about to go to the means of their rows, as attention reads them.

    Slots of layers with a sliding window are left out: they would be out of its reach in a while, and their mean never.

    Args:
        store (`PagedStore`): The store.
        tier (`int`): Index of the tier that they are in.
        gone (`torch.Tensor`): `bool` `[rows, slots]` over all layers; what lies beyond a row's length is ignored.
        counts (`torch.Tensor`): `int32` `[rows]` on the host: how many those of each row are.
    """
    if store.geometry.windowed or not bool(counts.any()):
        return
    device, width = gone.device, gone.shape[1]
    column = torch.arange(width, device=device)
    with store.reading:  # pages and tables stay where they are
        rows = store.rows()
        for part in _blocks(counts, width * store.geometry.head_dim * 8, device):
            some = replace(
                rows,
                tables=[table[part] for table in rows.tables],
                lengths=[lengths[part] for lengths in rows.lengths],
                key_feedback=None,
                evicted_means=None,
                evicted_counts=None,
            )
            weight = gone[part] & (column < some.lengths[tier][:, None])
            stored = store.backend.read_slots(some, tier, width)
            sums = torch.cat([weight.float()[:, None] @ states for states in stored], dim=1)
            store.evicted_means.add(part, sums, to_device(counts[part], device))


def _blocks(counts: torch.Tensor, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """Rows that follow each other, as many as are to be read at a time; none from which nothing goes."""
    most = max(1, (_BYTES_ON_CPU if device.type == "cpu" else _BYTES) // row_bytes)
    first, end = 0, counts.numel()
    going = (counts > 0).tolist()
    while first < end:
        if not going[first]:
            first += 1
            continue
        until = first + 1
        while until < min(end, first + most) and going[until]:
            until += 1
        yield slice(first, until)
        first = until
