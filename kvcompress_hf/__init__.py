"""Paged, compressed KV caches for Hugging Face Transformers: per-head budgets, mixed precision, memory really freed."""

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.errors import CacheFormatError, CacheMemoryError, UnsupportedFeatureError, UnsupportedModelError
from kvcompress_hf.observers.expected import ExpectedAttention
from kvcompress_hf.observers.per_query import GroupMeanScores, PersistenceScores
from kvcompress_hf.observers.reconstruction import ReconstructionScores
from kvcompress_hf.observers.running import RunningScores
from kvcompress_hf.observers.simple import Chance, KeyDiff, Recency
from kvcompress_hf.observers.window import WindowScores
from kvcompress_hf.patches import last_run_report as report
from kvcompress_hf.patches import patch, patched, prefill, unpatch
from kvcompress_hf.perplexity import PerplexityReport, perplexity
from kvcompress_hf.plans.kv_compress import PagePlan
from kvcompress_hf.plans.lowest import LowestPlan
from kvcompress_hf.plans.rate_distortion import RateDistortion
from kvcompress_hf.plans.thresholds import ThresholdPlan
from kvcompress_hf.presets import get_preset, presets
from kvcompress_hf.recipe import Budget, Protect, Recipe, When
from kvcompress_hf.reports import MemoryReport, RowReport, RunReport, plot_slots

__all__ = [
    "Budget",
    "CacheFormatError",
    "CacheMemoryError",
    "Chance",
    "CompressedPagedCache",
    "ExpectedAttention",
    "GroupMeanScores",
    "KeyDiff",
    "LowestPlan",
    "MemoryReport",
    "PagePlan",
    "PerplexityReport",
    "PersistenceScores",
    "Protect",
    "RateDistortion",
    "Recency",
    "Recipe",
    "RowReport",
    "ReconstructionScores",
    "RunReport",
    "RunningScores",
    "ThresholdPlan",
    "UnsupportedFeatureError",
    "UnsupportedModelError",
    "When",
    "WindowScores",
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
