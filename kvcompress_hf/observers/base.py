"""What an observer is: a typed part of a recipe that says which statistics to keep and how they rank slots."""

import abc
import math
import operator
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvcompress_hf.observers.look import Look
from kvcompress_hf.paging.key_turn import Rotation
from kvcompress_hf.paging.new_tokens import NewTokens
from kvcompress_hf.paging.slots import Slots
from kvcompress_hf.paging.store import PagedStore
from kvcompress_hf.recipe import Part

if TYPE_CHECKING:
    from kvcompress_hf.recipe import Recipe


#: Where what a chunk had in 0.1 under these names is now.
_NAMES_OF_0_1 = {
    "query": "new.query",
    "keys": "new.key",
    "values": "new.value",
    "position": "new.position",
    "valid": "new.valid",
    "scale": "new.logits.scale",
    "softcap": "new.logits.softcap",
    "window": "new.logits.window",
    "sinks": "new.logits.sinks",
}


@dataclass(frozen=True)
class Chunk:
    """Several new tokens of one layer, before they are stored, and what is stored already.

    The names of 0.1 (`chunk.keys`, `chunk.scale`, ...) still work, with a warning, for one release.

    Args:
        store (`PagedStore`): What is stored already.
        layer (`int`): Index of the layer in the store.
        new (`NewTokens`): The new tokens, to be read only: `new.query`, `new.key`, `new.value`, `new.valid`,
            `new.position`, `new.logits`. Keys are as they will be stored (`store.whole(layer, new.key)` gives back what
            the model made, which [`Observer.describe`] gets).
        rotation (`Rotation`, *optional*): How position turns the queries of this layer; `None` where that is not
            known, and for observers that do not ask for it.
    """

    store: PagedStore
    layer: int
    new: NewTokens
    rotation: Rotation | None = None

    def __getattr__(self, name: str) -> Any:  # only asked for what is not there
        place = _NAMES_OF_0_1.get(name)
        if place is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        warnings.warn(
            f"chunk.{name} is now chunk.{place}; the old name will be removed in the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        return operator.attrgetter(place)(self)


class Observer(Part, abc.ABC):
    """Which statistics are kept per slot, and how they become importance.

    Subclass it as a frozen dataclass with a `kind`, and a recipe can use it (`docs/adding.md`).
    """

    family = "observer"

    @property
    @abc.abstractmethod
    def fields(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: Names of the float32 slot fields it keeps, at most three."""

    def check_class(self) -> None:
        """Refuses classes whose properties contradict each other; called when a recipe is made.

        Raises:
            TypeError: If `fields` is not a tuple of names.
            ValueError: If there are more than three, or another property names a field that is not among them.
        """
        super().check_class()
        name, fields = type(self).__name__, self.fields
        if not isinstance(fields, tuple) or not all(isinstance(each, str) for each in fields):
            raise TypeError(f'{name}.fields is {fields!r}; it must be a tuple of names, as in ("score",).')
        if len(set(fields)) < len(fields) or "position" in fields:
            raise ValueError(
                f"{name}.fields is {fields!r}; give each name once, and not 'position': it is always kept."
            )
        if len(fields) > 3:
            raise ValueError(f"{name}.fields names {len(fields)} fields, {fields!r}; a slot has room for three.")
        used: dict[str, tuple[str | None, ...]] = {"describes": self.describes, "fading": self.fading[0]}
        used |= {"sum_field": (self.sum_field,), "square_field": (self.square_field,)}
        if set(self.looks) & {*fields, "position"}:
            raise ValueError(f"{name}.looks is {self.looks!r}, but fields that are kept {fields!r} are not made anew.")
        if self.looks and not (self.learns_centres or self.newest_queries):
            raise ValueError(f"{name}.looks is {self.looks!r}; set learns_centres or newest_queries to judge keys by.")
        for what, names in used.items():
            unknown = [each for each in names if each is not None and each not in fields]
            if unknown:
                raise ValueError(f"{name}.{what} names {unknown[0]!r}, which is not among its fields {fields!r}.")

    @property
    def describes(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: Those of the fields that follow from keys and values alone, by [`Observer.describe`]."""
        return ()

    def describe(
        self, keys: torch.Tensor, values: torch.Tensor, key_mean: torch.Tensor, value_mean: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The fields that follow from keys and values alone, made when slots are packed.

        Args:
            keys (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`.
            values (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`.
            key_mean (`torch.Tensor`): float32 `[batch, kv_heads, 1, head_dim]`, over all tokens of the sequence so far.
            value_mean (`torch.Tensor`): Likewise for values.

        Returns:
            `dict[str, torch.Tensor]`: Fields by name, float32 `[batch, kv_heads, tokens]`.
        """
        return {}

    @property
    def sum_field(self) -> str | None:
        """`str` or `None`: The field to which each decode step adds its probabilities, summed over query heads."""
        return None

    @property
    def square_field(self) -> str | None:
        """`str` or `None`: The field to which each decode step adds its squared probabilities."""
        return None

    @property
    def last_only(self) -> bool:
        """`bool`: Whether only the last step before a plan counts."""
        return False

    @property
    def fading(self) -> tuple[tuple[str, ...], float]:
        """`tuple[tuple[str, ...], float]`: Fields that fade while decoding, and the factor per step."""
        return (), 1.0

    @property
    def observes_steps(self) -> bool:
        """`bool`: Whether each decode step is a chunk of one token for [`Observer.observe`], because the decode kernel
        cannot add up what is needed. Costs a second pass over the keys per step."""
        return False

    @property
    def needs_rotary(self) -> bool:
        """`bool`: Whether it turns queries to other positions, with [`Chunk`]`.rotation`."""
        return False

    @property
    def learns_centres(self) -> bool:
        """`bool`: Whether the mean query before rotary embedding, and mean norms, are learnt for every query head."""
        return False

    @property
    def newest_queries(self) -> int:
        """`int`: How many of the newest queries are kept for every query head."""
        return 0

    @property
    def looks(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: Fields that [`Observer.look`] makes from stored keys when a plan is due. They take no
        room in slots, and [`Observer.importance`] finds them among the others."""
        return ()

    def look(self, look: Look) -> dict[str, torch.Tensor]:
        """Judges the stored keys of a layer by what is remembered of its queries; called when a plan is due.

        Args:
            look (`Look`): Everything the layer holds.

        Returns:
            `dict[str, torch.Tensor]`: The fields of `looks`, float32 `[batch, kv_heads, slots]`; anything where
            nothing is stored.
        """
        return {}

    @property
    def reads_again(self) -> int | None:
        """`int` or `None`: Tokens of a chunk in which a prompt is read a second time before it is planned for."""
        return None

    def observe_again(self, chunk: Chunk) -> None:
        """Looks at tokens of the prompt that are read a second time; updates the fields of what is stored.

        Args:
            chunk (`Chunk`): The tokens, as if they came next. They are not stored.
        """

    @property
    def scores_decoded(self) -> bool:
        """`bool`: Whether decoded tokens get a score, so that plans during decoding can judge them."""
        return True

    def check(self, recipe: "Recipe") -> None:
        """Refuses recipes that this observer cannot serve; called when the recipe is made.

        Args:
            recipe (`Recipe`): The recipe.

        Raises:
            ValueError: If the recipe plans during decoding and decoded tokens get no score.
        """
        if recipe.when.decode and not self.scores_decoded:
            raise ValueError(
                f"When(decode=True) plans over decoded tokens, but this {type(self).__name__} gives them no score, so "
                "they would always go first; use when={'decode': False}, or an observer that scores decode steps."
            )

    def spread(self, slots: Slots) -> torch.Tensor | None:
        """How unsettled the importance of each slot is, for plans that protect such slots.

        Args:
            slots (`Slots`): Every stored slot.

        Returns:
            `torch.Tensor` or `None`: float32 `[batch, rows, slots]`; `None` if the observer cannot tell.
        """
        return None

    @abc.abstractmethod
    def observe(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """Looks at a chunk of a prompt; may update the fields of what is stored.

        Args:
            chunk (`Chunk`): The new tokens.

        Returns:
            `dict[str, torch.Tensor]`: The other fields of the new tokens, float32 `[batch, kv_heads, tokens]`.
        """

    @abc.abstractmethod
    def importance(self, slots: Slots) -> torch.Tensor:
        """Ranks slots: what has the least importance goes first.

        Args:
            slots (`Slots`): Every stored slot.

        Returns:
            `torch.Tensor`: float32 `[batch, rows, slots]`; anything where nothing is stored.
        """


def queries_that_saw(slots: Slots, observing: int, fading: float = 1.0) -> torch.Tensor:
    """How many queries contributed to a slot's running statistics.

    Args:
        slots (`Slots`): Every stored slot.
        observing (`int`): Queries of the prompt that were observed at most.
        fading (`float`): Factor per decode step by which what was seen counts less.

    Returns:
        `torch.Tensor`: float32 `[batch, rows, slots]`, at least 1: for a slot of the prompt the observing queries
        from itself on and every decode step; for a decoded slot the steps since, its own included.
    """
    in_prompt = (slots.prompt - slots.positions).clamp(min=0, max=observing)
    decoded = slots.seen - slots.positions.clamp(min=slots.prompt)
    if fading == 1:
        return (in_prompt + decoded).clamp(min=1).float()
    steps = max(slots.seen - slots.prompt, 0)
    # The sum of fading**i over the decode steps; by expm1, because fading may differ from 1 by less than float32 sees.
    faded = torch.expm1(decoded.float() * math.log(fading)) / (fading - 1)
    return (in_prompt * fading**steps + faded).clamp(min=1)
