"""KV-Compress: free whole pages, cheapest first, over all layers and heads of a sequence (arXiv 2410.00161, section 3).

A row with `n` slots has `h = n mod b` slots in its last page (`b` if that is 0), so freeing its first `e` pages means
dropping exactly `h + (e - 1) * b` slots. The price of the e-th page is the largest score among those, the lowest
ones of the row: `sorted[h + (e - 1) * b - 1]`. Prices do not fall with `e`, so taking the cheapest pages of all rows
takes a prefix of each row. Ties go by position, then by row, so plans are deterministic.
"""

from dataclasses import dataclass

import torch

from kvcompress_hf.planning.base import EVICT, Plan, PlanView, require_single_tier
from kvcompress_hf.planning.lowest import FlatRows, lowest
from kvcompress_hf.recipe import Recipe


@dataclass(frozen=True)
class PagePlan(Plan):
    """Plan: free whole pages, cheapest first, over all layers and heads of a sequence, until the budget is met.

    Args:
        floor (`float`): Share of an even budget, in whole pages, that every head keeps at least; 0, as published, may
            strip a head whose attention is broad down to what is protected.
        normalise (`bool`): Divide each head's scores by their sum before heads are compared; as published they are
            compared as they are.
        bias (`tuple[tuple[float, ...], ...]`, *optional*): Added to the scores of each head, `[layers][kv_heads]`.
    """

    kind = "pages"

    floor: float = 0.0
    normalise: bool = False
    bias: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.floor, bool) or not isinstance(self.floor, (int, float)) or not 0 <= self.floor < 1:
            raise ValueError(f"PagePlan.floor is {self.floor!r}; it must lie in [0, 1).")
        if not isinstance(self.normalise, bool):
            raise ValueError(f"PagePlan.normalise is {self.normalise!r}; it must be True or False.")
        if self.bias is None:
            return
        try:
            object.__setattr__(self, "bias", tuple(tuple(float(x) for x in heads) for heads in self.bias))
        except TypeError:
            raise ValueError(f"PagePlan.bias is {self.bias!r}; it must be nested, [layers][kv_heads].") from None

    def check(self, recipe: Recipe) -> None:
        """Needs a budget and one tier; see [`Plan.check`]."""
        super().check(recipe)
        require_single_tier(self, recipe)

    def targets(self, view: PlanView) -> torch.Tensor:
        """Keeps what [`plan_pages`] keeps; see [`Plan.targets`]."""
        lengths = view.filled.sum(-1)
        per_page = view.slots_per_page[:, 0]
        held = ((lengths + per_page - 1) // per_page * view.page_bytes).sum(1)
        excess = held - view.bytes_allowed()
        scores, protected = self._scores(view), view.protected
        if self.floor:
            # In whole pages, and what is protected anyway counts towards it, so that the budget can still be met.
            least = (view.slots_allowed() * self.floor).long() // per_page * per_page
            ranked = FlatRows(scores.masked_fill(protected, torch.inf), view.positions, view.filled)
            protected = view.filled & ~lowest(ranked, view.filled & ~protected, (lengths - least).clamp(min=0))
        keep = plan_pages(scores, view.positions, view.filled, protected, per_page, view.page_bytes, excess)
        return torch.where(keep, 0, EVICT)

    def _scores(self, view: PlanView) -> torch.Tensor:
        scores = view.importance
        if self.normalise:
            total = torch.where(view.filled, scores, 0.0).sum(-1, keepdim=True)
            scores = scores / total.clamp(min=torch.finfo(torch.float32).tiny)
        if self.bias is None:
            return scores
        bias = torch.tensor([x for heads in self.bias for x in heads], device=scores.device)
        if bias.numel() != scores.shape[1]:
            raise ValueError(
                f"PagePlan.bias has {bias.numel()} numbers, but the model has {scores.shape[1]} KV heads over all layers; "
                "give one number per layer and KV head."
            )
        return scores + bias[:, None]


def plan_pages(
    scores: torch.Tensor,
    positions: torch.Tensor,
    filled: torch.Tensor,
    protected: torch.Tensor,
    slots_per_page: torch.Tensor,
    page_bytes: torch.Tensor,
    excess_bytes: torch.Tensor,
) -> torch.Tensor:
    """Chooses the slots that stay.

    Args:
        scores (`torch.Tensor`): float32 `[batch, rows, slots]`, importance; all layers and heads of a sequence.
        positions (`torch.Tensor`): `int32` `[batch, rows, slots]`, breaks ties: of equal scores the older goes first.
        filled (`torch.Tensor`): `bool` `[batch, rows, slots]`, slots that hold something.
        protected (`torch.Tensor`): `bool` `[batch, rows, slots]`, slots that must stay.
        slots_per_page (`torch.Tensor`): `int64` `[rows]`, `b` of each row.
        page_bytes (`torch.Tensor`): `int64` `[rows]`, what a freed page of each row is worth.
        excess_bytes (`torch.Tensor`): `int64` `[batch]`, bytes each sequence must free at least; not positive
            means nothing.

    Returns:
        `torch.Tensor`: `bool` `[batch, rows, slots]`, true for slots to keep. When protection leaves too little to
        free, everything that may go goes.
    """
    batch, rows, slots = scores.shape
    if not slots:
        return filled
    price_of = torch.where(filled & ~protected, scores.float(), torch.inf)
    by_position = positions.argsort(dim=-1, stable=True)
    order = by_position.gather(-1, price_of.gather(-1, by_position).argsort(dim=-1, stable=True))
    ascending = price_of.gather(-1, order)

    lengths = filled.sum(-1)
    last_page = (lengths - 1) % slots_per_page + 1  # slots in the last page, b when it is full
    pages = int((slots // slots_per_page).max()) + 1
    number = torch.arange(pages, device=scores.device)
    dropped = last_page[..., None] + number * slots_per_page[:, None]  # [batch, rows, pages]: slots gone with page e
    exists = (dropped <= lengths[..., None]) & (lengths[..., None] > 0)
    price = ascending.gather(-1, (dropped - 1).clamp(0, slots - 1)).masked_fill(~exists, torch.inf)

    # Cheapest pages first until enough bytes are free. Page 1 of a row comes before its page 2 at equal prices,
    # because a stable sort keeps the order [pages, rows].
    flat = price.transpose(1, 2).flatten(1)
    ranked, rank = flat.sort(dim=-1, stable=True)
    worth = page_bytes.expand(batch, pages, rows).flatten(1).gather(-1, rank)
    freed_before = worth.cumsum(-1) - worth
    chosen = (freed_before < excess_bytes[:, None]) & ranked.isfinite()
    taken = torch.zeros_like(chosen).scatter_(-1, rank, chosen).view(batch, pages, rows)
    freed = taken.sum(1)  # [batch, rows]: pages freed per row

    drop = torch.where(freed > 0, last_page + (freed - 1) * slots_per_page, 0)
    place = torch.empty_like(order).scatter_(-1, order, torch.arange(slots, device=scores.device).expand_as(order))
    return filled & (place >= drop[..., None])
