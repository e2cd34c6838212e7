"""Observers: from attention statistics to one importance score per slot.

Importing any of them imports all, so that recipes in JSON can name each: a new one is a file here and a line below.
What a class of one's own needs is here too: [`Observer`], and what it is given, [`Chunk`] with its [`NewTokens`], and
[`Slots`].
"""

from kvcompress_hf.paging.new_tokens import NewTokens
from kvcompress_hf.paging.slots import Slots

from .base import Chunk, Observer
from .centres import QueryCentres
from .expected import ExpectedAttention
from .look import Look
from .per_query import GroupMeanScores, PersistenceScores
from .reconstruction import ReconstructionScores
from .redundancy import RedundancyAware
from .running import RunningScores
from .simple import Chance, KeyDiff, Recency
from .window import WindowScores

__all__ = [
    "Chance",
    "Chunk",
    "ExpectedAttention",
    "GroupMeanScores",
    "KeyDiff",
    "Look",
    "NewTokens",
    "Observer",
    "PersistenceScores",
    "QueryCentres",
    "Recency",
    "ReconstructionScores",
    "RedundancyAware",
    "RunningScores",
    "Slots",
    "WindowScores",
]
