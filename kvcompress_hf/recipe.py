"""Recipes: how a cache compresses, as five independent choices (`docs/recipes.md`).

A recipe is observer x protect x budget x tiers x when. It is immutable, compares by value, its `repr` is the code
that makes it, and it round-trips through JSON.
"""

import dataclasses
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from kvcompress_hf.bounded_json import parse_json
from kvcompress_hf.units import parse_bytes
from kvcompress_hf.validation import MOST_TOKENS, check_flags, check_ints, require_int, shown

if TYPE_CHECKING:  # what runs imports nothing of them
    from kvcompress_hf.observers.base import Observer
    from kvcompress_hf.plans.base import Plan

__all__ = [
    "EVICTED",
    "MOST_PAGE_BYTES",
    "POSITIONS",
    "TIERS",
    "Budget",
    "Part",
    "Protect",
    "Recipe",
    "When",
    "require_int",
]

#: Storage formats of a packed slot: name to (key bits, value bits); 0 means the model's own dtype.
TIERS: dict[str, tuple[int, int]] = {
    "native": (0, 0),
    "k8v8": (8, 8),
    "k8v4": (8, 4),
    "k4v4": (4, 4),
    "k4v2": (4, 2),
    "k2v2": (2, 2),
}


#: Most bytes of a page; what is larger makes every row pay for memory that it does not fill.
MOST_PAGE_BYTES = 2**24

#: How far what is kept looks from the next query: as far as it was in the text, or as if nothing had been between.
POSITIONS = ("absolute", "reindexed")

#: What stays of evicted slots: nothing, or of each row their mean key, their mean value and their number.
EVICTED = ("forgotten", "mean")

# Of a recipe's JSON, which may come from a stranger. The longest preset takes 1 kB, 30 values and a depth of 2.
_MOST_BYTES = 64 * 1024
_MOST_VALUES = 1000
_MOST_DEPTH = 8


#: Where the kinds that come with the package are defined; imported when one is first asked for by name.
_BUILT_IN = {"observer": "kvcompress_hf.observers", "plan": "kvcompress_hf.plans"}


class Part:
    """Base of the pluggable parts of a recipe. A subclass is a frozen dataclass with a `kind` of its own.

    The `kind` is what JSON calls it; defining the subclass makes it known. `Observer` (`observers/base.py`) and `Plan`
    (`plans/base.py`) are the two families.
    """

    kind: ClassVar[str] = ""
    family: ClassVar[str] = ""
    _known: ClassVar[dict[tuple[str, str], type["Part"]]] = {}

    def check(self, recipe: "Recipe") -> None:
        """Refuses recipes that this part makes no sense in; called when the recipe is made.

        Args:
            recipe (`Recipe`): The recipe.

        Raises:
            ValueError: If other parts of the recipe do not fit this one.
        """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes the class known by its `kind`.

        Raises:
            TypeError: If the `kind` is no string.
            ValueError: If another class has that `kind`. The same class may be defined again, as in a notebook.
        """
        super().__init_subclass__(**kwargs)
        if not cls.__dict__.get("kind"):
            return
        if not isinstance(cls.kind, str):
            raise TypeError(
                f"{cls.__qualname__}.kind is {cls.kind!r}; it must be a string, which JSON calls the class by, as in "
                f'kind = "{cls.__name__.lower()}".'
            )
        other = Part._known.get((cls.family, cls.kind))
        if other is not None and _place(other) != _place(cls):
            raise ValueError(
                f"{cls.__qualname__} has the kind {cls.kind!r}, which is that of the {cls.family} {_place(other)}: "
                "recipes in JSON and saved caches would change their meaning. Give it a kind of its own."
            )
        Part._known[cls.family, cls.kind] = cls

    def check_class(self) -> None:
        """Refuses a part whose class could not be found again from JSON, or could change after it was checked.

        Raises:
            TypeError: If the class is not a frozen dataclass, or has no `kind` of its own.
        """
        mine = type(self)
        parameters = mine.__dict__.get("__dataclass_params__")
        if parameters is None or not parameters.frozen:
            raise TypeError(
                f"{mine.__name__} must be a frozen dataclass, so that recipes compare by value and can be written to "
                f"JSON: put @dataclass(frozen=True) above class {mine.__name__}."
            )
        if not mine.__dict__.get("kind"):
            taken = f", and {mine.kind!r} is that of the class it derives from" if mine.kind else ""
            raise TypeError(
                f'{mine.__name__} has no kind of its own{taken}; give it one, as in kind = "{mine.__name__.lower()}".'
            )

    @classmethod
    def make(cls, family: str, values: Mapping[str, Any]) -> "Part":
        """A part from its JSON form.

        Args:
            family (`str`): `"observer"` or `"plan"`.
            values (`Mapping[str, Any]`): `kind` and the part's own arguments.

        Returns:
            `Part`: A part of the class that has this `kind`.

        Raises:
            ValueError: If there is no such kind or argument.
        """
        arguments = dict(values)
        kind = arguments.pop("kind", None)
        known = cls.kinds(family)
        if str(kind) not in known:
            raise ValueError(
                f"Unknown kind {kind!r} of {family}; the kinds are {', '.join(known)}. One of your own is known "
                "once the module with its class has been imported."
            )
        return _construct(family, known[str(kind)], arguments)

    @classmethod
    def kinds(cls, family: str) -> dict[str, type["Part"]]:
        """The registry: every class that a recipe can name, those of the user included.

        Args:
            family (`str`): `"observer"` or `"plan"`.

        Returns:
            `dict[str, type]`: Class by `kind`, in the order of the kinds.
        """
        if family in _BUILT_IN:
            importlib.import_module(_BUILT_IN[family])
        return {kind: part for (of, kind), part in sorted(cls._known.items()) if of == family}


def _place(kind: type) -> str:
    """Where a class is defined, which is what tells it from others of its name."""
    return f"{kind.__module__}.{kind.__qualname__}"


@dataclass(frozen=True)
class Protect:
    """Slots that no plan may touch.

    Args:
        sinks (`int`): The first tokens of each sequence (padding does not count).
        recent (`int`): The newest tokens of each sequence.
        prompt (`bool`): The whole prompt: everything up to the last tokens that came in one piece. The budget then is
            for what is decoded after it, and the prompt comes on top.
    """

    sinks: int = 0
    recent: int = 0
    prompt: bool = False

    def __post_init__(self) -> None:
        for name in ("sinks", "recent"):
            require_int("Protect", name, getattr(self, name), 0)
        check_flags(self, "prompt")


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
                f"budget is {shown(amount)}; give a fraction in (0, 1], an integer of tokens, or bytes as in '512MiB'."
            )
        if isinstance(amount, str):
            try:
                parse_bytes(amount)
            except ValueError as error:
                hint = " In a budget, a fraction (1 / 8) and tokens per KV head (512) are numbers, without quotes."
                raise ValueError(f"{error}{hint}") from None
        elif isinstance(amount, int):
            if amount < 1:
                raise ValueError(f"budget is {shown(amount)} tokens per KV head; it must be at least 1.")
            if amount > MOST_TOKENS:
                raise ValueError(f"budget is {shown(amount)} tokens per KV head; it must be at most {MOST_TOKENS}.")
            object.__setattr__(self, "amount", int(amount))
        elif not 0 < amount <= 1:
            raise ValueError(
                f"budget is {amount}, but a fraction must lie in (0, 1]; write an int for tokens, '512MiB' for bytes."
            )
        else:
            object.__setattr__(self, "amount", float(amount))


@dataclass(frozen=True)
class When:
    """When a cache packs and plans.

    Args:
        prefill (`bool`): After the prompt, and after each of its chunks.
        every (`int`): Tokens that gather in the tail before it is packed during decoding, and planned if
            `decode` says so.
        decode (`bool`): Also plan at each packing during decoding (continual), not only after the prompt (once).
        interval (`int`, *optional*): Tokens to be decoded since the last plan before the next packing plans again, so
            the budget may be exceeded by this many in between; `None` plans at each packing. Every decode step adds one
            token to each sequence, so this is also the number of steps.
        tight (`int`, *optional*): In place of a larger `every` where slots stay in some of the tiers only, as those of
            `auto` do below a tenth of the dense bytes: the tail's room comes out of the budget, and is much of it.
    """

    prefill: bool = True
    every: int = 32
    decode: bool = True
    interval: int | None = None
    tight: int | None = None

    def __post_init__(self) -> None:
        require_int("When", "every", self.every, 1, 4096)
        check_ints(self, "interval", "tight", low=1)
        check_flags(self, "prefill", "decode")
        if self.interval is not None and not self.decode:
            raise ValueError(f"When(interval={self.interval}, decode=False): nothing is planned while decoding.")


_PARTS: dict[str, type] = {"protect": Protect, "budget": Budget, "when": When}
_FAMILIES = ("observer", "plan")
#: How each part is written, for messages.
_WRITTEN = {
    "protect": "kvc.Protect(recent=32)",
    "budget": "kvc.Budget(1 / 4)",
    "when": "kvc.When(every=32)",
    "observer": "kvc.WindowScores()",
    "plan": "kvc.LowestPlan()",
}
_SHORT_FORM = ". patch() and with_overrides() take short forms too: budget=0.25, when={'every': 32}."


@dataclass(frozen=True)
class Recipe:
    """How a cache compresses: observer, protect, budget and plan, tiers, and when, freely combined.

    Args:
        name (`str`): For people; presets carry their own name.
        observer (`Observer`, *optional*): What is remembered of attention to judge importance.
        protect (`Protect`): Slots that are never evicted.
        budget (`Budget`, *optional*): How much may be kept.
        plan (`Plan`, *optional*): Which slots go, and which move to a lower tier.
        tiers (`tuple[str, ...]`): The storage formats of packed slots, best first; new slots enter the first. Without a
            plan, or with one that keeps or evicts, there may be two where `protect` names sinks: these alone enter the
            first, all others the second.
        when (`When`): When the cache packs and plans.
        page_bytes (`int`, *optional*): Bytes of a page; chosen from head_dim, tiers and fields when left out.
        centre_keys (`bool`, *optional*): Whether what the keys of a head have in common is taken off before they are
            stored, which attention does not notice; when left out, where a tier has quantised keys.
        positions (`str`): `"absolute"`: a kept token stays as far from the next query as it was in the text.
            `"reindexed"`: as far as if what was evicted had never been, as in StreamingLLM (arXiv 2309.17453); for the
            tier `native` and models with plain rotary embedding.
        evicted (`str`): `"forgotten"`: nothing stays of what a plan evicts. `"mean"`: of each row one key and one value
            do, the means of what was evicted, and attention takes them for as many slots as there were; layers with a
            sliding window forget all the same. For absolute positions.

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
    observer: "Observer | None" = None
    protect: Protect = field(default_factory=Protect)
    budget: Budget | None = None
    plan: "Plan | None" = None
    tiers: tuple[str, ...] = ("native",)
    when: When = field(default_factory=When)
    page_bytes: int | None = None
    centre_keys: bool | None = None
    positions: str = "absolute"
    evicted: str = "forgotten"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"Recipe.name is {self.name!r}; it must be a string.")
        for name, kind in _PARTS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and not (value is None and name == "budget"):
                raise TypeError(
                    f"Recipe.{name} is {value!r}; it must be a kvc.{kind.__name__}, as in {_WRITTEN[name]}{_SHORT_FORM}"
                )
        for family in _FAMILIES:
            value = getattr(self, family)
            if value is not None and (not isinstance(value, Part) or value.family != family):
                example = _WRITTEN[family]
                raise TypeError(
                    f"Recipe.{family} is {value!r}; it must be None, or made of one of the {family} classes, as in "
                    f"{example}{_SHORT_FORM}"
                )
            if value is not None:
                value.check_class()
        self._check_tiers()
        if self.page_bytes is not None:
            require_int("Recipe", "page_bytes", self.page_bytes, 1, MOST_PAGE_BYTES)
            if self.page_bytes % 64:
                raise ValueError(f"Recipe.page_bytes is {self.page_bytes}; it must be a multiple of 64.")
        if self.centre_keys is not None and not isinstance(self.centre_keys, bool):
            raise ValueError(f"Recipe.centre_keys is {shown(self.centre_keys)}; it must be True, False or None.")
        self._check_positions()
        self._check_evicted()
        if (self.budget is not None or self.plan is not None) and self.observer is None:
            raise ValueError(
                f"Recipe {self.name!r} has a budget or a plan but no observer to say which slots matter; "
                'start from a preset that evicts, such as {"preset": "auto", "budget": 0.25}, or add an observer.'
            )
        if self.observer is not None and self.plan is None:
            raise ValueError(
                f"Recipe {self.name!r} observes attention but has no plan to use it for; add one, such as "
                f"plan={_WRITTEN['plan']}."
            )
        for part in (self.observer, self.plan):
            if part is not None:
                part.check(self)
        if self.budget is not None and isinstance(self.budget.amount, int):
            least = self.protect.sinks + self.protect.recent
            if self.budget.amount < least:
                raise ValueError(
                    f"budget is {self.budget.amount} tokens per KV head, but {least} are protected "
                    f"(sinks {self.protect.sinks} + recent {self.protect.recent}); raise the budget or protect fewer."
                )

    def _check_tiers(self) -> None:
        if not isinstance(self.tiers, tuple) or not self.tiers:
            names = ", ".join(TIERS)
            raise TypeError(
                f'Recipe.tiers is {self.tiers!r}; it must be a non-empty tuple of names, as in ("k8v4",): {names}.'
            )
        for tier in self.tiers:
            if tier not in TIERS:
                raise ValueError(f"Unknown tier {tier!r}; known tiers are {', '.join(TIERS)}.")
        if len(self.tiers) > 4:
            raise ValueError(f"Recipe.tiers names {len(self.tiers)} tiers; a page layout holds at most 4.")
        order = list(TIERS)
        if sorted(set(self.tiers), key=order.index) != list(self.tiers):
            raise ValueError(f"Recipe.tiers is {self.tiers!r}; give each tier once, best first: {', '.join(TIERS)}.")
        if len(self.tiers) > 1 and self.plan is None and not self.sinks_apart:
            raise ValueError(
                f"Recipe.tiers is {self.tiers!r}, but without a plan no slot would ever leave the first. Give one "
                "tier; or two and protect={'sinks': 4}, so that the first four tokens alone are stored in the first."
            )

    def _check_positions(self) -> None:
        if self.positions not in POSITIONS:
            raise ValueError(f"Recipe.positions is {self.positions!r}; it must be one of {', '.join(POSITIONS)}.")
        if self.positions == "absolute":
            return
        if self.plan is None:
            raise ValueError(
                f"Recipe {self.name!r} has positions='reindexed' but no plan: nothing is evicted, so there is nothing "
                "to re-index. Start from a preset that evicts, such as 'streaming'."
            )
        if self.tiers != ("native",):
            raise ValueError(
                f"Recipe {self.name!r} has positions='reindexed' and tiers {self.tiers!r}: re-indexing rotates stored "
                "keys, and a quantised key would be rounded once more at each eviction. Use tiers='native'."
            )
        if self.centre_keys:
            raise ValueError(
                f"Recipe {self.name!r} has positions='reindexed' and centre_keys=True: re-indexing rotates whole keys. "
                "Leave centre_keys out."
            )

    def _check_evicted(self) -> None:
        if self.evicted not in EVICTED:
            raise ValueError(f"Recipe.evicted is {shown(self.evicted)}; it must be one of {', '.join(EVICTED)}.")
        if self.evicted == "forgotten":
            return
        if self.plan is None:
            raise ValueError(
                f"Recipe {self.name!r} has evicted='mean' but no plan: nothing is ever evicted. Start from a preset "
                "that evicts, such as 'auto', or leave evicted out."
            )
        if self.positions != "absolute":
            raise ValueError(
                f"Recipe {self.name!r} has evicted='mean' and positions={self.positions!r}: the keys in a mean come "
                "from many places and cannot be turned together. Use positions='absolute', or leave evicted out."
            )

    @property
    def sinks_apart(self) -> int:
        """`int`: Tokens at the beginning of each sequence that alone enter the first tier, and all others the second;
        0 where every token enters the first."""
        alone = self.plan is None or self.plan.keeps_or_evicts
        return self.protect.sinks if alone and len(self.tiers) == 2 else 0

    @property
    def resting_tiers(self) -> tuple[int, ...]:
        """`tuple[int, ...]`: Indices of the tiers in which slots stay; those of the others move on at the next plan."""
        return tuple(range(len(self.tiers))) if self.plan is None else self.plan.resting_tiers(self)

    @property
    def evicts(self) -> bool:
        """`bool`: Whether the recipe ever drops a slot or moves it to a lower tier."""
        return self.plan is not None

    @property
    def changes_slots(self) -> bool:
        """`bool`: Whether packing or planning changes what later tokens attend to."""
        return self.evicts or self.tiers != ("native",)

    @property
    def centres_keys(self) -> bool:
        """`bool`: Whether keys are stored without what those of a head have in common; see `centre_keys`."""
        if self.centre_keys is not None:
            return self.centre_keys
        return any(TIERS[name][0] for name in self.tiers)

    @property
    def feeds_back(self) -> bool:
        """`bool`: Whether keys of 4 bits and fewer are rounded with feedback; see [`Recipe.keeps_feedback`]."""
        return any(0 < TIERS[name][0] <= 4 for name in self.tiers)

    @property
    def keeps_feedback(self) -> bool:
        """`bool`: Whether that goes on after the prompt. Its factors take the room of four tokens per row, and a recipe
        that evicts keeps more tokens instead."""
        return self.feeds_back and not self.evicts

    @property
    def keeps_mean(self) -> bool:
        """`bool`: Whether a mean stays of what is evicted; see `evicted`."""
        return self.evicted == "mean"

    @property
    def rotates_values(self) -> bool:
        """`bool`: Whether values are kept Hadamard-rotated: where some are of 2 bits."""
        return any(TIERS[name][1] == 2 for name in self.tiers)

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
        if not self.keeps_mean:  # so that packages of before this choice go on reading all others
            del result["evicted"]
        if self.when.tight is None:
            del result["when"]["tight"]
        for family in _FAMILIES:
            part = getattr(self, family)
            if part is not None:
                result[family] = {"kind": part.kind, **result[family]}
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
            TypeError: If it is no text.
            ValueError: If the text is not a JSON object of allowed parts, or larger than any recipe is.
        """
        if not isinstance(text, (str, bytes)):
            raise TypeError(f"from_json() takes the text of a JSON object, got {type(text).__name__}.")
        try:
            values = parse_json(text, most_bytes=_MOST_BYTES, most_values=_MOST_VALUES, most_depth=_MOST_DEPTH)
        except ValueError as error:
            raise ValueError(f"This is not the JSON of a recipe: {error}.") from error
        if not isinstance(values, dict):
            raise ValueError(f"A recipe is a JSON object, got {type(values).__name__}.")
        return cls.from_dict(values)


def _part(name: str, current: Any, value: Any) -> Any:
    """One part of a recipe from its short form; a dict changes the arguments it names and keeps the others."""
    parts = [f.name for f in dataclasses.fields(Recipe)]
    if name not in parts:
        raise ValueError(f"Unknown recipe part {name!r}; the parts are {', '.join(parts)}.")
    if _is_deeper(value, _MOST_DEPTH):
        raise ValueError(f"Recipe.{name} holds lists or dicts nested more than {_MOST_DEPTH} deep; no part does.")
    if name == "tiers":
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else value
    if name == "budget" and isinstance(value, (int, float, str)):
        return Budget(value)
    if name in _FAMILIES and isinstance(value, Mapping):
        if current is None or value.get("kind", current.kind) != current.kind:
            return Part.make(name, value)
        return _construct(name, type(current), {**_arguments(current), **value})
    if name in _PARTS and isinstance(value, Mapping):
        return _construct(name, _PARTS[name], value if current is None else {**_arguments(current), **value})
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and dicts are nested deeper than that."""
    if not isinstance(value, (Mapping, list, tuple)):
        return False
    inner = value.values() if isinstance(value, Mapping) else value
    return depth == 0 or any(_is_deeper(each, depth - 1) for each in inner)


def _arguments(part: Any) -> dict[str, Any]:
    return {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}


def _construct(name: str, kind: type, values: Mapping[str, Any]) -> Any:
    known = [f.name for f in dataclasses.fields(kind)]
    values = {key: value for key, value in values.items() if key != "kind"}
    for key in values:
        if key not in known:
            raise ValueError(f"Unknown argument {key!r} of {name}; {kind.__name__} takes {', '.join(known)}.")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
