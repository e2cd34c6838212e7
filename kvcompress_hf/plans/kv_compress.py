"""KV-Compress: one budget over all layers and heads of a sequence (arXiv 2410.00161, section 3)."""

from dataclasses import dataclass

import torch

from kvcompress_hf.paging.waiting import to_device
from kvcompress_hf.plans.base import EVICT, Plan, PlanView, require_single_tier
from kvcompress_hf.plans.order import FlatRows, lowest
from kvcompress_hf.plans.pages import plan_pages
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.validation import check_flags, check_numbers, finite, shown


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
        check_numbers(self, "floor", low=0, high=1, without=(1,))
        check_flags(self, "normalise")
        if self.bias is not None:
            object.__setattr__(self, "bias", self._nested(self.bias))

    @staticmethod
    def _nested(bias: object) -> tuple[tuple[float, ...], ...]:
        kinds = (list, tuple)
        if not isinstance(bias, kinds) or not all(isinstance(heads, kinds) for heads in bias):
            raise ValueError(f"PagePlan.bias is {shown(bias)}; it must be nested, [layers][kv_heads].")
        numbers = tuple(tuple(finite(x) for x in heads) for heads in bias)
        if any(x is None for heads in numbers for x in heads):
            raise ValueError(f"PagePlan.bias is {shown(bias)}; every one must be a finite number.")
        return tuple(tuple(x for x in heads if x is not None) for heads in numbers)

    @property
    def keeps_or_evicts(self) -> bool:
        """`bool`: True."""
        return True

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
