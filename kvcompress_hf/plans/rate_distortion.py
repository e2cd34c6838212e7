"""One multiplier over all layers and heads: the rate-distortion plan behind `auto`.

Keeping slot `i` in tier `t` costs `bytes_t` and loses `importance_i * d_t`; evicting it costs nothing and loses
`importance_i`. For one multiplier `mu` the best tier of a slot is a comparison of its importance with thresholds
`mu * g_j`, where `g_j` are the slopes of the lower convex hull of (bytes, d); so a plan is one number, found such that
pages, rounding included, fit the budget.
"""

import itertools
import math
from dataclasses import dataclass

import torch

from kvcompress_hf.kernels import Hulls, PlanOperations
from kvcompress_hf.paging.waiting import known, on_host, to_device
from kvcompress_hf.plans.base import EVICT, Plan, PlanView
from kvcompress_hf.plans.histogram import BINS, BINS_PER_OCTAVE, SlotCounts, bins_below_top
from kvcompress_hf.plans.native import native_for
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.validation import check_numbers, require_int

Hull = list[tuple[int, float]]  # tiers from the cheapest to the best, and the slope of the step to each

_WORST = 0.99  # storing a slot is never worse than evicting it, so there is always a tier to store it in


@dataclass(frozen=True)
class RateDistortion(Plan):
    """Plan: keep each slot in the tier where its importance buys the most per byte, under one multiplier per sequence.

    Where importance is a guess (the observer could not look as far as it wanted to), nothing is evicted as long as
    every slot fits into the cheapest tier, and the multiplier shares out what is left.

    Args:
        kappa (`float`): Discount on the loss of quantising. Window scores misjudge eviction far more than
            quantisation noise, so 1/64; scores by reconstruction are to be believed, so 1.
        small (`float`): Below this many bytes per dense byte only `small_tiers` stored tiers are used: every further
            tier costs half a page per head.
        small_tiers (`int`): Stored tiers at small budgets, the cheapest of the hull.
        headroom (`float`): Share of the budget, in slots of the tier that new ones enter, that a plan made during
            decoding leaves free in the pages that rows hold anyway, in whole packings; the next plan is due when that
            is used up and rows need new pages. Where nothing is stored in that tier, no room is left there.
    """

    kind = "rate-distortion"

    kappa: float = 1 / 64
    small: float = 0.15
    small_tiers: int = 2
    headroom: float = 1 / 16

    def __post_init__(self) -> None:
        check_numbers(self, "kappa", low=0, high=1, without=(0,))
        check_numbers(self, "small", low=0, high=1)
        require_int("RateDistortion", "small_tiers", self.small_tiers, 1, 4)
        check_numbers(self, "headroom", low=0, high=1, without=(1,))

    @property
    def needs_distortion(self) -> bool:
        """`bool`: Always."""
        return True

    @property
    def leaves_room(self) -> bool:
        """`bool`: Always."""
        return True

    def resting_tiers(self, recipe: Recipe) -> tuple[int, ...]:
        """The cheapest `small_tiers` for a budget below `small`; see [`Plan.resting_tiers`]."""
        tiers, amount = super().resting_tiers(recipe), None if recipe.budget is None else recipe.budget.amount
        small = isinstance(amount, float) and amount < self.small and not recipe.protect.prompt
        return tiers[-self.small_tiers :] if small else tiers

    def check(self, recipe: Recipe) -> None:
        """Needs a budget; see [`Plan.check`]."""
        super().check(recipe)

    def targets(self, view: PlanView) -> torch.Tensor:
        """Solves for the multiplier; see [`Plan.targets`]."""
        native = native_for(view.importance)
        if native is not None:
            return self._natively(native, view, self.hulls(view))
        return self.in_torch(view, self.hulls(view))

    def hulls(self, view: PlanView) -> list[Hull]:
        """The tiers worth using in each sequence.

        Args:
            view (`PlanView`): What slots take in each tier, and what each tier loses.

        Returns:
            `list[list[tuple[int, float]]]`: Per sequence as from [`lower_hull`].
        """
        slot_bytes = (on_host(view.page_bytes)[:, None] / on_host(view.slots_per_page)).median(0).values  # of each tier
        losses = (self.kappa * on_host(view.distortion)).clamp(max=_WORST)
        return [lower_hull(slot_bytes.tolist(), of_tiers) for of_tiers in losses.tolist()]

    def _natively(self, native: PlanOperations, view: PlanView, hulls: list[Hull]) -> torch.Tensor:
        tight = (view.bytes_allowed() < self.small * view.dense_bytes).tolist()
        used = [hull[: self.small_tiers] if small else hull for hull, small in zip(hulls, tight, strict=True)]
        room = torch.stack([_room_in(hull, mine) for hull, mine in zip(used, view.room_left(), strict=True)])
        return native.shares(
            view.importance,
            view.filled,
            view.protected,
            view.tier,
            (view.slots_per_page, view.page_bytes),
            (view.bytes_allowed(), room),
            Hulls([[tier for tier, _ in hull] for hull in used], [offsets(hull) for hull in used]),
            view.guesses,
        )

    def in_torch(self, view: PlanView, hulls: list[Hull]) -> torch.Tensor:
        """[`RateDistortion.targets`] in torch, for every device.

        Args:
            view (`PlanView`): Every slot.
            hulls (`list[list[tuple[int, float]]]`): Of each sequence, as from [`lower_hull`].

        Returns:
            `torch.Tensor`: As of [`Plan.targets`].
        """
        depth = bins_below_top(torch.where(view.filled, view.importance, 0.0))
        counts = SlotCounts.of(view, depth)
        if all(hull == hulls[0] for hull in hulls):
            return self._with_hull(view, depth, counts, hulls[0])
        alone = [slice(i, i + 1) for i in range(len(hulls))]
        return torch.cat(
            [
                self._with_hull(view.of(i), depth[i], counts.of_rows(i), hull)
                for i, hull in zip(alone, hulls, strict=True)
            ]
        )

    def _with_hull(self, view: PlanView, depth: torch.Tensor, counts: SlotCounts, hull: Hull) -> torch.Tensor:
        few = hull[: self.small_tiers]  # the hull's first vertices are its cheapest tiers; it stays convex
        allowed, dense = known(view.bytes_allowed()), known(view.dense_bytes)
        sure = None if allowed is None or dense is None else allowed < self.small * dense
        if len(few) == len(hull) or (sure is not None and bool(sure.all())):
            return self._targets(view, depth, counts, few)
        result = self._targets(view, depth, counts, hull)
        if sure is None or bool(sure.any()):
            tight = view.bytes_allowed() < self.small * view.dense_bytes
            result = torch.where(tight[:, None, None], self._targets(view, depth, counts, few), result)
        return result

    def _targets(self, view: PlanView, depth: torch.Tensor, counts: SlotCounts, hull: Hull) -> torch.Tensor:
        thresholds = solve(view, counts, hull)
        # Narrow until the end, as every step reads all slots.
        result = torch.full(depth.shape, EVICT, dtype=torch.int8, device=depth.device)
        for step, (tier, _) in enumerate(hull):
            result.masked_fill_(depth < thresholds[:, :, step, None], tier)
        result.masked_fill_(view.protected & (result == EVICT), hull[0][0])
        lowered = torch.maximum(result, view.tier.to(torch.int8))  # slots only move down
        return torch.where((result == EVICT) | ~view.filled, EVICT, lowered)


def solve(view: PlanView, counts: SlotCounts, hull: Hull) -> torch.Tensor:
    """The thresholds of one multiplier per sequence, chosen such that whole pages fit the budget.

    Every multiplier down to a bin of importance is tried at once. What it leaves of the budget buys one more page for
    the rows whose next slots are the most important; then the rows fill the pages they have, from the best tier down.

    Args:
        view (`PlanView`): Every slot.
        counts (`SlotCounts`): Its slots by importance.
        hull (`list[tuple[int, float]]`): As from [`lower_hull`].

    Returns:
        `torch.Tensor`: `int64` `[batch, rows, len(hull)]`: a slot is worth step `j` of the hull where it lies less than
        that many bins below the top of its sequence.
    """
    ladder = _Ladder(view, counts, hull)
    allowed = view.bytes_allowed()
    last = BINS + ladder.offsets[-1]
    candidates = torch.arange(last + 1, device=allowed.device)
    held = ladder.row_bytes(ladder.at(candidates[None, None]))  # [batch, rows, candidates]
    total = held.sum(1)
    best = torch.where(total <= allowed[:, None], candidates, 0).amax(1)  # [batch]
    now = held.gather(-1, best[:, None, None].expand(-1, held.shape[1], 1))
    dearer = (held > now) & (candidates > best[:, None, None])
    following = torch.where(dearer, candidates, last + 1).amin(-1)  # [batch, rows], where each wants a page
    cost = held.gather(-1, following.clamp(max=last)[..., None]) - now
    rank, order = following.sort(dim=1, stable=True)
    spent = cost[..., 0].gather(1, order).cumsum(1)
    granted = (spent <= (allowed - now.sum((1, 2)))[:, None]) & (rank <= last)
    granted = torch.zeros_like(granted).scatter_(1, order, granted)
    wanted = ladder.at(torch.where(granted, following, best[:, None])[..., None])
    filled = ladder.fill_pages(wanted)
    fits = ladder.row_bytes(filled).sum((1, 2)) <= ladder.row_bytes(wanted).sum((1, 2))
    return torch.where(fits[:, None, None, None], filled, wanted)[..., 0]


class _Ladder:
    """Counts and bytes of rows for thresholds `[batch, rows, len(hull), n]` in bins, of `n` plans at a time.

    A slot is wanted in the best tier whose threshold it passes, but slots only move down: one that lies in tier `t`
    already stays there if it is wanted in a better one.
    """

    def __init__(self, view: PlanView, counts: SlotCounts, hull: Hull) -> None:
        self._view = view
        self._tiers = [tier for tier, _ in hull]
        self._stored, self._above = counts.stored(), counts.above()
        self.offsets = offsets(hull)
        room = torch.stack([_room_in(hull, mine) for mine in view.room_left()])
        #: Slots to leave free in started pages, `int32` `[batch, 1, tiers, 1]`.
        self._room = to_device(room, self._stored.device).to(torch.int32)[:, None, :, None]
        #: Sequences of which every slot is stored, `bool` `[batch]`; `None` if there is none.
        self._whole: torch.Tensor | None = None
        if view.guesses:
            cheapest = to_device(torch.tensor([BINS, *[0] * (len(hull) - 1)]), self._stored.device)
            every = cheapest.expand(*self._stored.shape[:2], -1)[..., None]
            self._whole = self.row_bytes(every).sum((1, 2)) <= view.bytes_allowed()

    def at(self, cheapest: torch.Tensor) -> torch.Tensor:
        """Thresholds of every step from those of the cheapest tier, `[batch, rows, n]` or broadcasting to it."""
        batch, rows = self._stored.shape[:2]
        steps = torch.stack([(cheapest - offset).clamp(0, BINS) for offset in self.offsets], dim=-2)
        if self._whole is not None:
            first = torch.where(self._whole[:, None, None], BINS, steps[..., 0, :])
            steps = torch.cat([first[..., None, :], steps[..., 1:, :].expand(*first.shape[:-1], -1, -1)], dim=-2)
        return steps.expand(batch, rows, -1, -1)

    def _passing(self, step: int, threshold: torch.Tensor) -> torch.Tensor:
        """Slots that pass a step, by the tier they lie in: `[batch, rows, tiers, n]` from `[batch, rows, n]`."""
        counts = self._stored if step == 0 else self._above
        return counts.gather(-1, threshold[:, :, None].expand(-1, -1, counts.shape[2], -1))

    def occupancy(self, thresholds: torch.Tensor) -> torch.Tensor:
        """Slots of each row in each tier: `[batch, rows, tiers, n]`."""
        passing = [self._passing(step, thresholds[:, :, step]) for step in range(len(self._tiers))]
        result = []
        for tier in range(self._view.tiers):
            step = next((i for i, known in enumerate(self._tiers) if known <= tier), None)
            if step is None:  # the hull has only lower tiers
                result.append(torch.zeros_like(passing[0][:, :, 0]))
                continue
            slots = passing[step][:, :, tier]  # those that lie here and are wanted here or higher stay
            if self._tiers[step] == tier:
                slots = slots + passing[step][:, :, :tier].sum(2, dtype=torch.int32)
                if step + 1 < len(self._tiers):
                    slots = slots - passing[step + 1][:, :, :tier].sum(2, dtype=torch.int32)
            result.append(slots)
        return torch.stack(result, dim=2)

    def _pages(self, slots: torch.Tensor) -> torch.Tensor:
        """Pages of each row in each tier, those counted in which room is left: as `slots`."""
        per_page = self._view.slots_per_page.to(torch.int32)[:, :, None]
        return (slots + (per_page - 1) + self._room).div_(per_page, rounding_mode="floor")

    def row_bytes(self, thresholds: torch.Tensor) -> torch.Tensor:
        """Bytes of each row, every started page counted whole: `int64` `[batch, rows, n]`."""
        return self._pages(self.occupancy(thresholds)).sum(2) * self._view.page_bytes[:, None]

    def fill_pages(self, thresholds: torch.Tensor) -> torch.Tensor:
        """Lowers thresholds as far as the pages that are started anyway have room, from the best tier down."""
        room = self._pages(self.occupancy(thresholds)) * self._view.slots_per_page[:, :, None] - self._room  # slots
        steps = list(thresholds.unbind(2))
        for step in reversed(range(len(steps))):
            tier = self._tiers[step]
            counts = self._stored if step == 0 else self._above
            slots = counts[:, :, : tier + 1].sum(2)
            if step + 1 < len(steps):
                slots = slots - self._passing(step + 1, steps[step + 1])[:, :, :tier].sum(2)
            lowered = (slots <= room[:, :, tier]).sum(-1, keepdim=True) - 1
            if step:  # no further down than the cheaper tier reaches already: those behind are to be evicted
                lowered = torch.minimum(lowered, steps[step - 1])
            steps[step] = torch.maximum(steps[step], lowered)
        return torch.stack(steps, dim=2)


def lower_hull(slot_bytes: list[float], distortion: list[float]) -> Hull:
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


def offsets(hull: Hull) -> list[int]:
    """How much more important a slot must be than for the cheapest tier.

    Args:
        hull (`list[tuple[int, float]]`): As from [`lower_hull`].

    Returns:
        `list[int]`: Bins between the threshold of the cheapest tier and that of each.
    """
    return [round(math.log2(slope / hull[0][1]) * BINS_PER_OCTAVE) for _, slope in hull]


def _room_in(hull: Hull, room: torch.Tensor) -> torch.Tensor:
    """The room to leave in each tier: none where nothing is stored, as it would cost every row a page; `[tiers]`."""
    stored = torch.zeros_like(room, dtype=torch.bool)
    stored[[tier for tier, _ in hull]] = True
    return torch.where(stored, room, 0)


def _slope(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    return (b[0] - a[0]) / max(a[1] - b[1], 1e-12)
