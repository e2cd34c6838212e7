"""Evict the lowest: per head, or over the heads of a layer, to a strict number of slots."""

from dataclasses import dataclass

import torch

from kvcompress_hf.paging.waiting import on_host, to_device
from kvcompress_hf.plans.base import EVICT, Plan, PlanView, require_single_tier
from kvcompress_hf.plans.order import FlatRows, lowest, view_of
from kvcompress_hf.plans.pages import plan_pages
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.validation import check_choice, check_numbers, require_int

_SCOPES = ("head", "layer", "sequence")


@dataclass(frozen=True)
class LowestPlan(Plan):
    """Plan: the least important slots go until no more than the budget's number of slots is left.

    Args:
        scope (`str`): `"head"`: every KV head keeps the same number (H2O, TOVA, RoCo, SnapKV); `"layer"`: the heads of
            a layer share theirs (Ada-KV, arXiv 2407.11550); `"sequence"`: all heads of all layers share.
        protect_unsettled (`int`): Slots per head that are safe because their importance is least settled: RoCo's
            protection of the highest standard deviations (arXiv 2402.06262, section 3). It gives way when too few
            slots would be left to evict.
        floor (`float`): With a shared scope, the share of its even budget that every head keeps at least (Ada-KV's
            safeguard).
        pyramid (`float`): 0 gives every layer the same; towards 1 the first layers get more and the last ones less,
            linearly (PyramidKV, arXiv 2406.02069), between `1 + pyramid` and `1 - pyramid` times the mean.
    """

    kind = "lowest"

    scope: str = "head"
    protect_unsettled: int = 0
    floor: float = 0.0
    pyramid: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self, "scope", _SCOPES)
        require_int("LowestPlan", "protect_unsettled", self.protect_unsettled, 0)
        check_numbers(self, "floor", "pyramid", low=0, high=1, without=(1,))
        if self.floor and self.scope == "head":
            raise ValueError("LowestPlan.floor only means something when heads share: use scope='layer' or 'sequence'.")

    @property
    def keeps_or_evicts(self) -> bool:
        """`bool`: True."""
        return True

    def check(self, recipe: Recipe) -> None:
        """Needs a budget, one tier, and an observer with a spread if unsettled slots are protected."""
        super().check(recipe)
        require_single_tier(self, recipe)
        if self.protect_unsettled and not getattr(recipe.observer, "std", False):
            raise ValueError(
                f"LowestPlan(protect_unsettled={self.protect_unsettled}) needs an observer that keeps the standard "
                "deviation: RunningScores(std=True)."
            )

    def targets(self, view: PlanView) -> torch.Tensor:
        """Evicts the lowest slots of each scope; see [`Plan.targets`]."""
        capacity = self._capacity(view, view.slots_allowed())
        candidates = view.filled & ~view.protected
        excess = (view.filled.sum(-1) - capacity).clamp(min=0)  # [batch, rows]
        if self.scope == "head":
            candidates = candidates & ~self._unsettled(view, candidates, excess)
            kept = view.filled & ~lowest(view, candidates, excess)
            return torch.where(self._within_bytes(view, kept) if self.pyramid else kept, 0, EVICT)
        layers = on_host(view.layer_of_row)
        groups = layers if self.scope == "layer" else torch.zeros_like(layers)
        keep = view.filled.clone()
        if self.floor:
            least = (capacity * self.floor).long()
            safe = view.filled & ~lowest(view, view.filled, (view.filled.sum(-1) - least).clamp(min=0))
            candidates = candidates & ~safe
        for group in torch.unique(groups).tolist():
            rows = to_device(torch.nonzero(groups == group).flatten(), keep.device)
            shared = view_of(view, rows)
            excess = (shared.filled.sum(-1) - capacity[:, rows].sum(1, keepdim=True)).clamp(min=0)
            gone = lowest(shared, candidates[:, rows].flatten(1)[:, None], excess)
            keep[:, rows] = keep[:, rows] & ~gone.view(keep[:, rows].shape)
        return torch.where(self._within_bytes(view, keep), 0, EVICT)

    def _within_bytes(self, view: PlanView, keep: torch.Tensor) -> torch.Tensor:
        """Frees the cheapest pages that rows of uneven lengths start above the budget, where it is in bytes."""
        if view.counts_slots or view.allowed_bytes is None:
            return keep
        excess = view.bytes_of(torch.where(keep, 0, EVICT)) - view.allowed_bytes
        sizes = view.slots_per_best_page, view.page_bytes
        return plan_pages(view.importance, view.positions, keep, view.protected & keep, *sizes, excess)

    def _capacity(self, view: PlanView, share: torch.Tensor) -> torch.Tensor:
        if not self.pyramid:
            return share
        layers = view.layer_of_row.float()
        place = layers / layers.max().clamp(min=1)
        return (share * (1 + self.pyramid * (1 - 2 * place))).long()

    def _unsettled(self, view: PlanView, candidates: torch.Tensor, excess: torch.Tensor) -> torch.Tensor:
        if not self.protect_unsettled or view.spread is None:
            return torch.zeros_like(candidates)
        most = (candidates.sum(-1) - excess).clamp(min=0, max=self.protect_unsettled)
        # Largest spread first; of equal spreads the newer slot is protected, the older stays in scope.
        spread = view.spread.nan_to_num(nan=torch.inf)
        return lowest(FlatRows(-spread, -view.positions, view.filled), candidates, most)
