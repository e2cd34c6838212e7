"""Recipes: how a cache compresses, as five independent choices (`docs/recipes.md`).

A recipe is observer x protect x budget x tiers x when. It is immutable, compares by value, its `repr` is the code
that makes it, and it round-trips through JSON.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvcompress_hf.units import parse_bytes

__all__ = ["Budget", "Protect", "Recipe", "TIERS", "When", "WindowScores"]

#: Storage formats of a packed slot: name to (key bits, value bits); 0 means the model's own dtype.
TIERS: dict[str, tuple[int, int]] = {
    "native": (0, 0),
    "k8v8": (8, 8),
    "k8v4": (8, 4),
    "k4v4": (4, 4),
    "k4v2": (4, 2),
    "k2v2": (2, 2),
}


def _require_int(owner: str, name: str, value: object, low: int, high: int | None = None) -> None:
    allowed = f">= {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"{owner}.{name} is {value!r}; it must be an integer {allowed}.")


@dataclass(frozen=True)
class WindowScores:
    """Observer: what the last queries of the prompt attend to, as in KV-Compress (arXiv 2410.00161, eq. 8-10).

    For every query head: probabilities to the `power`, summed over the last `window` queries, max-pooled over
    neighbouring positions; then summed over the query heads that share a KV head. Later chunks of a prompt replace
    the scores by what their own last queries see.

    Args:
        window (`int`): Number of observing queries at the end of the prompt or chunk.
        power (`int`): 2 squares the probabilities (L2, the paper's default), 1 takes them as they are (L1).
        pool (`int`): Width of the max-pool over positions, odd; 1 switches it off.
        decode (`bool`): Go on adding each decode step's probabilities to the `power` to the slots' scores.
    """

    window: int = 32
    power: int = 2
    pool: int = 7
    decode: bool = True

    def __post_init__(self) -> None:
        _require_int("WindowScores", "window", self.window, 1)
        _require_int("WindowScores", "power", self.power, 1, 2)
        _require_int("WindowScores", "pool", self.pool, 1)
        if self.pool % 2 == 0:
            raise ValueError(f"WindowScores.pool is {self.pool}; it must be odd, so that it is centred on the slot.")
        if not isinstance(self.decode, bool):
            raise ValueError(f"WindowScores.decode is {self.decode!r}; it must be True or False.")


@dataclass(frozen=True)
class Protect:
    """Slots that no plan may touch.

    Args:
        sinks (`int`): The first tokens of each sequence (padding does not count).
        recent (`int`): The newest tokens of each sequence.
    """

    sinks: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        _require_int("Protect", "sinks", self.sinks, 0)
        _require_int("Protect", "recent", self.recent, 0)


@dataclass(frozen=True)
class Budget:
    """How much each sequence may keep, over all its layers and KV heads together.

    Args:
        amount (`float`, `int` or `str`): A float in (0, 1] is a fraction of the bytes a dense cache would take
            (tail, metadata and page rounding counted); an int is tokens per KV head on average (the paper's
            max-cache-tokens); a string with a unit, such as `"512MiB"`, is bytes per sequence.
    """

    amount: float | int | str = 0.25

    def __post_init__(self) -> None:
        amount = self.amount
        if isinstance(amount, bool) or not isinstance(amount, (int, float, str)):
            raise TypeError(
                f"budget is {amount!r}; give a fraction in (0, 1], an integer of tokens, or bytes as in '512MiB'."
            )
        if isinstance(amount, str):
            parse_bytes(amount)
        elif isinstance(amount, int):
            if amount < 1:
                raise ValueError(f"budget is {amount} tokens per KV head; it must be at least 1.")
        elif not 0 < amount <= 1:
            raise ValueError(
                f"budget is {amount}, but a fraction must lie in (0, 1]; write an int for tokens, '512MiB' for bytes."
            )


@dataclass(frozen=True)
class When:
    """When a cache packs and plans.

    Args:
        prefill (`bool`): After the prompt, and after each of its chunks.
        every (`int`): Tokens that gather in the tail before it is packed during decoding, and planned if
            `decode` says so.
        decode (`bool`): Also plan at each packing during decoding (continual), not only after the prompt (once).
    """

    prefill: bool = True
    every: int = 32
    decode: bool = True

    def __post_init__(self) -> None:
        _require_int("When", "every", self.every, 1, 4096)
        for name in ("prefill", "decode"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"When.{name} is {getattr(self, name)!r}; it must be True or False.")


_PARTS: dict[str, type] = {"observer": WindowScores, "protect": Protect, "budget": Budget, "when": When}


@dataclass(frozen=True)
class Recipe:
    """How a cache compresses: observer, protect, budget, tiers and when, freely combined.

    Args:
        name (`str`): For people; presets carry their own name.
        observer (`WindowScores`, *optional*): What is remembered of attention to judge importance.
        protect (`Protect`): Slots that are never evicted.
        budget (`Budget`, *optional*): How much may be kept; without one nothing is evicted.
        tiers (`tuple[str, ...]`): The storage formats of packed slots, best first. One tier for now.
        when (`When`): When the cache packs and plans.
        page_bytes (`int`, *optional*): Bytes of a page; chosen from head_dim, tiers and fields when left out.

    Raises:
        ValueError: For a value out of range, an unknown tier, or parts that make no sense together.

    Example:

    ```python
    >>> from kvcompress_hf import Recipe, get_preset
    >>> recipe = get_preset("kv-compress").with_overrides(budget=1 / 8, tiers="k8v4")
    >>> Recipe.from_json(recipe.to_json()) == recipe
    True

    ```
    """

    name: str = "custom"
    observer: WindowScores | None = None
    protect: Protect = field(default_factory=Protect)
    budget: Budget | None = None
    tiers: tuple[str, ...] = ("native",)
    when: When = field(default_factory=When)
    page_bytes: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"Recipe.name is {self.name!r}; it must be a string.")
        for part, kind in _PARTS.items():
            value = getattr(self, part)
            if value is None and part in ("observer", "budget"):
                continue
            if not isinstance(value, kind):
                raise TypeError(f"Recipe.{part} is {value!r}; it must be a {kind.__name__}.")
        if not isinstance(self.tiers, tuple) or not self.tiers:
            raise TypeError(
                f"Recipe.tiers is {self.tiers!r}; it must be a non-empty tuple of names out of {', '.join(TIERS)}."
            )
        for tier in self.tiers:
            if tier not in TIERS:
                raise ValueError(f"Unknown tier {tier!r}; known tiers are {', '.join(TIERS)}.")
        if len(self.tiers) > 1:
            raise ValueError(
                f"Recipe.tiers is {self.tiers!r}; plans over several tiers are not available yet, give one tier."
            )
        if self.page_bytes is not None:
            _require_int("Recipe", "page_bytes", self.page_bytes, 1)
        if self.budget is not None and self.observer is None:
            raise ValueError(
                f"Recipe {self.name!r} has a budget but no observer to say which slots matter; "
                "start from a preset that evicts, such as 'kv-compress', or add observer=WindowScores()."
            )
        if self.budget is None and self.observer is not None:
            raise ValueError(
                f"Recipe {self.name!r} observes attention but has no budget to use it for; add budget=0.25, say."
            )
        if self.budget is not None and isinstance(self.budget.amount, int):
            least = self.protect.sinks + self.protect.recent
            if self.budget.amount < least:
                raise ValueError(
                    f"budget is {self.budget.amount} tokens per KV head, but {least} are protected "
                    f"(sinks {self.protect.sinks} + recent {self.protect.recent}); raise the budget or protect fewer."
                )

    @property
    def evicts(self) -> bool:
        """`bool`: Whether the recipe ever drops a slot."""
        return self.budget is not None

    def with_overrides(self, **overrides: Any) -> "Recipe":
        """A copy with some parts replaced.

        Args:
            overrides: Names of this class's arguments. `budget` also takes a bare amount, `tiers` a single name,
                and `observer`, `protect`, `when` a dict of their own arguments to change.

        Returns:
            `Recipe`: The changed recipe.

        Raises:
            ValueError: If an override is unknown or its value is not allowed.
        """
        changes = {name: _part(name, getattr(self, name, None), value) for name, value in overrides.items()}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON-able values; the inverse of [`Recipe.from_dict`].

        Returns:
            `dict[str, Any]`: Nested dicts, lists, strings and numbers.
        """
        result = dataclasses.asdict(self)
        result["tiers"] = list(self.tiers)
        return result

    def to_json(self) -> str:
        """The recipe as a JSON string.

        Returns:
            `str`: JSON that [`Recipe.from_json`] reads back to an equal recipe.
        """
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """A recipe from the values of [`Recipe.to_dict`].

        Args:
            values (`Mapping[str, Any]`): Parts by name; parts left out take their defaults.

        Returns:
            `Recipe`: The recipe.

        Raises:
            ValueError: If a name or value is not allowed.
        """
        return cls(**{name: _part(name, None, value) for name, value in values.items()})

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """A recipe from the string of [`Recipe.to_json`].

        Args:
            text (`str`): A JSON object.

        Returns:
            `Recipe`: The recipe.

        Raises:
            ValueError: If the text is not a JSON object of allowed parts.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"A recipe is a JSON object, got {type(values).__name__}.")
        return cls.from_dict(values)


def _part(name: str, current: Any, value: Any) -> Any:
    """One part of a recipe from its short form; a dict changes the arguments it names and keeps the others."""
    parts = [f.name for f in dataclasses.fields(Recipe)]
    if name not in parts:
        raise ValueError(f"Unknown recipe part {name!r}; the parts are {', '.join(parts)}.")
    if name == "tiers":
        return (value,) if isinstance(value, str) else tuple(value)
    if name == "budget" and isinstance(value, (int, float, str)):
        return Budget(value)
    if name in _PARTS and isinstance(value, Mapping):
        kind = _PARTS[name]
        known = [f.name for f in dataclasses.fields(kind)]
        for key in value:
            if key not in known:
                raise ValueError(f"Unknown argument {key!r} of {name}; {kind.__name__} takes {', '.join(known)}.")
        return kind(**value) if current is None else dataclasses.replace(current, **value)
    return value
