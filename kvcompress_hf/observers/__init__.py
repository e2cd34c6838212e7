"""Observers: from attention statistics to one importance score per slot.

Importing any of them imports all, so that recipes in JSON can name each.
"""

from .expected import ExpectedAttention
from .per_query import GroupMeanScores, PersistenceScores
from .reconstruction import ReconstructionScores
from .running import RunningScores
from .simple import Chance, KeyDiff, Recency
from .window import WindowScores

__all__ = [
    "Chance",
    "ExpectedAttention",
    "GroupMeanScores",
    "KeyDiff",
    "PersistenceScores",
    "Recency",
    "ReconstructionScores",
    "RunningScores",
    "WindowScores",
]
