"""Scores that spare what is unlike the rest: attention less redundancy (R-KV)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvcompress_hf.observers.attention_seen import pool_in_order
from kvcompress_hf.observers.base import Chunk, Observer
from kvcompress_hf.observers.look import Look
from kvcompress_hf.paging.slots import Slots
from kvcompress_hf.validation import check_numbers, require_int


@dataclass(frozen=True)
class RedundancyAware(Observer):
    """Observer: what the newest queries look at, less how much a key is like the others (R-KV, arXiv 2505.24133).

    Importance: the last `window` queries give the older slots their attention probabilities; of the logits of the query
    heads that share a KV head the largest counts. The mean over the queries is max-pooled over `pool` neighbours.
    Redundancy: the mean cosine similarity of a key with all others of its head, where of the others that a key is more
    than `threshold` alike the most recent is not held to be redundant with it; softmax over the slots. A slot is worth
    `weight * importance - (1 - weight) * redundancy` (section 3, and the authors' code where that is more precise).
    Nothing is computed while decoding but at plans.

    What differs from the paper: keys are compared as they are stored, so what their tier has lost counts; and what a
    plan has evicted is not looked at again, so neighbours are those that are left.

    Args:
        window (`int`): The newest queries, which look. Protect as many recent tokens.
        weight (`float`): Of importance, the paper's lambda.
        pool (`int`): Width of the max-pool over positions, odd; 1 switches it off.
        threshold (`float`): Cosine similarity from which on two keys are near-duplicates.
    """

    kind = "redundancy"

    window: int = 8
    weight: float = 0.1
    pool: int = 7
    threshold: float = 0.5

    def __post_init__(self) -> None:
        require_int("RedundancyAware", "window", self.window, 1, 1024)
        require_int("RedundancyAware", "pool", self.pool, 1)
        if self.pool % 2 == 0:
            raise ValueError(f"RedundancyAware.pool is {self.pool}; it must be odd, so that it is centred on the slot.")
        check_numbers(self, "weight", low=0, high=1)
        check_numbers(self, "threshold", low=-1, high=1)

    @property
    def fields(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: None: scores are made anew for each plan."""
        return ()

    @property
    def newest_queries(self) -> int:
        """`int`: Those that look."""
        return self.window

    @property
    def looks(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: The score."""
        return ("score",)

    def observe(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """Nothing to see; see [`Observer.observe`]."""
        return {}

    def look(self, look: Look) -> dict[str, torch.Tensor]:
        """Scores every slot; see [`Observer.look`]."""
        importance, redundancy = self._importance(look), redundancy_of(look, self.threshold)
        return {"score": self.weight * importance - (1 - self.weight) * redundancy}

    def importance(self, slots: Slots) -> torch.Tensor:
        """The score; see [`Observer.importance`]."""
        return slots.fields["score"]

    def _importance(self, look: Look) -> torch.Tensor:
        """What the newest queries give the slots that are older than they, `[batch, kv_heads, slots]`."""
        newest = look.queries.newest
        if newest is None:
            raise ValueError("RedundancyAware needs the newest queries, and none are remembered.")
        room = newest.shape[3]
        order = torch.where(look.filled, look.positions, torch.iinfo(torch.int32).max).argsort(dim=-1, stable=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        older = look.filled & (rank < look.filled.sum(-1, keepdim=True) - room)
        logits = (newest.float() @ look.keys[:, :, None].transpose(-1, -2)).amax(2)  # [batch, kv_heads, newest, slots]
        p = look.attention(logits, older[:, :, None])
        asked = torch.arange(room, 0, -1, device=p.device) <= look.queries.seen[:, None]  # [batch, newest]
        mean = (p * asked[:, None, :, None]).sum(2) / asked.sum(1).clamp(min=1)[:, None, None]
        return pool_in_order(mean[:, :, None], order, self.pool)[:, :, 0]


def redundancy_of(look: Look, threshold: float) -> torch.Tensor:
    """How much each key is like the others of its head; see [`RedundancyAware`].

    Args:
        look (`Look`): Everything a layer holds.
        threshold (`float`): Cosine similarity above which two keys are near-duplicates.

    Returns:
        `torch.Tensor`: float32 `[batch, kv_heads, slots]`, summing to one over the slots of a head; 0 where there is no
        slot.
    """
    filled = look.filled
    keys = F.normalize(torch.where(filled[..., None], look.keys, 0.0), dim=-1)
    alike = keys @ keys.transpose(-1, -2)  # [batch, kv_heads, slots, slots]
    alike.diagonal(dim1=-2, dim2=-1).zero_()
    place = torch.where(filled, look.positions, -1)[:, :, None].expand_as(alike)
    newest = torch.where(alike > threshold, place, -1).max(dim=-1, keepdim=True)
    spared = torch.where(newest.values >= 0, 0.0, alike.gather(-1, newest.indices))
    alike.scatter_(-1, newest.indices, spared)
    mean = alike.sum(-2) / filled.sum(-1, keepdim=True).clamp(min=1)
    return mean.masked_fill(~filled, -torch.inf).softmax(-1).nan_to_num(0.0)
