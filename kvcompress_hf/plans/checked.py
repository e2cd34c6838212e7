"""A call of a plan that checks what comes back, so that a slip in somebody's own class is reported by its name."""

from typing import Any

import torch

from kvcompress_hf.plans.base import EVICT, Plan, PlanView
from kvcompress_hf.validation import check_returned, naming


def targets_of(plan: Plan, view: PlanView) -> torch.Tensor:
    """Asks a plan for its decision.

    Args:
        plan (`Plan`): The plan.
        view (`PlanView`): Every slot.

    Returns:
        `torch.Tensor`: The tier to keep each slot in, or `EVICT`, `int64` or `int8` `[batch, rows, slots]`.

    Raises:
        TypeError: If it returned something else.
        ValueError: If it is of another shape, names a tier that is not there, or evicts what is protected. On a GPU the
            tiers are not looked at: it would have to be waited for.
    """
    with naming(plan, "targets"):
        targets: Any = plan.targets(view)
    narrow = getattr(targets, "dtype", None) is torch.int8
    dtype = torch.int8 if narrow else torch.int64
    check_returned(plan, "targets", targets, dtype, tuple(view.filled.shape), "[batch, rows, slots]")
    if targets.device.type == "cpu":
        least, most = (int(each) for each in targets.aminmax()) if targets.numel() else (0, 0)
        beyond = least < EVICT or most >= view.tiers
        if beyond and bool((unknown := view.filled & ((targets < EVICT) | (targets >= view.tiers))).any()):
            raise ValueError(
                f"{type(plan).__name__}.targets returned the tier {int(targets[unknown][0])}; tiers are 0 to "
                f"{view.tiers - 1}, and EVICT ({EVICT}) drops a slot."
            )
        lost = int((view.protected & (targets == EVICT)).sum())
        if lost:
            raise ValueError(
                f"{type(plan).__name__}.targets evicts {lost} slots that the recipe protects (view.protected); give "
                "them a tier, such as the last."
            )
    return targets
