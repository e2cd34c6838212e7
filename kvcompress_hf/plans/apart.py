"""Plans that keep or evict, in recipes whose sinks lie in a tier of their own: the plan is shown all other slots."""

from dataclasses import replace

import torch

from kvcompress_hf.paging.waiting import derive, on_host
from kvcompress_hf.plans.base import EVICT, Plan, PlanView
from kvcompress_hf.plans.checked import targets_of

__all__ = ["plan_targets"]


def plan_targets(plan: Plan, view: PlanView) -> torch.Tensor:
    """Asks a plan for its decision; where sinks lie apart they stay, and it decides on the rest as if that were all.

    Args:
        plan (`Plan`): The plan.
        view (`PlanView`): Every slot.

    Returns:
        `torch.Tensor`: The tier to keep each slot in, or `EVICT`, `int64` `[batch, rows, slots]`.
    """
    if not view.sinks_apart:
        return targets_of(plan, view)
    sinks = int((on_host(view.tier) == 0).sum())  # columns are grouped by tier
    stay = torch.zeros_like(view.filled[..., :sinks], dtype=torch.int64)
    if sinks == view.filled.shape[-1]:  # nothing else is stored yet
        return stay
    targets = targets_of(plan, _without_sinks(view, sinks))
    return torch.cat([stay, torch.where(targets == EVICT, EVICT, 1)], dim=-1)


def _without_sinks(view: PlanView, sinks: int) -> PlanView:
    """A view of the slots behind the first columns, what those take set aside."""
    held = view.filled[..., :sinks].sum(-1)
    per_page, of_others = view.slots_per_page[:, 0], view.slots_per_page[:, 1:]
    aside = ((held + per_page - 1) // per_page * view.page_bytes).sum(1)
    allowed = None if view.allowed_bytes is None else (view.allowed_bytes - aside).clamp(min=0)
    share = view.allowed_slots
    if share is not None and view.counts_slots:
        share = (share - held).clamp(min=0)
    elif share is not None and allowed is not None:
        share = allowed[:, None] // view.page_bytes.numel() // view.page_bytes * of_others[:, 0]
    return replace(
        view,
        importance=view.importance[..., sinks:],
        spread=None if view.spread is None else view.spread[..., sinks:],
        positions=view.positions[..., sinks:],
        filled=view.filled[..., sinks:],
        protected=view.protected[..., sinks:],
        tier=derive(view.tier, lambda tier: torch.zeros_like(tier[sinks:])),
        slots_per_page=of_others,
        allowed_bytes=allowed,
        allowed_slots=share,
        distortion=view.distortion[:, 1:],
        sinks_apart=False,
    )
