"""KV-Compress: free whole pages, cheapest first, over all layers and heads of a sequence (arXiv 2410.00161, section 3).

A row with `n` slots has `h = n mod b` slots in its last page (`b` if that is 0), so freeing its first `e` pages means
dropping exactly `h + (e - 1) * b` slots. The price of the e-th page is the largest score among those, the lowest
ones of the row: `sorted[h + (e - 1) * b - 1]`. Prices do not fall with `e`, so taking the cheapest pages of all rows
takes a prefix of each row. Ties go by position, then by row, so plans are deterministic.
"""

import torch

from kvcompress_hf.paging.waiting import on_host
from kvcompress_hf.plans.native import native_for
from kvcompress_hf.plans.order import FlatRows, lowest


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
    lengths = filled.sum(-1)
    last_page = (lengths - 1) % slots_per_page + 1  # slots in the last page, b when it is full
    pages = int((slots // on_host(slots_per_page)).max()) + 1
    number = torch.arange(pages, device=scores.device)
    dropped = last_page[..., None] + number * slots_per_page[:, None]  # [batch, rows, pages]: slots gone with page e
    exists = (dropped <= lengths[..., None]) & (lengths[..., None] > 0)
    may_go = filled & ~protected
    native = native_for(scores)
    if native is None:
        ascending = torch.where(may_go, scores.float(), torch.inf).sort(dim=-1).values
        prices = ascending.gather(-1, (dropped - 1).clamp(0, slots - 1))
    else:
        prices = native.prices(scores, may_go, last_page, slots_per_page.expand(batch, rows), pages)
    price = prices.masked_fill(~exists, torch.inf)

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
    return filled & ~lowest(FlatRows(scores.float(), positions, filled), may_go, drop)
