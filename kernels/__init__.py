"""The operations on pages: one set, several backends.

`get_backend(device)` picks one; `reference.py` is the oracle every other is tested against.
"""

from .backend import Backend, DecodePlan, WindowScores
from .cpu import CpuBackend
from .dispatch import get_backend
from .layout import PageLayout, TierLayout, page_layout
from .linear import MOST_ROWS, LinearPlan
from .plan_operations import Hulls, PlanOperations
from .reference import ReferenceBackend, page_section
from .rotation import Rotation
from .types import Logits, Rows, Tail

__all__ = [
    "MOST_ROWS",
    "Backend",
    "CpuBackend",
    "DecodePlan",
    "Hulls",
    "LinearPlan",
    "Logits",
    "PageLayout",
    "PlanOperations",
    "ReferenceBackend",
    "Rotation",
    "Rows",
    "Tail",
    "TierLayout",
    "WindowScores",
    "get_backend",
    "page_layout",
    "page_section",
]
