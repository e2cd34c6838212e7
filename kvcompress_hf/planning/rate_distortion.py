"""One multiplier over all layers and heads: the rate-distortion plan behind `auto`.

Keeping slot `i` in tier `t` costs `bytes_t` and loses `importance_i * d_t`; evicting it costs nothing and loses
`importance_i`. For one multiplier `mu` the best tier of a slot is a comparison of its importance with thresholds
`mu * g_j`, where `g_j` are the slopes of the lower convex hull of (bytes, d); so a plan is one number, found such that
pages, rounding included, fit the budget.
"""

import itertools
from dataclasses import dataclass

import torch

from kvcompress_hf.planning.base import EVICT, Plan, PlanView
from kvcompress_hf.recipe import Recipe

_BINS_PER_OCTAVE = 8
_OCTAVES = 64
_REFINE = 6  # halvings within a bin


@dataclass(frozen=True)
class RateDistortion(Plan):
    """Plan: keep each slot in the tier where its importance buys the most per byte, under one multiplier per sequence.

    Args:
        kappa (`float`): Discount on the loss of quantising. Window scores misjudge eviction far more than
            quantisation noise, so 1/64; scores by reconstruction are to be believed, so 1.
        small (`float`): Below this many bytes per dense byte only `small_tiers` stored tiers are used: every further
            tier costs half a page per head.
        small_tiers (`int`): Stored tiers at small budgets, the cheapest of the hull.
    """

    kind = "rate-distortion"

    kappa: float = 1 / 64
    small: float = 0.15
    small_tiers: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.kappa, bool) or not isinstance(self.kappa, (int, float)) or not 0 < self.kappa <= 1:
            raise ValueError(f"RateDistortion.kappa is {self.kappa!r}; it must lie in (0, 1].")
        if isinstance(self.small, bool) or not isinstance(self.small, (int, float)) or not 0 <= self.small <= 1:
            raise ValueError(f"RateDistortion.small is {self.small!r}; it must lie in [0, 1].")
        if self.small_tiers not in (1, 2, 3, 4):
            raise ValueError(f"RateDistortion.small_tiers is {self.small_tiers!r}; it must be 1, 2, 3 or 4.")

    @property
    def needs_distortion(self) -> bool:
        """`bool`: Always."""
        return True

    def check(self, recipe: Recipe) -> None:
        """Needs a budget; see [`Plan.check`]."""
        super().check(recipe)

    def targets(self, view: PlanView) -> torch.Tensor:
        """Solves for the multiplier; see [`Plan.targets`]."""
        allowed = view.bytes_allowed()
        slot_bytes = (view.page_bytes[:, None] / view.slots_per_page).median(0).values  # [tiers]
        hull = lower_hull(slot_bytes.tolist(), (self.kappa * view.distortion).clamp(max=1.0).tolist())
        score = torch.where(view.filled, view.importance, 0.0)
        dense = view.filled.sum((1, 2)) * slot_bytes[0]
        result = self._solve(view, score, hull, allowed)
        tight = allowed < self.small * dense
        if len(hull) > self.small_tiers and bool(tight.any()):
            # The hull's first vertices are its cheapest tiers; dropping the others keeps it convex.
            few = self._solve(view, score, hull[: self.small_tiers], allowed)
            result = torch.where(tight[:, None, None], few, result)
        return self._fill_pages(view, result)

    def _solve(
        self, view: PlanView, score: torch.Tensor, hull: list[tuple[int, float]], allowed: torch.Tensor
    ) -> torch.Tensor:
        top = score.amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        depth = (top.log2() - score.clamp(min=torch.finfo(torch.float32).tiny).log2()).clamp(max=float(_OCTAVES))
        base = hull[0][1]
        offsets = [torch.tensor(slope / base).log2().item() for _, slope in hull]

        def at(mu: torch.Tensor) -> torch.Tensor:
            """Targets when the cheapest tier is worth it down to `mu` octaves below the top score."""
            result = torch.full_like(depth, EVICT, dtype=torch.int64)
            for (tier, _), offset in zip(hull, offsets, strict=True):
                result = torch.where((depth <= mu - offset) & (score > 0), tier, result)
            return self._allowed(view, result, hull[0][0])

        # Bytes grow with mu. A coarse search by octaves' fractions, then halvings: all in whole tensors.
        low = torch.full((score.shape[0], 1, 1), -1.0, device=score.device)
        high = torch.full_like(low, _OCTAVES + max(offsets) + 1.0)
        steps = int(torch.tensor(_OCTAVES * _BINS_PER_OCTAVE).log2().ceil()) + _REFINE
        for _ in range(steps):
            middle = (low + high) / 2
            fits = (view.bytes_of(at(middle)) <= allowed)[:, None, None]
            low = torch.where(fits, middle, low)
            high = torch.where(fits, high, middle)
        return at(low)

    def _allowed(self, view: PlanView, result: torch.Tensor, cheapest: int) -> torch.Tensor:
        result = torch.where(view.protected & (result == EVICT), cheapest, result)
        result = torch.where((result >= 0) & (result < view.tier), view.tier, result)  # slots only move down
        return torch.where(view.filled, result, EVICT)

    def _fill_pages(self, view: PlanView, result: torch.Tensor) -> torch.Tensor:
        """Keeps the best of what would be evicted where a started page has room: it costs nothing."""
        for tier in reversed(range(view.tiers)):
            counts = (result == tier).sum(-1)
            per_page = view.slots_per_page[:, tier]
            room = -counts % per_page
            may = (result == EVICT) & view.filled & (view.tier <= tier)
            score = torch.where(may, view.importance, -torch.inf)
            order = (-view.positions.long()).argsort(dim=-1, stable=True)
            order = order.gather(-1, score.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
            place = torch.arange(order.shape[-1], device=order.device)
            chosen = torch.zeros_like(may).scatter_(-1, order, place < room[..., None]) & may
            result = torch.where(chosen, tier, result)
        return result


def lower_hull(slot_bytes: list[float], distortion: list[float]) -> list[tuple[int, float]]:
    """The tiers worth using and what each step up costs.

    Args:
        slot_bytes (`list[float]`): Bytes of a slot per tier.
        distortion (`list[float]`): Loss per tier as a fraction of the loss of evicting.

    Returns:
        `list[tuple[int, float]]`: Tiers from the cheapest to the best with the slope of the step to each: bytes per
        unit of loss saved, strictly increasing. A tier above the lower convex hull from (0 bytes, loss 1) is left out.
    """
    points = sorted(zip(slot_bytes, distortion, range(len(slot_bytes)), strict=True))
    hull: list[tuple[float, float, int]] = [(0.0, 1.0, EVICT)]
    for size, loss, tier in points:
        if loss >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], (size, loss, tier)) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append((size, loss, tier))
    return [(point[2], _slope(before, point)) for before, point in itertools.pairwise(hull)]


def _slope(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    return (b[0] - a[0]) / max(a[1] - b[1], 1e-12)
