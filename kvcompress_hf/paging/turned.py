"""Keys in pages, rotated on to newer positions."""

from typing import TYPE_CHECKING

import torch

from kvcompress_hf.kernels import page_section
from kvcompress_hf.paging.key_turn import turn_keys
from kvcompress_hf.paging.waiting import on_host, to_device

if TYPE_CHECKING:
    from kvcompress_hf.paging.store import PagedStore

_BYTES = 1 << 23  # of pages whose keys are turned at once


def turn_stored_keys(
    store: "PagedStore", tier: int, by: torch.Tensor, seed: torch.Tensor, inv_freq: torch.Tensor
) -> None:
    """Rotates stored keys, a few pages at a time; see [`PagedStore.turn_keys`].

    Args:
        store (`PagedStore`): The store that holds the keys.
        tier (`int`): Index of a native tier.
        by (`torch.Tensor`): Positions to go forward, `int32` `[rows, pages, slots of a page]`.
        seed (`torch.Tensor`): Seeds of rounding, `int32` `[rows, pages, slots of a page]`; see [`turn_keys`].
        inv_freq (`torch.Tensor`): Radians per position of each pair of channels, float32 `[pairs]`.
    """
    row, column = torch.nonzero(by.any(-1), as_tuple=True)
    step = max(1, _BYTES // store.layout.page_bytes)
    inv_freq = to_device(inv_freq, by.device)
    if not row.numel():
        return
    here = on_host(store.tables[tier][row, column])
    for some_rows, some_columns, ids in zip(row.split(step), column.split(step), here.split(step), strict=True):
        pages = store.backend.to_canonical(store.layout, tier, store.arena.read(ids))
        keys = page_section(pages, store.layout, tier, "keys")
        amounts, seeds = by[some_rows, some_columns], seed[some_rows, some_columns]
        turned = turn_keys(keys.flatten(0, 1), amounts.flatten(), inv_freq, seeds.flatten()).view_as(keys)
        keys.copy_(torch.where((amounts > 0)[..., None], turned, keys))
        store.arena.write(ids, store.backend.from_canonical(store.layout, tier, pages))
