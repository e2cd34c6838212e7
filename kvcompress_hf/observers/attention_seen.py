"""What a chunk's queries see of stored and new keys, and writing it back to the slots' fields."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from kvcompress_hf.kernels import Rows, Tail
from kvcompress_hf.kernels.backend import WindowScores
from kvcompress_hf.observers.base import Chunk
from kvcompress_hf.paging.store import PagedStore


@dataclass(frozen=True)
class AttentionSeen:
    """Sums of probabilities per key, for packed slots, the tail and the new tokens.

    Args:
        chunk (`Chunk`): The new tokens, and the store of the slots that were looked at.
        rows (`Rows`): Its packed slots.
        tail (`Tail`): Its tail.
        scores (`torch.Tensor`): float32 `[batch, q_heads, slots]`: packed slots of every tier, then the tail, then the
            new tokens.
        widths (`tuple[int, ...]`): Slots of each of these parts.
    """

    chunk: Chunk
    rows: Rows
    tail: Tail
    scores: torch.Tensor
    widths: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`tuple[int, int, int]`: Batch, KV heads, slots."""
        return self.scores.shape[0], self.chunk.store.geometry.kv_heads, self.scores.shape[2]

    @property
    def all_filled(self) -> bool:
        """`bool`: Whether there is a token everywhere, as in a first chunk without padding."""
        return self.chunk.new.valid is None and not any(self.widths[:-1])

    @cached_property
    def positions(self) -> torch.Tensor:
        """`torch.Tensor`: `int32` `[batch, kv_heads, slots]`."""
        batch, kv_heads, _ = self.shape
        new, backend = self.chunk.new, self.chunk.store.backend
        parts = [
            backend.read_field(self.rows, tier, "position", width).view(batch, kv_heads, width)
            for tier, width in enumerate(self.widths[:-2])
            if width
        ]
        if self.widths[-2]:
            parts.append(self.tail.positions[:, None].expand(batch, kv_heads, -1))
        fresh = torch.arange(new.position, new.position + new.tokens, dtype=torch.int32, device=new.key.device)
        return _joined([*parts, fresh.expand(batch, kv_heads, -1)])

    @cached_property
    def filled(self) -> torch.Tensor:
        """`torch.Tensor`: `bool` `[batch, kv_heads, slots]`."""
        batch, kv_heads, _ = self.shape
        new, device = self.chunk.new, self.chunk.new.key.device
        parts = [
            torch.arange(width, device=device) < self.rows.lengths[tier].view(batch, kv_heads, 1)
            for tier, width in enumerate(self.widths[:-2])
            if width
        ]
        if self.widths[-2]:
            in_tail = torch.arange(self.widths[-2], device=device) < self.tail.lengths[:, None]
            parts.append(in_tail[:, None].expand(batch, kv_heads, -1))
        real = torch.ones((batch, new.tokens), dtype=torch.bool, device=device) if new.valid is None else new.valid
        return _joined([*parts, real[:, None].expand(batch, kv_heads, -1)])

    def order(self) -> torch.Tensor:
        """Slots in the order of their positions, empty ones last: `int64` `[batch, kv_heads, slots]`."""
        return torch.where(self.filled, self.positions, torch.iinfo(torch.int32).max).argsort(dim=-1, stable=True)

    def reduce(self, function: Callable[[torch.Tensor, Callable[[], torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        """Reduces the scores per query head to one per KV head.

        Args:
            function (`Callable`): From scores `[batch, kv_heads, group, slots]`, zero where nothing is stored, and
                [`AttentionSeen.order`] to `[batch, kv_heads, slots]`.

        Returns:
            `torch.Tensor`: float32 `[batch, kv_heads, slots]`, zero where nothing is stored.
        """
        batch, kv_heads, slots = self.shape
        scores = self.scores.view(batch, kv_heads, -1, slots)
        if self.all_filled:
            return function(scores, self.order)
        reduced = function(torch.where(self.filled[:, :, None], scores, 0.0), self.order)
        return torch.where(self.filled, reduced, 0.0)

    def write(self, reduced: torch.Tensor, field: str, add: bool, largest: bool = False) -> torch.Tensor:
        """Puts the reduced scores of what is stored into a field.

        Args:
            reduced (`torch.Tensor`): As from [`AttentionSeen.reduce`].
            field (`str`): Name of the field.
            add (`bool`): Add to what the field holds instead of replacing it.
            largest (`bool`): Keep what the field holds where it is larger.

        Returns:
            `torch.Tensor`: float32 `[batch, kv_heads, tokens]`, the scores of the new tokens.
        """
        chunk = self.chunk
        return write_field_of_all(chunk.store, chunk.layer, chunk.new.valid, reduced, self.widths, field, add, largest)


def write_field_of_all(
    store: PagedStore,
    layer: int,
    valid: torch.Tensor | None,
    values: torch.Tensor,
    widths: Sequence[int],
    field: str,
    add: bool = False,
    largest: bool = False,
) -> torch.Tensor:
    """Puts values for everything stored of a layer into a field.

    Args:
        store (`PagedStore`): What is stored; the new tokens are not yet.
        layer (`int`): Index of the layer in the store.
        valid (`torch.Tensor`, *optional*): `bool` `[batch, tokens]`, false for new tokens that are padding.
        values (`torch.Tensor`): float32 `[batch, kv_heads, slots]`: packed slots of every tier, then the tail, then the
            new tokens.
        widths (`Sequence[int]`): Slots of each of these parts.
        field (`str`): Name of the field.
        add (`bool`): Add to what the field holds instead of replacing it.
        largest (`bool`): Keep what the field holds where it is larger.

    Returns:
        `torch.Tensor`: float32 `[batch, kv_heads, tokens]`, the values of the new tokens.
    """

    if not any(widths[:-1]):
        return values.contiguous()

    def merge(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if largest:
            return torch.maximum(old, new)
        return old + new if add else new

    # A sequence that has only padding in this chunk saw nothing, so what it holds keeps its values.
    idle = None if add or largest or valid is None else ~valid.any(1)[:, None, None]

    def merged(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if idle is not None:
            return torch.where(idle, old, new)
        return merge(old, new)

    rows, tail = store.rows(layer), store.tail(layer)
    *past, in_tail, fresh = values.split(list(widths), dim=-1)
    for tier, part in enumerate(past):
        if part.shape[-1]:
            stored = part.flatten(0, 1)
            if add or largest or idle is not None:
                old = store.backend.read_field(rows, tier, field, part.shape[-1])
                stored = merged(old.view_as(part), part).flatten(0, 1)
            store.backend.write_field(rows, tier, field, stored.contiguous())
    if tail.fields is not None and in_tail.shape[-1]:
        target = tail.fields[store.layout.fields.index(field)].view(torch.float32)
        target.copy_(merged(target, in_tail))
    return fresh.contiguous()


def attention_seen(chunk: Chunk, observing: int, power: int, exclude: int = 0) -> AttentionSeen:
    """Sums, for every key, the probabilities that the last queries of a chunk give it; no attention matrix is made.

    Args:
        chunk (`Chunk`): The new tokens.
        observing (`int`): Number of queries at the end of the chunk that look.
        power (`int`): Power of the probabilities, 1 or 2; 0 for the largest instead of a sum.
        exclude (`int`): A query counts for a key only from this distance on.

    Returns:
        `AttentionSeen`: The sums per query head, and the slots that they belong to.
    """
    rows, tail = chunk.store.rows(chunk.layer), chunk.store.tail(chunk.layer)
    scores = chunk.store.backend.window_scores(
        chunk.new.query[:, :, -observing:],
        chunk.new.key,
        rows,
        tail,
        power=power,
        exclude=exclude,
        **_options(chunk, observing),
    )
    return AttentionSeen(chunk, rows, tail, *_side_by_side(scores))


def attention_seen_both(chunk: Chunk, observing: int) -> tuple[AttentionSeen, AttentionSeen]:
    """As [`attention_seen`], for probabilities and for their squares, which together cost little more than one.

    Args:
        chunk (`Chunk`): The new tokens.
        observing (`int`): Number of queries at the end of the chunk that look.

    Returns:
        `tuple[AttentionSeen, AttentionSeen]`: Sums of probabilities, and sums of squared ones.
    """
    rows, tail = chunk.store.rows(chunk.layer), chunk.store.tail(chunk.layer)
    first, second = chunk.store.backend.column_scores(
        chunk.new.query[:, :, -observing:],
        chunk.new.key,
        rows,
        tail,
        **_options(chunk, observing),
    )
    sums, squares = (AttentionSeen(chunk, rows, tail, *_side_by_side(scores)) for scores in (first, second))
    return sums, squares


def _options(chunk: Chunk, observing: int) -> dict[str, Any]:
    """Arguments of `Backend.window_scores` for the last `observing` queries of a chunk: positions, logits, padding."""
    new = chunk.new
    start = new.tokens - observing
    return dict(
        position=new.position + start,
        key_position=new.position,
        logits=new.logits,
        query_valid=None if new.valid is None else new.valid[:, start:].contiguous(),
        key_valid=new.valid,
    )


def _side_by_side(scores: WindowScores) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The scores of all slots, and how many there are of each part; see [`AttentionSeen`]."""
    past, in_tail, fresh = scores
    pieces = [*past, in_tail, fresh]
    joined = _joined([part for part in pieces if part.shape[-1]] or [fresh])
    return joined, tuple(part.shape[-1] for part in pieces)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def pool_in_order(scores: torch.Tensor, order: torch.Tensor, width: int) -> torch.Tensor:
    """Max-pools scores over neighbours in position order; storage order plays no part.

    Args:
        scores (`torch.Tensor`): float32 `[batch, kv_heads, group, slots]`, not negative, zero where nothing is stored.
        order (`torch.Tensor`): `int64` `[batch, kv_heads, slots]`, slots by position, empty ones last, where their
            zeros change no maximum.
        width (`int`): Width of the pool, odd.

    Returns:
        `torch.Tensor`: float32 `[batch, kv_heads, group, slots]`.
    """
    if width == 1 or not scores.shape[-1]:
        return scores
    width = min(width, 2 * scores.shape[-1] - 1)  # a wider one reaches no further
    order = order[:, :, None].expand_as(scores)
    ordered = scores.gather(-1, order)
    pooled = F.max_pool1d(ordered.flatten(0, 1), width, stride=1, padding=width // 2)
    return torch.empty_like(scores).scatter_(-1, order, pooled.view_as(scores))
