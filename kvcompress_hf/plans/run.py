"""From stored slots and a recipe to what a plan looks at."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvcompress_hf.paging.slots import Slots, StorePart
from kvcompress_hf.paging.store import PagedStore
from kvcompress_hf.paging.waiting import on_host, to_device
from kvcompress_hf.plans.base import ENTRY_BYTES, PlanView, ragged_entries
from kvcompress_hf.plans.budget import RowGroup, allowed_bytes
from kvcompress_hf.recipe import Recipe

_MOST_IMPORTANCE = 1e20  # beyond what any observer makes of finite keys and values in 16 bits
_TABLE_BYTES = ENTRY_BYTES + 4  # of a page: its id in the page table and its reference count


@dataclass(frozen=True)
class Limits:
    """What every sequence may hold and what it holds.

    Args:
        slots_per_page (`torch.Tensor`): `int64` `[rows, tiers]`.
        page_bytes (`torch.Tensor`): `int64` `[rows]`, a page and its entries in tables.
        dense_bytes (`torch.Tensor`): `int64` `[batch]`, what a dense cache of each sequence would take.
        held_bytes (`torch.Tensor`): `int64` `[batch]`, pages held now.
        held_slots (`torch.Tensor`): `int64` `[batch]`, slots held now, over all rows.
        allowed_bytes (`torch.Tensor`, *optional*): `int64` `[batch]`, pages allowed; `None` without a budget.
        entry (`int`): The tier that new slots enter, but for sinks that are stored apart.
        every (`int`): Slots that each packing adds to a row.
    """

    slots_per_page: torch.Tensor
    page_bytes: torch.Tensor
    dense_bytes: torch.Tensor
    held_bytes: torch.Tensor
    held_slots: torch.Tensor
    allowed_bytes: torch.Tensor | None
    entry: int
    every: int

    def of(self, sequences: torch.Tensor | slice) -> "Limits":
        """Picks sequences of the batch.

        Args:
            sequences (`torch.Tensor` or `slice`): Their indices, `int64` `[n]`, or a range of them.

        Returns:
            `Limits`: The limits of these alone.
        """
        return replace(
            self,
            dense_bytes=self.dense_bytes[sequences],
            held_bytes=self.held_bytes[sequences],
            held_slots=self.held_slots[sequences],
            allowed_bytes=None if self.allowed_bytes is None else self.allowed_bytes[sequences],
        )

    @property
    def fits(self) -> torch.Tensor:
        """`torch.Tensor`: `bool` `[batch]`, whether a sequence is within its budget."""
        if self.allowed_bytes is None:
            return torch.zeros_like(self.held_bytes, dtype=torch.bool)
        return self.held_bytes <= self.allowed_bytes


def cost_of_page(store: PagedStore) -> int:
    """Bytes that one more page of a store takes, its entries in tables included.

    Args:
        store (`PagedStore`): The store.

    Returns:
        `int`: Bytes per page.
    """
    return store.layout.page_bytes + _TABLE_BYTES


def bytes_held(store: PagedStore) -> torch.Tensor:
    """Bytes of the pages of each sequence, entries in tables included.

    Args:
        store (`PagedStore`): The store.

    Returns:
        `torch.Tensor`: `int64` `[batch]`, on the host.
    """
    pages = store.pages_of_rows()
    entries = torch.stack([ragged_entries(of_tier) for of_tier in pages])
    return pages.sum((0, 2)) * cost_of_page(store) + entries.sum(0) * ENTRY_BYTES


def slots_held(store: PagedStore) -> torch.Tensor:
    """Slots of each sequence in pages, over all its rows.

    Args:
        store (`PagedStore`): The store.

    Returns:
        `torch.Tensor`: `int64` `[batch]`, on the host.
    """
    lengths = store.lengths_on_host().view(-1, store.layers, store.batch, store.geometry.kv_heads)
    return lengths.sum((0, 1, 3))


def make_limits(
    recipe: Recipe,
    parts: Sequence[StorePart],
    windows: Sequence[int | None],
    aside: Sequence[int],
    *,
    expected: torch.Tensor,
    held: tuple[torch.Tensor, torch.Tensor],
    on_top: torch.Tensor,
    entering: tuple[int, int],
) -> Limits:
    """Works out what the sequences of a recipe may hold.

    Args:
        recipe (`Recipe`): Its budget.
        parts (`Sequence[StorePart]`): The stores.
        windows (`Sequence[int | None]`): Sliding window of each store's layers.
        aside (`Sequence[int]`): Bytes of each store per sequence that are not pages; they come out of byte budgets.
        expected (`torch.Tensor`): `int64` `[batch]`, tokens that a fraction budget is a fraction of.
        held (`tuple[torch.Tensor, torch.Tensor]`): `int64` `[batch]` each, bytes of pages and slots held now.
        on_top (`torch.Tensor`): `int64` `[batch]`, tokens that come on top of the budget, see [`prompt_on_top`]; they
            are allowed what they take in the tier that they enter.
        entering (`tuple[int, int]`): The tier that new slots enter, but for sinks that are stored apart; and how many
            each packing adds to a row.

    Returns:
        `Limits`: What each sequence may hold.
    """
    per_page = torch.cat(
        [torch.tensor([[tier.slots for tier in part.store.layout.tiers]] * part.rows) for part in parts]
    )
    page_bytes = torch.cat([torch.full((part.rows,), cost_of_page(part.store)) for part in parts])
    groups = [
        RowGroup(
            rows=part.rows,
            slots_per_page=part.store.layout.tiers[entering[0]].slots,
            page_bytes=cost_of_page(part.store),
            dense_slot_bytes=2 * part.store.layout.head_dim * part.store.geometry.dtype.itemsize,
            tail_bytes=outside,
            window=window,
        )
        for part, outside, window in zip(parts, aside, windows, strict=True)
    ]
    dense = torch.zeros_like(expected)
    for group in groups:
        tokens = expected if group.window is None else expected.clamp(max=group.window)
        dense += group.rows * group.dense_slot_bytes * tokens
    allowed = None
    if recipe.budget is not None:
        allowed = torch.tensor([allowed_bytes(recipe.budget, groups, int(count)) for count in expected - on_top])
        for group in groups:
            tokens = on_top if group.window is None else on_top.clamp(max=group.window)
            allowed += (tokens + group.slots_per_page - 1) // group.slots_per_page * group.page_bytes * group.rows
            if recipe.sinks_apart and group.window is None and isinstance(recipe.budget.amount, int):
                # Sinks start their own page.
                allowed += group.page_bytes * group.rows
    return Limits(per_page, page_bytes, dense, *held, allowed, *entering)


def prompt_on_top(recipe: Recipe, prompt: int, padding: torch.Tensor) -> torch.Tensor:
    """How many tokens of each sequence come on top of the budget.

    Args:
        recipe (`Recipe`): Whether it protects the prompt.
        prompt (`int`): Tokens of the prompt, padding included.
        padding (`torch.Tensor`): `int64` `[batch]`, padding tokens before each sequence.

    Returns:
        `torch.Tensor`: `int64` `[batch]`.
    """
    padding = on_host(padding)
    return (prompt - padding).clamp(min=0) if recipe.protect.prompt else torch.zeros_like(padding)


def make_view(
    recipe: Recipe,
    slots: Slots,
    limits: Limits,
    *,
    importance: torch.Tensor,
    spread: torch.Tensor | None,
    tokens: torch.Tensor,
    padding: torch.Tensor,
    distortion: Sequence[torch.Tensor],
    headroom: float = 0.0,
    guesses: bool = False,
) -> PlanView:
    """Puts together what a plan decides on.

    Args:
        recipe (`Recipe`): Budget and protection are read from it.
        slots (`Slots`): Every slot.
        limits (`Limits`): What every sequence may hold.
        importance (`torch.Tensor`): float32 `[batch, rows, slots]`.
        spread (`torch.Tensor`, *optional*): float32 `[batch, rows, slots]`.
        tokens (`torch.Tensor`): `int64` `[batch]`, real tokens seen.
        padding (`torch.Tensor`): `int64` `[batch]`, padding tokens before each sequence.
        distortion (`Sequence[torch.Tensor]`): Measured losses, each float32 `[batch, heads, tiers]`, NaN where nothing
            was measured; may be empty.
        headroom (`float`): Share of the budget to leave free; as room in pages, if the plan does that.
        guesses (`bool`): Whether the observer could not look as far as it wanted to.

    Returns:
        `PlanView`: What the plan is given.
    """
    device = slots.filled.device
    sinks, recent = recipe.protect.sinks, recipe.protect.recent
    first = to_device(padding, device)[:, None, None]
    protected = slots.filled & ((slots.positions >= slots.seen - recent) | (slots.positions < first + sinks))
    of_prompt = prompt_on_top(recipe, slots.prompt, padding)
    if recipe.protect.prompt:
        protected = protected | (slots.filled & (slots.positions < slots.prompt))
    allowed, page_bytes = limits.allowed_bytes, limits.page_bytes
    share = room = None
    if recipe.budget is not None and allowed is not None:
        if headroom and recipe.plan is not None and recipe.plan.leaves_room:
            room = _room_for_packings(recipe, limits, allowed * headroom)
        else:
            allowed = (allowed * (1 - headroom)).long()
        if isinstance(recipe.budget.amount, int):
            share = (recipe.budget.amount + of_prompt)[:, None].expand(-1, page_bytes.numel())
        else:
            # Every row gets the same bytes, in whole pages: a started page would cost as much as a full one.
            share = allowed[:, None] // page_bytes.numel() // page_bytes * limits.slots_per_page[:, 0]
    # One NaN or infinity would make sums over its head, and comparisons with them, senseless.
    importance = importance.nan_to_num(nan=-_MOST_IMPORTANCE).clamp(-_MOST_IMPORTANCE, _MOST_IMPORTANCE)
    losses = torch.zeros((tokens.numel(), len(recipe.tiers)))
    if distortion:
        losses = torch.cat(list(distortion), dim=1).nanmedian(1).values.nan_to_num(0.0)
    return PlanView(
        importance=importance,
        spread=spread,
        positions=slots.positions,
        filled=slots.filled,
        protected=protected,
        tier=slots.tier,
        layer_of_row=slots.layer_of_row,
        slots_per_page=to_device(limits.slots_per_page, device),
        page_bytes=to_device(page_bytes, device),
        allowed_bytes=None if allowed is None else to_device(allowed, device),
        allowed_slots=None if share is None else to_device(share, device),
        tokens=to_device(tokens, device),
        dense_bytes=to_device(limits.dense_bytes, device),
        distortion=to_device(losses, device),
        counts_slots=recipe.budget is not None and isinstance(recipe.budget.amount, int),
        guesses=guesses,
        sinks_apart=recipe.sinks_apart > 0,
        room=room,
    )


def _room_for_packings(recipe: Recipe, limits: Limits, worth: torch.Tensor) -> torch.Tensor:
    """Slots that so many bytes are worth in every row, in whole packings: `int64` `[batch, tiers]`.

    Sequences of a batch would all use up their room at the same step, so each gets up to half as much more or less, by
    what it alone decides: how many slots it holds.
    """
    slot_of_each_row = (limits.page_bytes / limits.slots_per_page[:, limits.entry]).sum()
    packings = (worth / slot_of_each_row / limits.every).long()
    spread = packings // 2
    turn = limits.held_slots % (2 * spread + 1)
    room = torch.zeros((len(packings), len(recipe.tiers)), dtype=torch.int64)
    room[:, limits.entry] = (packings - spread + turn) * limits.every
    return room
