"""Paged, compressed KV caches for Hugging Face Transformers: per-head budgets, mixed precision, memory really freed."""

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcompress_hf.cache import CompressedPagedCache
    from kvcompress_hf.compat import cache_of
    from kvcompress_hf.errors import CacheFormatError, CacheMemoryError, UnsupportedFeatureError, UnsupportedModelError
    from kvcompress_hf.observers import (
        Chance,
        ExpectedAttention,
        GroupMeanScores,
        KeyDiff,
        Observer,
        PersistenceScores,
        QueryCentres,
        Recency,
        ReconstructionScores,
        RedundancyAware,
        RunningScores,
        WindowScores,
    )
    from kvcompress_hf.patches import last_run_report as report
    from kvcompress_hf.patches import patch, patched, unpatch
    from kvcompress_hf.patches.prefill import prefill
    from kvcompress_hf.perplexity import PerplexityReport, perplexity
    from kvcompress_hf.plans import EVICT, LowestPlan, PagePlan, Plan, PlanView, RateDistortion, ThresholdPlan
    from kvcompress_hf.presets import get_preset, presets
    from kvcompress_hf.recipe import Budget, Protect, Recipe, When
    from kvcompress_hf.reports import CacheParts, MemoryReport, RowReport, RunReport, plot_slots

__all__ = [
    "EVICT",
    "Budget",
    "CacheFormatError",
    "CacheMemoryError",
    "CacheParts",
    "Chance",
    "CompressedPagedCache",
    "ExpectedAttention",
    "GroupMeanScores",
    "KeyDiff",
    "LowestPlan",
    "MemoryReport",
    "Observer",
    "PagePlan",
    "PerplexityReport",
    "PersistenceScores",
    "Plan",
    "PlanView",
    "Protect",
    "QueryCentres",
    "RateDistortion",
    "Recency",
    "Recipe",
    "RowReport",
    "ReconstructionScores",
    "RedundancyAware",
    "RunReport",
    "RunningScores",
    "ThresholdPlan",
    "UnsupportedFeatureError",
    "UnsupportedModelError",
    "When",
    "WindowScores",
    "cache_of",
    "get_preset",
    "patch",
    "patched",
    "perplexity",
    "plot_slots",
    "prefill",
    "presets",
    "report",
    "unpatch",
]
__version__ = "0.1.0"
__file__ = os.path.realpath(__file__)  # an editable install comes here through a link

#: Module of each public name. It is imported when the name is first used: `import kvcompress_hf` alone loads no torch.
_NAMES = {
    "cache": "CompressedPagedCache",
    "compat": "cache_of",
    "errors": "CacheFormatError CacheMemoryError UnsupportedFeatureError UnsupportedModelError",
    "observers": "Chance ExpectedAttention GroupMeanScores KeyDiff Observer PersistenceScores QueryCentres Recency "
    "ReconstructionScores RedundancyAware RunningScores WindowScores",
    "patches": "patch patched report unpatch",
    "patches.prefill": "prefill",
    "perplexity": "PerplexityReport perplexity",
    "plans": "EVICT LowestPlan PagePlan Plan PlanView RateDistortion ThresholdPlan",
    "presets": "get_preset presets",
    "recipe": "Budget Protect Recipe When",
    "reports": "CacheParts MemoryReport RowReport RunReport plot_slots",
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names.split()}
_NAME_THERE = {"report": "last_run_report"}
#: Folders with more public names, for those who write an observer, a plan or a family.
_FOLDERS = ("observers", "patches", "plans")


class _Package(ModuleType):
    """Keeps `presets` and `perplexity` the functions: importing the submodules of those names would replace them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), _NAME_THERE.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_FOLDERS, *(name for name in globals() if name.startswith("__"))})


sys.modules[__name__].__class__ = _Package
