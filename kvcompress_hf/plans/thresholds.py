"""LeanKV: tiers by multiples of the uniform attention 1/N (arXiv 2412.03131), and a budget that solves for them."""

from dataclasses import dataclass

import torch

from kvcompress_hf.plans.base import EVICT, Plan, PlanView
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.validation import MOST_TOKENS, check_numbers

_STEPS = 24  # halvings of the multiplier's range; bytes move by less than a page long before


@dataclass(frozen=True)
class ThresholdPlan(Plan):
    """Plan: a slot stays in the high tier if its mean attention is at least `alpha_high / N`, goes to the low tier if
    it is at least `alpha_low / N`, and is evicted below; `N` is the number of tokens the sequence has seen.

    Unlike the paper's code, every slot is reconsidered at each plan: tiers shrink as well as grow, pages come back
    during decoding, and what is demoted or evicted does not depend on how many steps have passed. With a budget both
    thresholds are multiplied by the smallest factor (at least 1) that meets it.

    Args:
        alpha_high (`float`): Least multiple of 1/N for the high tier.
        alpha_low (`float`): Least multiple of 1/N to be kept at all; 0 evicts nothing.
    """

    kind = "thresholds"

    alpha_high: float = 1.0
    alpha_low: float = 0.02

    def __post_init__(self) -> None:
        check_numbers(self, "alpha_high", "alpha_low", low=0, high=MOST_TOKENS)
        if self.alpha_low > self.alpha_high:
            raise ValueError(f"ThresholdPlan.alpha_low is {self.alpha_low}, above alpha_high {self.alpha_high}.")

    def check(self, recipe: Recipe) -> None:
        """Takes one or two tiers; the budget is optional. See [`Plan.check`]."""
        if len(recipe.tiers) > 2:
            raise ValueError(
                f"ThresholdPlan has a high and a low tier, but the recipe names {', '.join(recipe.tiers)}."
            )
        if recipe.budget is not None and self.alpha_low == 0:
            raise ValueError("ThresholdPlan with a budget needs alpha_low above 0: multiples of 0 never evict.")

    def targets(self, view: PlanView) -> torch.Tensor:
        """Compares mean attention with the thresholds; see [`Plan.targets`]."""
        uniform = 1.0 / view.tokens.clamp(min=1).float()[:, None, None]
        ratio = view.importance / uniform
        if view.allowed_bytes is None:
            return self._at(view, ratio, torch.ones_like(uniform))
        # Bytes fall as the factor grows; find the smallest that fits, between 1 and what evicts all but the protected.
        low = torch.zeros_like(uniform)
        top = torch.where(view.filled, ratio, 0.0).amax((1, 2), keepdim=True) / max(self.alpha_low, 1e-9)
        high = (top * 2).clamp(min=2.0).log2()
        for _ in range(_STEPS):
            middle = (low + high) / 2
            fits = view.bytes_of(self._at(view, ratio, middle.exp2())) <= view.allowed_bytes
            high = torch.where(fits[:, None, None], middle, high)
            low = torch.where(fits[:, None, None], low, middle)
        as_is = self._at(view, ratio, torch.ones_like(uniform))
        enough = view.bytes_of(as_is) <= view.allowed_bytes
        return torch.where(enough[:, None, None], as_is, self._at(view, ratio, high.exp2()))

    def _at(self, view: PlanView, ratio: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        last = view.tiers - 1
        low = torch.where(ratio < self.alpha_low * factor, EVICT, last)
        result = torch.where(ratio < self.alpha_high * factor, low, 0)
        # The recent window stays in the high tier; when all else is gone and it still does not fit, it stays too.
        result = torch.where(view.protected, 0, result)
        result = torch.where((result >= 0) & (result < view.tier), view.tier, result)
        return torch.where(view.filled, result, EVICT)
