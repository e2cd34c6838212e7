"""From plans to one decision over all slots, by one question to the device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvcompress_hf.paging.slots import Decision, Slots, StorePart
from kvcompress_hf.paging.waiting import ask, known, known_as, to_device
from kvcompress_hf.plans.apart import plan_targets
from kvcompress_hf.plans.base import ENTRY_BYTES, Plan, PlanView, ragged_entries

_TRIES = 2  # to meet the budget, besides the first


@dataclass(frozen=True)
class Ruling:
    """A plan and what it decides on.

    Args:
        plan (`Plan`): The plan.
        view (`PlanView`): Every slot of the sequences it rules.
        sequences (`torch.Tensor` or `slice`): Which of those that were gathered, `int64` `[n]` on the host.
    """

    plan: Plan
    view: PlanView
    sequences: torch.Tensor | slice


def decide(
    parts: Sequence[StorePart],
    slots: Slots,
    rulings: Sequence[Ruling],
    others: Sequence[torch.Tensor] = (),
    sequences: torch.Tensor | None = None,
) -> tuple[Decision, list[torch.Tensor]]:
    """Asks every plan for its targets, and the device how many slots go where.

    The device is asked once, and once more each time that page tables alone exceed a budget (twice at most). They are
    taken to become as ragged as they are now, which is seldom wrong by more than what whole pages leave.

    Args:
        parts (`Sequence[StorePart]`): The stores, as they were gathered.
        slots (`Slots`): The slots, as they were gathered.
        rulings (`Sequence[Ruling]`): The plans; the slots of sequences that none of them rules stay as they are.
        others (`Sequence[torch.Tensor]`): Integers on devices that are to be asked for along with it.
        sequences (`torch.Tensor`, *optional*): Those that were gathered, as for [`gather_slots`].

    Returns:
        `tuple[Decision, list[torch.Tensor]]`: The decision, its counts known on the host; and the others, there too.
    """
    tables = torch.stack([ragged_entries(of_tier) for part in parts for of_tier in part.store.pages_of_rows()]).sum(0)
    tables = ENTRY_BYTES * (tables if sequences is None else tables[sequences])
    tried = [_attempt(ruling.plan, ruling.view, tables[ruling.sequences]) for ruling in rulings]
    while True:
        targets, protected = _as_they_are(slots), torch.zeros_like(slots.filled)
        for ruling, trial in zip(rulings, tried, strict=True):
            rows = ruling.sequences
            at = rows if isinstance(rows, slice) else to_device(rows, targets.device)
            targets[at], protected[at] = trial.targets.to(torch.int8), ruling.view.protected
        decision = Decision.of(parts, slots, targets, protected, sequences)
        answers = ask([*decision.counts, *(trial.excess for trial in tried), *others])
        counts, excesses = answers[: len(parts)], answers[len(parts) : len(parts) + len(tried)]
        if not any(bool(excess.any()) for excess in excesses):
            break
        tried = [trial.again() if bool(excess.any()) else trial for trial, excess in zip(tried, excesses, strict=True)]
    for asked, count in zip(decision.counts, counts, strict=True):
        known_as(asked, count)
    return decision, answers[len(parts) + len(tried) :]


def _as_they_are(slots: Slots) -> torch.Tensor:
    """Targets that change nothing, `int8` `[batch, rows, slots]`."""
    return slots.tier.to(torch.int8).expand(slots.filled.shape).contiguous()


@dataclass(frozen=True)
class _Attempt:
    """Targets of a plan, and what page tables alone take beyond the budget with them.

    How ragged the rows become, and so how much of the tables stays empty, is not known for sure before.

    Args:
        plan (`Plan`): The plan.
        view (`PlanView`): Every slot.
        targets (`torch.Tensor`): `[batch, rows, slots]`, see [`Plan.targets`].
        excess (`torch.Tensor`): `int64` `[batch]`, bytes beyond the budget; zero, or where the device would have to be
            waited for to see it.
        spared (`torch.Tensor`): `int64` `[batch]`, bytes that the plan was to leave free for tables.
        left (`int`): How often it may be tried again for less.
    """

    plan: Plan
    view: PlanView
    targets: torch.Tensor
    excess: torch.Tensor
    spared: torch.Tensor
    left: int

    def again(self) -> "_Attempt":
        """Plans again for what the excess leaves.

        Returns:
            `_Attempt`: The same attempt with other targets.
        """
        return _attempt(self.plan, self.view, self.spared + self.excess, self.left - 1)


def _attempt(plan: Plan, view: PlanView, spared: torch.Tensor, left: int = _TRIES) -> _Attempt:
    """Plans, and plans again for less where the page tables alone exceed the budget and that is seen at once.

    Args:
        plan (`Plan`): The plan.
        view (`PlanView`): Every slot.
        spared (`torch.Tensor`): `int64` `[batch]`, bytes to leave free for tables; at first what they take now. Where
            room is left for the next packings, tables have that until then, and nothing is spared at first.
        left (`int`): How often it may be tried again.

    Returns:
        `_Attempt`: The targets, and an excess that is to be asked for where the device is to be waited for.
    """
    none = torch.zeros_like(spared)
    if view.allowed_bytes is None or view.counts_slots:
        return _Attempt(plan, view, plan_targets(plan, view), none, none, 0)
    if view.room is not None and left == _TRIES:
        spared = none
    spared = to_device(spared, view.filled.device)
    targets = plan_targets(plan, replace(view, allowed_bytes=view.allowed_bytes - spared))
    if not left:
        return _Attempt(plan, view, targets, none, spared, 0)
    held, tables = view.bytes_with_tables(targets)
    excess = held + tables - view.bytes_allowed()
    excess = torch.where(excess <= tables, excess, 0).clamp(min=0)  # more than that is what protection takes
    tried = _Attempt(plan, view, targets, excess, spared, left)
    here = known(excess)
    return tried if here is None or not bool(here.any()) else tried.again()
