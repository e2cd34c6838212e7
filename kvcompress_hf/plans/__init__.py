"""Plans: how much may stay (budget), what must stay (protect), and which slots go.

Importing any of them imports all, so that recipes in JSON can name each.
"""

from .kv_compress import PagePlan
from .lowest import LowestPlan
from .rate_distortion import RateDistortion
from .thresholds import ThresholdPlan

__all__ = ["LowestPlan", "PagePlan", "RateDistortion", "ThresholdPlan"]
