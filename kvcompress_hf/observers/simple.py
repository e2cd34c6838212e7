"""Observers that need no attention: age, chance, and the direction of keys."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvcompress_hf.observers.base import Chunk, Observer
from kvcompress_hf.paging.slots import Slots
from kvcompress_hf.validation import require_int


@dataclass(frozen=True)
class Recency(Observer):
    """Observer: the newer the more important (with protected sinks: StreamingLLM, arXiv 2309.17453)."""

    kind = "recency"

    @property
    def fields(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: None: positions are kept anyway."""
        return ()

    def observe(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """Nothing to see; see [`Observer.observe`]."""
        return {}

    def importance(self, slots: Slots) -> torch.Tensor:
        """The position; see [`Observer.importance`]."""
        return slots.positions.float()


@dataclass(frozen=True)
class Chance(Observer):
    """Observer: a seeded random number per slot, the baseline that every method must beat.

    Args:
        seed (`int`): Another seed, another choice.
    """

    kind = "random"

    seed: int = 0

    def __post_init__(self) -> None:
        require_int("Chance", "seed", self.seed, 0)

    @property
    def fields(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: None: the number follows from row and position."""
        return ()

    def observe(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """Nothing to see; see [`Observer.observe`]."""
        return {}

    def importance(self, slots: Slots) -> torch.Tensor:
        """A hash of seed, row and position, uniform in [0, 1); see [`Observer.importance`]."""
        rows = torch.arange(slots.positions.shape[1], device=slots.positions.device)[:, None]
        x = slots.positions.long() * 0x9E3779B1 + rows * 0x85EBCA77 + self.seed * 0xC2B2AE3D
        for _ in range(2):
            x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return ((x ^ (x >> 16)) & 0xFFFFFF).float() / 2**24


@dataclass(frozen=True)
class KeyDiff(Observer):
    """Observer: keys unlike the mean key are important (KeyDiff, arXiv 2504.15364): minus their cosine similarity.

    The mean runs over the keys seen when a slot is packed, as the paper computes it block by block.
    """

    kind = "keydiff"

    @property
    def fields(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: The score."""
        return ("score",)

    @property
    def describes(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: The score follows from the keys."""
        return ("score",)

    def describe(
        self, keys: torch.Tensor, values: torch.Tensor, key_mean: torch.Tensor, value_mean: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Minus the cosine of key and mean key; see [`Observer.describe`]."""
        return {"score": -F.cosine_similarity(keys.float(), key_mean.expand_as(keys), dim=-1)}

    def observe(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """Nothing to see; see [`Observer.observe`]."""
        return {}

    def importance(self, slots: Slots) -> torch.Tensor:
        """The score; see [`Observer.importance`]."""
        return slots.fields["score"]
