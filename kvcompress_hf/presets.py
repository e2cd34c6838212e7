"""The named recipes, and how anything a person may write for a recipe becomes one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvcompress_hf.observers.centres import QueryCentres
from kvcompress_hf.observers.expected import ExpectedAttention
from kvcompress_hf.observers.per_query import PersistenceScores
from kvcompress_hf.observers.reconstruction import ReconstructionScores
from kvcompress_hf.observers.redundancy import RedundancyAware
from kvcompress_hf.observers.running import RunningScores
from kvcompress_hf.observers.simple import Chance, KeyDiff, Recency
from kvcompress_hf.observers.window import WindowScores
from kvcompress_hf.plans.kv_compress import PagePlan
from kvcompress_hf.plans.lowest import LowestPlan
from kvcompress_hf.plans.rate_distortion import RateDistortion
from kvcompress_hf.plans.thresholds import ThresholdPlan
from kvcompress_hf.recipe import TIERS, Budget, Protect, Recipe, When

__all__ = ["DEFAULT_PRESET", "get_preset", "presets", "resolve_recipe", "resolve_rows"]

#: What `patch(model)` uses when no recipe is given: it keeps every token.
DEFAULT_PRESET = "k8v4"
#: What `patch(model, budget=1 / 8)` uses: a budget, and no recipe to say how to meet it.
DEFAULT_WITH_BUDGET = "auto"

_TIER_TEXT = {
    "k8v8": "every slot with 8-bit keys and 8-bit values",
    "k8v4": "every slot with 8-bit keys and 4-bit values",
    "k4v4": "every slot with 4-bit (rotated) keys and 4-bit values, but for the first four tokens",
    "k4v2": "every slot with 4-bit (rotated) keys and 2-bit values, but for the first four tokens",
    "k2v2": "every slot with 2-bit (rotated) keys and 2-bit values, but for the first four tokens",
}
# On real attention 8-bit keys pay from about 1/8 of the dense bytes on; below, more tokens with 4-bit keys do. The tail
# and what else is not pages takes a hundredth of the dense bytes at 1,000 tokens, so the border lies a little lower.
# 2-bit values never paid, as they were coded until 2026-12-01 (docs/real_models.md).
_RATE_DISTORTION = RateDistortion(small=0.1, small_tiers=1)
_SNAPKV = WindowScores(window=32, power=1, pool=7, decode=False)


def _whole(tier: str) -> Recipe:
    """Every token in one tier; with keys of 4 bits or fewer the first four, which most heads look at, as they are."""
    if TIERS[tier][0] > 4:
        return Recipe(name=tier, tiers=(tier,))
    return Recipe(name=tier, tiers=("native", tier), protect=Protect(sinks=4))


_PRESETS: dict[str, tuple[Recipe, str]] = {
    "lossless": (
        Recipe(name="lossless"),
        "paged storage in the model's own dtype, nothing dropped: in float32 the stock model's tokens, in 16 bits the "
        "same arithmetic within rounding",
    ),
    **{tier: (_whole(tier), text) for tier, text in _TIER_TEXT.items()},
    "auto": (
        Recipe(
            name="auto",
            observer=WindowScores(window=32, power=2, pool=1, mean=True, non_causal=True, foresee=True),
            protect=Protect(sinks=4, recent=16),
            budget=Budget(0.25),
            plan=_RATE_DISTORTION,
            tiers=("k8v4", "k4v4", "k4v2"),
            when=When(every=8, tight=4),
        ),
        "rate-distortion: each slot in the tier where its importance buys the most per byte, one multiplier for all",
    ),
    "auto-kvzip": (
        Recipe(
            name="auto-kvzip",
            observer=ReconstructionScores(score="square"),
            protect=Protect(sinks=4, recent=32),
            budget=Budget(0.25),
            plan=replace(_RATE_DISTORTION, kappa=1.0),
            tiers=("k8v4", "k4v4"),
            when=When(every=8),
        ),
        "as auto, with scores from reading the prompt twice: for documents that are asked about later",
    ),
    "kv-compress": (
        Recipe(
            name="kv-compress",
            observer=WindowScores(window=32, power=2, pool=7),
            protect=Protect(recent=32),
            budget=Budget(0.25),
            plan=PagePlan(),
            when=When(every=16),
        ),
        "KV-Compress (arXiv 2410.00161): squared window attention, whole pages freed per head, one budget for all",
    ),
    "leankv": (
        Recipe(
            name="leankv",
            observer=WindowScores(window=64, power=1, pool=1, mean=True),
            protect=Protect(recent=64),
            plan=ThresholdPlan(alpha_high=1.0, alpha_low=0.02),
            tiers=("k8v4", "k4v2"),
            when=When(every=16),
        ),
        "LeanKV / DiffKV (arXiv 2412.03131): K8V4, K4V2 or evicted by multiples of the uniform attention",
    ),
    "roco": (
        Recipe(
            name="roco",
            observer=RunningScores(score="mean", std=True),
            protect=Protect(sinks=4, recent=10),
            budget=Budget(0.5),
            plan=LowestPlan(protect_unsettled=64),
            when=When(every=16),
        ),
        "RoCo (arXiv 2402.06262): lowest mean attention goes, the highest standard deviations are safe",
    ),
    "h2o": (
        Recipe(
            name="h2o",
            observer=RunningScores(score="sum"),
            protect=Protect(recent=32),
            budget=Budget(0.5),
            plan=LowestPlan(),
            when=When(every=16),
        ),
        "H2O (arXiv 2306.14048): lowest accumulated attention goes, recent tokens stay",
    ),
    "tova": (
        Recipe(
            name="tova",
            observer=RunningScores(score="last"),
            budget=Budget(0.5),
            plan=LowestPlan(),
            when=When(every=16),
        ),
        "TOVA (arXiv 2401.06104): what the last query attends to least goes",
    ),
    "scissorhands": (
        Recipe(
            name="scissorhands",
            observer=PersistenceScores(window=400),
            protect=Protect(recent=10),
            budget=Budget(0.5),
            plan=LowestPlan(),
            when=When(every=16),
        ),
        "Scissorhands (arXiv 2305.17118): what most queries gave less than 1/n of their attention goes",
    ),
    "streaming": (
        Recipe(
            name="streaming",
            observer=Recency(),
            protect=Protect(sinks=4),
            budget=Budget(0.5),
            plan=LowestPlan(),
            when=When(every=16),
        ),
        "StreamingLLM (arXiv 2309.17453), absolute positions by default: the first four and the newest tokens stay",
    ),
    "recency": (
        Recipe(name="recency", observer=Recency(), budget=Budget(0.5), plan=LowestPlan(), when=When(every=16)),
        "the newest tokens stay",
    ),
    "random": (
        Recipe(
            name="random",
            observer=Chance(),
            protect=Protect(sinks=4, recent=32),
            budget=Budget(0.5),
            plan=LowestPlan(),
            when=When(every=16),
        ),
        "a random choice, the baseline",
    ),
    "snapkv": (
        Recipe(
            name="snapkv",
            observer=_SNAPKV,
            protect=Protect(recent=32),
            budget=Budget(0.25),
            plan=LowestPlan(),
            when=When(every=8, decode=False),
        ),
        "SnapKV (arXiv 2404.14469): pooled window attention, the same number in every head, once after the prompt",
    ),
    "pyramidkv": (
        Recipe(
            name="pyramidkv",
            observer=_SNAPKV,
            protect=Protect(recent=32),
            budget=Budget(0.25),
            plan=LowestPlan(pyramid=0.8),
            when=When(every=8, decode=False),
        ),
        "PyramidKV (arXiv 2406.02069): as SnapKV, with more for the first layers and less for the last",
    ),
    "ada-snapkv": (
        Recipe(
            name="ada-snapkv",
            observer=_SNAPKV,
            protect=Protect(recent=32),
            budget=Budget(0.25),
            plan=LowestPlan(scope="layer", floor=0.2),
            when=When(every=8, decode=False),
        ),
        "Ada-KV (arXiv 2407.11550) on SnapKV: the heads of a layer share its budget, each with a floor",
    ),
    "kvzip": (
        Recipe(
            name="kvzip",
            observer=ReconstructionScores(),
            protect=Protect(recent=32),
            budget=Budget(0.25),
            plan=LowestPlan(scope="sequence"),
            when=When(every=8, decode=False),
        ),
        "KVzip (arXiv 2505.23416): what the model looks at when it reads the prompt again; for any later question",
    ),
    "expected-attention": (
        Recipe(
            name="expected-attention",
            observer=ExpectedAttention(epsilon=0.01),
            protect=Protect(sinks=4, recent=32),
            budget=Budget(0.5),
            plan=LowestPlan(scope="layer", floor=0.2),
            when=When(every=8, decode=False),
        ),
        "Expected attention (arXiv 2510.00636): what normally distributed future queries expect to attend to",
    ),
    "r-kv": (
        Recipe(
            name="r-kv",
            observer=RedundancyAware(window=8, weight=0.1),
            protect=Protect(recent=8),
            budget=Budget(1024),
            plan=LowestPlan(),
            when=When(every=32),
        ),
        "R-KV (arXiv 2505.24133): every 32 tokens, what the last 8 queries look at less what is like the rest",
    ),
    "triattention": (
        Recipe(
            name="triattention",
            observer=QueryCentres(),
            budget=Budget(2048),
            plan=LowestPlan(),
            when=When(every=32),
        ),
        "TriAttention (arXiv 2604.04921), centres learnt online: every 32 tokens, by expected logits; no attention",
    ),
    "think": (
        Recipe(
            name="think",
            observer=QueryCentres(offsets=12),
            protect=Protect(sinks=4, recent=16),
            budget=Budget(0.25),
            plan=LowestPlan(scope="sequence"),
            tiers=("native", "k4v4"),
            when=When(every=16),
        ),
        "for long generations: expected logits as triattention, over all heads, 4 bits but for the first tokens",
    ),
    "keydiff": (
        Recipe(
            name="keydiff",
            observer=KeyDiff(),
            protect=Protect(recent=32),
            budget=Budget(0.5),
            plan=LowestPlan(),
            when=When(every=16),
        ),
        "KeyDiff (arXiv 2504.15364): keys like the mean key go; no attention needed",
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
            names the preset to start from; a recipe; or `None` for the default: `k8v4`, and with a budget `auto`.
        overrides: Parts to replace, as in [`Recipe.with_overrides`].

    Returns:
        `Recipe`: The recipe.

    Raises:
        ValueError: If a preset, part or value is not allowed.
        TypeError: If `spec` is of another type.
    """
    if spec is None:
        recipe = get_preset(DEFAULT_PRESET if overrides.get("budget") is None else DEFAULT_WITH_BUDGET)
    elif isinstance(spec, Recipe):
        recipe = spec
        if recipe.name in _PRESETS and recipe == Recipe(name=recipe.name) != get_preset(recipe.name):
            raise ValueError(
                f"Recipe({recipe.name!r}) has the name of a preset and none of its parts: it would keep everything as "
                f"it is. Pass {recipe.name!r} itself, or kvc.get_preset({recipe.name!r})."
            )
    elif isinstance(spec, str):
        recipe = get_preset(spec)
    elif isinstance(spec, Mapping):
        parts = dict(spec)
        preset = parts.pop("preset", None)
        recipe = Recipe.from_dict(parts) if preset is None else get_preset(preset).with_overrides(**parts)
    else:
        raise TypeError(f"A recipe is a preset name, a Recipe, a dict or None, got {type(spec).__name__}.")
    return recipe.with_overrides(**overrides) if overrides else recipe


def resolve_rows(
    spec: str | Mapping[str, Any] | Recipe | Sequence[Any] | None = None, default: Recipe | None = None
) -> tuple[Recipe, ...]:
    """The recipes of the rows of a batch.

    Rows of one batch share their pages, so what is stored per slot must be the same: the observer, tiers, page bytes,
    positions, `evicted` and `when`. Budget, plan (LeanKV's thresholds, say) and protection may differ from row to row.

    Args:
        spec: What [`resolve_recipe`] takes, for every row; or a list of such, one per row.
        default (`Recipe`, *optional*): What `None` stands for and a dict without `preset` changes; left out, `None`
            is the default preset and a dict a recipe of its own.

    Returns:
        `tuple[Recipe, ...]`: One recipe for all rows, or one per row.

    Raises:
        ValueError: If a preset, part or value is not allowed, the list is empty, or rows differ in what they share.
        TypeError: If `spec` is of another type.
    """
    if isinstance(spec, (list, tuple)):
        if not spec:
            raise ValueError("The list of recipes is empty; give one recipe per row of the batch, or a single one.")
        recipes = tuple(_resolve_with_default(one, default) for one in spec)
    else:
        recipes = (_resolve_with_default(spec, default),)
    first = recipes[0]
    for row, recipe in enumerate(recipes):
        for part in ("observer", "tiers", "when", "page_bytes", "centre_keys", "positions", "evicted", "sinks_apart"):
            mine, theirs = getattr(recipe, part), getattr(first, part)
            if mine != theirs:
                raise ValueError(
                    f"Row {row} asks for {part}={mine!r} and row 0 for {part}={theirs!r}; rows of one batch share "
                    "pages, so they may differ in budget, plan and protect only. Generate them in separate calls."
                )
        if (recipe.plan is None) != (first.plan is None):
            raise ValueError(
                f"Row {row} and row 0 must both have a plan, or neither; give a row budget=1.0 to keep all."
            )
    return recipes


def _resolve_with_default(spec: Any, default: Recipe | None) -> Recipe:
    if default is not None and spec is None:
        return default
    if default is not None and isinstance(spec, Mapping) and "preset" not in spec:
        return default.with_overrides(**spec)
    return resolve_recipe(spec)
