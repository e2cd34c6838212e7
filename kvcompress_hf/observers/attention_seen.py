"""What a chunk's queries see of stored and new keys, and writing it back to the slots' fields."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from kvcompress_hf.kernels.backend import WindowScores
from kvcompress_hf.observers.base import Chunk
from kvcompress_hf.paging.store import PagedStore


@dataclass(frozen=True)
class AttentionSeen:
    """Sums of probabilities per key, for packed slots, the tail and the new tokens.

    Args:
        store (`PagedStore`): Holds the slots that were looked at.
        layer (`int`): Index of the layer in the store.
        valid (`torch.Tensor`, *optional*): `bool` `[batch, tokens]`, false for new tokens that are padding.
        scores (`torch.Tensor`): float32 `[batch, q_heads, slots]`: packed slots of every tier, then the tail, then the
            new tokens.
        widths (`tuple[int, ...]`): Slots of each of these parts.
        positions (`torch.Tensor`): `int32` `[batch, kv_heads, slots]`.
        filled (`torch.Tensor`): `bool` `[batch, kv_heads, slots]`.
    """

    store: PagedStore
    layer: int
    valid: torch.Tensor | None
    scores: torch.Tensor
    widths: tuple[int, ...]
    positions: torch.Tensor
    filled: torch.Tensor

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
        batch, kv_heads, slots = self.positions.shape
        scores = self.scores.view(batch, kv_heads, -1, slots)
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
        return write_field_of_all(self.store, self.layer, self.valid, reduced, self.widths, field, add, largest)


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
    store, (valid, positions) = chunk.store, _new_slots(chunk)
    scores = store.backend.window_scores(
        chunk.new.query[:, :, -observing:],
        chunk.new.key,
        store.rows(chunk.layer),
        store.tail(chunk.layer),
        power=power,
        exclude=exclude,
        **_options(chunk, observing),
    )
    return _place(store, chunk.layer, valid, positions, scores)


def attention_seen_both(chunk: Chunk, observing: int) -> tuple[AttentionSeen, AttentionSeen]:
    """As [`attention_seen`], for probabilities and for their squares, which together cost little more than one.

    Args:
        chunk (`Chunk`): The new tokens.
        observing (`int`): Number of queries at the end of the chunk that look.

    Returns:
        `tuple[AttentionSeen, AttentionSeen]`: Sums of probabilities, and sums of squared ones.
    """
    store, (valid, positions) = chunk.store, _new_slots(chunk)
    first, second = store.backend.column_scores(
        chunk.new.query[:, :, -observing:],
        chunk.new.key,
        store.rows(chunk.layer),
        store.tail(chunk.layer),
        **_options(chunk, observing),
    )
    return _place(store, chunk.layer, valid, positions, first), _place(store, chunk.layer, valid, positions, second)


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


def _new_slots(chunk: Chunk) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Which new tokens are real, `[batch, tokens]`, and the positions of all, `[tokens]`."""
    new = chunk.new
    positions = torch.arange(new.position, new.position + new.tokens, dtype=torch.int32, device=new.key.device)
    return new.valid, positions


def _place(
    store: PagedStore, layer: int, valid: torch.Tensor | None, new_positions: torch.Tensor, scores: WindowScores
) -> AttentionSeen:
    """Says which slot each score belongs to."""
    past, tail_scores, fresh = scores
    batch, kv_heads, tokens = len(tail_scores), store.geometry.kv_heads, len(new_positions)
    rows, tail = store.rows(layer), store.tail(layer)
    device, pieces = new_positions.device, [*past, tail_scores, fresh]
    positions, filled = [], []
    for tier, part in enumerate(past):
        width = part.shape[-1]
        if width:
            positions.append(store.backend.read_field(rows, tier, "position", width).view(batch, kv_heads, width))
            filled.append(torch.arange(width, device=device) < rows.lengths[tier].view(batch, kv_heads, 1))
    capacity = tail_scores.shape[-1]
    if capacity:
        in_tail = torch.arange(capacity, device=device) < tail.lengths[:, None]
        positions.append(tail.positions[:, None].expand(batch, kv_heads, capacity))
        filled.append(in_tail[:, None].expand(batch, kv_heads, capacity))
    positions.append(new_positions.expand(batch, kv_heads, tokens))
    real = torch.ones((batch, tokens), dtype=torch.bool, device=device) if valid is None else valid
    filled.append(real[:, None].expand(batch, kv_heads, tokens))
    return AttentionSeen(
        store=store,
        layer=layer,
        valid=valid,
        scores=_joined([part for part in pieces if part.shape[-1]] or [fresh]),
        widths=tuple(part.shape[-1] for part in pieces),
        positions=_joined(positions),
        filled=_joined(filled),
    )


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
