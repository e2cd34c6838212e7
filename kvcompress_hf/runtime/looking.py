"""What observers make of the keys of stored slots when a plan is due; none of it is kept."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kvcompress_hf.observers import checked
from kvcompress_hf.observers.base import Observer
from kvcompress_hf.observers.look import Look
from kvcompress_hf.paging.slots import Slots, StorePart
from kvcompress_hf.paging.store import PagedStore
from kvcompress_hf.paging.waiting import to_device
from kvcompress_hf.runtime.state import CacheState

__all__ = ["look"]


def look(state: CacheState, observer: Observer, parts: Sequence[StorePart], slots: Slots) -> dict[str, torch.Tensor]:
    """Lets an observer look at every layer, one after the other.

    Args:
        state (`CacheState`): The cache.
        observer (`Observer`): The observer.
        parts (`Sequence[StorePart]`): The stores, as they were gathered.
        slots (`Slots`): The slots, as they were gathered.

    Returns:
        `dict[str, torch.Tensor]`: The fields that it made, by name, float32 `[batch, rows, slots]`.
    """
    made: dict[str, list[torch.Tensor]] = {name: [] for name in observer.looks}
    device, row = slots.filled.device, 0
    for part in parts:
        heads = part.store.geometry.kv_heads
        for index, number in enumerate(part.layers):
            rows = slice(row, row + heads)
            row += heads
            fields = _look_at(state, observer, part.store, index, number, slots, rows)
            for name, values in fields.items():
                made[name].append(to_device(values, device))
    return {name: torch.cat(values, dim=1) for name, values in made.items()}


def _look_at(
    state: CacheState, observer: Observer, store: PagedStore, index: int, number: int, slots: Slots, rows: slice
) -> dict[str, torch.Tensor]:
    """Lets an observer look at layer `number` of the model, which is `index` of its store."""
    there = store.geometry.device
    filled, positions = (to_device(each[:, rows], there) for each in (slots.filled, slots.positions))
    rotation = state.rotation_of(state.layers[number])
    queries = store.queries.of(index, rotation)
    if queries is None:  # no query was ever remembered, so there is nothing to judge by
        return {name: torch.zeros(filled.shape, device=there) for name in observer.looks}
    return checked.look(
        observer,
        Look(
            keys=_keys(store, index, slots),
            positions=positions,
            filled=filled,
            queries=queries,
            logits=state.layers[number].logits,
            rotation=rotation,
        ),
    )


def _keys(store: PagedStore, index: int, slots: Slots) -> torch.Tensor:
    """Keys of the packed slots of a layer in the columns of `slots`, whole, float32."""
    keys = []
    with store.reading:  # pages and tables stay where they are
        view = store.rows(index)
        for tier in range(len(view.lengths)):
            columns, width = slots.columns(tier), view.width(tier)
            stored = store.backend.read_slots(view, tier, width)[0]
            keys.append(F.pad(stored, (0, 0, 0, columns.stop - columns.start - width)))
    joined = torch.cat(keys, dim=1)
    return store.whole(index, joined.view(store.batch, -1, *joined.shape[1:]))
