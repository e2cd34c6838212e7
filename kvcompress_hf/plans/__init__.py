"""Plans: how much may stay (budget), what must stay (protect), and which slots go.

Importing any of them imports all, so that recipes in JSON can name each: a new one is a file here and a line below.
What a class of one's own needs is here too: [`Plan`], what it is given, [`PlanView`], and [`EVICT`].
"""

from .base import EVICT, Plan, PlanView
from .kv_compress import PagePlan
from .lowest import LowestPlan
from .rate_distortion import RateDistortion
from .thresholds import ThresholdPlan

__all__ = ["EVICT", "LowestPlan", "PagePlan", "Plan", "PlanView", "RateDistortion", "ThresholdPlan"]
