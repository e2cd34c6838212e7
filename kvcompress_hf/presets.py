"""The named recipes, and how anything a person may write for a recipe becomes one."""

from collections.abc import Mapping
from typing import Any

from kvcompress_hf.recipe import Budget, Protect, Recipe, When, WindowScores

__all__ = ["DEFAULT_PRESET", "get_preset", "presets", "resolve_recipe"]

#: What `patch(model)` uses when no recipe is given.
DEFAULT_PRESET = "k8v4"

_TIER_TEXT = {
    "k8v8": "every slot with 8-bit keys and 8-bit values",
    "k8v4": "every slot with 8-bit keys and 4-bit values (the default)",
    "k4v4": "every slot with 4-bit (rotated) keys and 4-bit values",
    "k4v2": "every slot with 4-bit (rotated) keys and 2-bit values",
    "k2v2": "every slot with 2-bit (rotated) keys and 2-bit values",
}

_PRESETS: dict[str, tuple[Recipe, str]] = {
    "lossless": (
        Recipe(name="lossless"),
        "paged storage in the model's own dtype, nothing lost: the same tokens as the stock cache",
    ),
    **{tier: (Recipe(name=tier, tiers=(tier,)), text) for tier, text in _TIER_TEXT.items()},
    "kv-compress": (
        Recipe(
            name="kv-compress",
            observer=WindowScores(window=32, power=2, pool=7, decode=True),
            protect=Protect(recent=32),
            budget=Budget(0.25),
            when=When(every=16),
        ),
        "KV-Compress (arXiv 2410.00161): squared window attention, whole pages freed per head, one budget for all",
    ),
}


def presets() -> dict[str, str]:
    """The presets by name, each with a one-line description.

    Returns:
        `dict[str, str]`: Name to description.

    Example:

    ```python
    >>> import kvcompress_hf as kvc
    >>> "kv-compress" in kvc.presets()
    True

    ```
    """
    return {name: text for name, (_, text) in _PRESETS.items()}


def get_preset(name: str) -> Recipe:
    """A preset by its name.

    Args:
        name (`str`): One of the names of [`presets`].

    Returns:
        `Recipe`: The preset.

    Raises:
        ValueError: If there is no such preset.
    """
    if name not in _PRESETS:
        raise ValueError(f"Unknown preset {name!r}; the presets are {', '.join(_PRESETS)}.")
    return _PRESETS[name][0]


def resolve_recipe(spec: str | Mapping[str, Any] | Recipe | None = None, **overrides: Any) -> Recipe:
    """A recipe from whatever a person may give for one.

    Args:
        spec (`str`, `dict`, `Recipe` or `None`): A preset name; a dict of recipe parts, where the key `preset`
            names the preset to start from; a recipe; or `None` for the default preset.
        overrides: Parts to replace, as in [`Recipe.with_overrides`].

    Returns:
        `Recipe`: The recipe.

    Raises:
        ValueError: If a preset, part or value is not allowed.
        TypeError: If `spec` is of another type.
    """
    if spec is None:
        recipe = get_preset(DEFAULT_PRESET)
    elif isinstance(spec, Recipe):
        recipe = spec
    elif isinstance(spec, str):
        recipe = get_preset(spec)
    elif isinstance(spec, Mapping):
        parts = dict(spec)
        preset = parts.pop("preset", None)
        recipe = Recipe.from_dict(parts) if preset is None else get_preset(preset).with_overrides(**parts)
    else:
        raise TypeError(f"A recipe is a preset name, a Recipe, a dict or None, got {type(spec).__name__}.")
    return recipe.with_overrides(**overrides) if overrides else recipe
