"""KV-Compress: one budget over all layers and heads of a sequence (arXiv 2410.00161, section 3)."""

from dataclasses import dataclass

import torch

from kvcompress_hf.paging.waiting import to_device
from kvcompress_hf.plans.base import EVICT, Plan, PlanView, require_single_tier
from kvcompress_hf.plans.lowest import FlatRows, lowest
from kvcompress_hf.plans.pages import plan_pages
from kvcompress_hf.recipe import Recipe


@dataclass(frozen=True)
class PagePlan(Plan):
    """Plan: free whole pages, cheapest first, over all layers and heads of a sequence, until the budget is met.

    Args:
        floor (`float`): Share of an even budget, in whole pages, that every head keeps at least; 0, as published, may
            strip a head whose attention is broad down to what is protected.
        normalise (`bool`): Make the sizes of each head's scores sum to one before heads are compared; as published they
            are compared as they are.
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
        per_page = view.slots_per_best_page
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
            total = torch.where(view.filled, scores, 0.0).abs().sum(-1, keepdim=True)
            scores = scores / total.clamp(min=torch.finfo(torch.float32).tiny)
        if self.bias is None:
            return scores
        bias = to_device(torch.tensor([x for heads in self.bias for x in heads]), scores.device)
        if bias.numel() != scores.shape[1]:
            raise ValueError(
                f"PagePlan.bias has {bias.numel()} numbers, but all layers together have {scores.shape[1]} KV heads; "
                "give one number per layer and KV head."
            )
        return scores + bias[:, None]
