"""What is remembered of evicted slots: of each row their mean key, their mean value, and how many they were.

One slot that stands for all of them, with the logarithm of their number added to its logit, is what attention to them
would be if their keys were all alike. What it leaves to the slots that are kept is then closer to what these had. Two
vectors do for any number of slots.

The means are of keys and values as the tail holds them (centred; values rotated where the store rotates them), and in
their dtype: in float32 they would take the room of eight more slots of 4 and 2 bits per row, which at small budgets is
more than they are worth. A mean in bfloat16 is off by a 500th, and no longer follows where less than that changes at a
time; both are far less than what one slot for many leaves out.
"""

from typing import TYPE_CHECKING

import torch

from kvcompress_hf.paging.sequence_tensors import Declared, SequenceTensors
from kvcompress_hf.paging.waiting import to_device

if TYPE_CHECKING:
    from kvcompress_hf.paging.store import PagedStore

_ROW = ("layers", "batch", "kv_heads")
EVICTED_MEANS = (
    # No eviction is ever taken back, so these are not either.
    Declared("evicted_means", None, (*_ROW, 2, "head_dim"), kind="metadata", changed_by="owner"),
    Declared("evicted_counts", torch.int32, _ROW, kind="metadata", changed_by="owner"),
)


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

    def add(self, sums: torch.Tensor, counts: torch.Tensor) -> None:
        """Adds slots to the means of all rows.

        Args:
            sums (`torch.Tensor`): Sums of their keys and of their values, float32 `[rows, 2, head_dim]`.
            counts (`torch.Tensor`): How many they are, `int32` `[rows]`.
        """
        if "evicted_counts" not in self.tensors.values:
            for each in EVICTED_MEANS:
                self.tensors.make(each.name)
            self.tensors.moved()  # plans of before know nothing of them
        means, known = self.of(slice(None))
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
    with store.reading:  # pages and tables stay where they are
        sums = store.backend.slot_sums(store.rows(), tier, gone)
    store.evicted_means.add(sums, to_device(counts, gone.device))
