"""What a plan is: a typed part of a recipe that decides for every slot to keep it, lower its tier, or evict it."""

import abc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from kvcompress_hf.paging.slots import count_targets
from kvcompress_hf.paging.waiting import derive, on_host, pick
from kvcompress_hf.recipe import Part

if TYPE_CHECKING:
    from kvcompress_hf.recipe import Recipe

EVICT = -1
ENTRY_BYTES = 4  # of a page table


@dataclass(frozen=True)
class PlanView:
    """Every slot of a batch, and what it may cost. Rows are all layers and KV heads of a sequence.

    Args:
        importance (`torch.Tensor`): float32 `[batch, rows, slots]`.
        spread (`torch.Tensor`, *optional*): float32 `[batch, rows, slots]`, how unsettled the importance is.
        positions (`torch.Tensor`): `int32` `[batch, rows, slots]`.
        filled (`torch.Tensor`): `bool` `[batch, rows, slots]`, false where there is no slot.
        protected (`torch.Tensor`): `bool` `[batch, rows, slots]`, slots that may not be evicted.
        tier (`torch.Tensor`): `int64` `[slots]`, the tier that each column is stored in now.
        layer_of_row (`torch.Tensor`): `int64` `[rows]`.
        slots_per_page (`torch.Tensor`): `int64` `[rows, tiers]`.
        page_bytes (`torch.Tensor`): `int64` `[rows]`.
        allowed_bytes (`torch.Tensor`, *optional*): `int64` `[batch]`, bytes of pages each sequence may hold; `None`
            without a budget.
        allowed_slots (`torch.Tensor`, *optional*): `int64` `[batch, rows]`, an even share of the budget per row in
            slots of the best tier.
        tokens (`torch.Tensor`): `int64` `[batch]`, real tokens each sequence has seen.
        dense_bytes (`torch.Tensor`): `int64` `[batch]`, what a dense cache of each sequence would take.
        distortion (`torch.Tensor`): float32 `[batch, tiers]`, measured loss of storing a slot in a tier, as a fraction
            of the loss of evicting it.
        counts_slots (`bool`): Whether the budget is a number of tokens, so that plans that count slots need not mind
            bytes.
        guesses (`bool`): Whether the observer could not look as far as it wanted to, so that what seems of no
            importance may be of much.
        sinks_apart (`bool`): Whether the first tier holds the sinks alone, and all else the second; a plan is then
            shown the second only.
        room (`torch.Tensor`, *optional*): `int64` `[batch, tiers]`, slots that the next packings add to each row, for
            plans that leave room for them ([`Plan.leaves_room`]); `None` for none.
    """

    importance: torch.Tensor
    spread: torch.Tensor | None
    positions: torch.Tensor
    filled: torch.Tensor
    protected: torch.Tensor
    tier: torch.Tensor
    layer_of_row: torch.Tensor
    slots_per_page: torch.Tensor
    page_bytes: torch.Tensor
    allowed_bytes: torch.Tensor | None
    allowed_slots: torch.Tensor | None
    tokens: torch.Tensor
    dense_bytes: torch.Tensor
    distortion: torch.Tensor
    counts_slots: bool = False
    guesses: bool = False
    sinks_apart: bool = False
    room: torch.Tensor | None = None

    @property
    def tiers(self) -> int:
        """`int`: Number of tiers."""
        return self.slots_per_page.shape[1]

    def of(self, sequences: slice) -> "PlanView":
        """Picks sequences of the batch.

        Args:
            sequences (`slice`): Their range in the batch.

        Returns:
            `PlanView`: A view that shows these sequences alone.
        """
        per_sequence = (
            "importance",
            "spread",
            "positions",
            "filled",
            "protected",
            "allowed_bytes",
            "allowed_slots",
            "tokens",
            "dense_bytes",
            "distortion",
            "room",
        )
        present = {name: getattr(self, name) for name in per_sequence}
        picked: dict[str, Any] = {name: pick(x, sequences) for name, x in present.items() if x is not None}
        return replace(self, **picked)

    @property
    def slots_per_best_page(self) -> torch.Tensor:
        """`torch.Tensor`: `int64` `[rows]`, slots of a page of the first tier."""
        return derive(self.slots_per_page, lambda slots: slots[:, 0])

    def room_left(self) -> torch.Tensor:
        """The slots that the next packings add to each row, as far as room is to be left for them.

        Returns:
            `torch.Tensor`: `int64` `[batch, tiers]`, on the host.
        """
        if self.room is None:
            return torch.zeros((self.filled.shape[0], self.tiers), dtype=torch.int64)
        return on_host(self.room)

    def slots_allowed(self) -> torch.Tensor:
        """The even share of the budget; a recipe's plan is checked to have one.

        Returns:
            `torch.Tensor`: `int64` `[batch, rows]`.

        Raises:
            ValueError: If there is no budget.
        """
        if self.allowed_slots is None:
            raise ValueError("The plan needs a budget, and the recipe has none.")
        return self.allowed_slots

    def bytes_allowed(self) -> torch.Tensor:
        """The budget in bytes; a recipe's plan is checked to have one.

        Returns:
            `torch.Tensor`: `int64` `[batch]`.

        Raises:
            ValueError: If there is no budget.
        """
        if self.allowed_bytes is None:
            raise ValueError("The plan needs a budget, and the recipe has none.")
        return self.allowed_bytes

    def bytes_of(self, targets: torch.Tensor) -> torch.Tensor:
        """Bytes of pages that targets would take, every started page counted whole.

        Args:
            targets (`torch.Tensor`): `[batch, rows, slots]`, tier of each slot or `EVICT`.

        Returns:
            `torch.Tensor`: `int64` `[batch]`.
        """
        return self.bytes_with_tables(targets)[0]

    def bytes_with_tables(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[`PlanView.bytes_of`] and [`PlanView.ragged_bytes`], for the price of one.

        Args:
            targets (`torch.Tensor`): `[batch, rows, slots]`, tier of each slot or `EVICT`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: `int64` `[batch]` each.
        """
        pages = self.pages_of(targets)
        return (pages.sum(2) * self.page_bytes).sum(1), ragged_entries(pages).sum(1) * ENTRY_BYTES

    def ragged_bytes(self, targets: torch.Tensor) -> torch.Tensor:
        """Bytes of page tables beyond an entry per page: a table is as wide as its longest row.

        Args:
            targets (`torch.Tensor`): `[batch, rows, slots]`, tier of each slot or `EVICT`.

        Returns:
            `torch.Tensor`: `int64` `[batch]`.
        """
        return self.bytes_with_tables(targets)[1]

    def pages_of(self, targets: torch.Tensor) -> torch.Tensor:
        """Pages that each row would have.

        Args:
            targets (`torch.Tensor`): `[batch, rows, slots]`, tier of each slot or `EVICT`; none above its slot's tier.

        Returns:
            `torch.Tensor`: `int64` `[batch, rows, tiers]`.
        """
        _, counts = count_targets(targets, self.filled, self.tier, self.tiers)
        return (counts.sum(2) + self.slots_per_page - 1) // self.slots_per_page


def ragged_entries(pages: torch.Tensor) -> torch.Tensor:
    """Entries of a table as wide as its longest row that have no page.

    Args:
        pages (`torch.Tensor`): `int64` `[batch, rows, ...]`, pages of each row.

    Returns:
        `torch.Tensor`: `int64` `[batch, ...]`.
    """
    return pages.amax(1) * pages.shape[1] - pages.sum(1)


class Plan(Part, abc.ABC):
    """Decides for every slot. Subclass it as a frozen dataclass with a `kind`, and a recipe can use it.

    Slots only move down: a target above a slot's present tier means that it stays where it is.
    """

    family = "plan"

    @property
    def keeps_or_evicts(self) -> bool:
        """`bool`: Whether it knows one tier only. The sinks may then lie in another, which it is not shown."""
        return False

    @property
    def needs_distortion(self) -> bool:
        """`bool`: Whether the loss of each tier is to be measured on the first chunk."""
        return False

    @property
    def headroom(self) -> float:
        """`float`: Share of the budget that a plan made during decoding leaves free.

        A plan with headroom has nothing to do while the pages fit the budget, and is not asked then.
        """
        return 0.0

    @property
    def leaves_room(self) -> bool:
        """`bool`: Whether it leaves its headroom as room in the pages that rows hold ([`PlanView.room`]); if not, it is
        allowed so many bytes less."""
        return False

    def resting_tiers(self, recipe: "Recipe") -> tuple[int, ...]:
        """The tiers in which it leaves slots whatever comes; new slots pass through the first on their way there.

        Args:
            recipe (`Recipe`): The recipe.

        Returns:
            `tuple[int, ...]`: Indices of tiers; all of them unless the plan knows better.
        """
        return tuple(range(len(recipe.tiers)))

    def check(self, recipe: "Recipe") -> None:
        """Refuses recipes that this plan cannot work with; called when the recipe is made.

        Args:
            recipe (`Recipe`): The recipe.

        Raises:
            ValueError: If the plan needs a budget that is not there, or cannot fill the tiers.
        """
        if recipe.budget is None:
            raise ValueError(f"{type(self).__name__} needs a budget; add budget=0.25, say.")

    @abc.abstractmethod
    def targets(self, view: PlanView) -> torch.Tensor:
        """The decision for every slot.

        Args:
            view (`PlanView`): Every slot of the batch.

        Returns:
            `torch.Tensor`: `int64` or `int8` `[batch, rows, slots]`: the tier to keep each slot in, or `EVICT`;
            anything where `view.filled` is false.
        """


def require_single_tier(plan: Plan, recipe: "Recipe") -> None:
    """Refuses several tiers for plans that only keep or evict.

    Args:
        plan (`Plan`): The plan.
        recipe (`Recipe`): The recipe.

    Raises:
        ValueError: If the recipe has several tiers, and not one of them for the sinks alone.
    """
    if len(recipe.tiers) > 1 and not recipe.sinks_apart:
        raise ValueError(
            f"{type(plan).__name__} only keeps or evicts, so it takes one tier, not {', '.join(recipe.tiers)}; give "
            "one tier, or two and protect={'sinks': 4}, so that the first four tokens alone are stored in the first; "
            "or plan with ThresholdPlan or RateDistortion."
        )
