"""From stored slots and a recipe to what a plan looks at."""

from collections.abc import Sequence

import torch

from kvcompress_hf.paging.slots import Slots, StorePart
from kvcompress_hf.planning.base import PlanView
from kvcompress_hf.planning.budget import RowGroup, allowed_bytes
from kvcompress_hf.recipe import Recipe


def make_view(
    recipe: Recipe,
    parts: Sequence[StorePart],
    slots: Slots,
    *,
    importance: torch.Tensor,
    spread: torch.Tensor | None,
    windows: Sequence[int | None],
    tail_bytes: Sequence[int],
    tokens: torch.Tensor,
    expected: torch.Tensor,
    padding: torch.Tensor,
    distortion: Sequence[torch.Tensor],
) -> PlanView:
    """Puts together what a plan decides on.

    Args:
        recipe (`Recipe`): Budget and protection are read from it.
        parts (`Sequence[StorePart]`): The stores.
        slots (`Slots`): Every slot.
        importance (`torch.Tensor`): float32 `[batch, rows, slots]`.
        spread (`torch.Tensor`, *optional*): float32 `[batch, rows, slots]`.
        windows (`Sequence[int | None]`): Sliding window of each store's layers.
        tail_bytes (`Sequence[int]`): Bytes of each store's tail per sequence.
        tokens (`torch.Tensor`): `int64` `[batch]`, real tokens seen.
        expected (`torch.Tensor`): `int64` `[batch]`, tokens that a fraction budget is a fraction of.
        padding (`torch.Tensor`): `int64` `[batch]`, padding tokens before each sequence.
        distortion (`Sequence[torch.Tensor]`): Measured losses, each float32 `[heads, tiers]`; may be empty.

    Returns:
        `PlanView`: The view.
    """
    device = slots.filled.device
    tiers = len(recipe.tiers)
    sinks, recent = recipe.protect.sinks, recipe.protect.recent
    first = padding.to(device)[:, None, None]
    protected = slots.filled & ((slots.positions >= slots.seen - recent) | (slots.positions < first + sinks))
    per_page = torch.cat(
        [torch.tensor([[tier.slots for tier in part.store.layout.tiers]] * part.rows) for part in parts]
    )
    page_bytes = torch.cat([torch.full((part.rows,), part.store.layout.page_bytes) for part in parts])
    allowed = share = None
    if recipe.budget is not None:
        groups = [
            RowGroup(
                rows=part.rows,
                slots_per_page=part.store.layout.tiers[0].slots,
                page_bytes=part.store.layout.page_bytes,
                dense_slot_bytes=2 * part.store.layout.head_dim * part.store.geometry.dtype.itemsize,
                tail_bytes=tail,
                window=window,
            )
            for part, tail, window in zip(parts, tail_bytes, windows, strict=True)
        ]
        allowed = torch.tensor([allowed_bytes(recipe.budget, groups, int(count)) for count in expected])
        if isinstance(recipe.budget.amount, int):
            share = torch.full((len(expected), page_bytes.numel()), recipe.budget.amount)
        else:
            # Every row gets the same bytes, in whole pages: a started page would cost as much as a full one.
            share = allowed[:, None] // page_bytes.numel() // page_bytes * per_page[:, 0]
    losses = torch.cat(list(distortion)).median(0).values if distortion else torch.zeros(tiers)
    return PlanView(
        importance=importance,
        spread=spread,
        positions=slots.positions,
        filled=slots.filled,
        protected=protected,
        tier=slots.tier,
        layer_of_row=slots.layer_of_row,
        slots_per_page=per_page.to(device),
        page_bytes=page_bytes.to(device),
        allowed_bytes=None if allowed is None else allowed.to(device),
        allowed_slots=None if share is None else share.to(device),
        tokens=tokens.to(device),
        distortion=losses.to(device),
        counts_slots=recipe.budget is not None and isinstance(recipe.budget.amount, int),
    )
