"""Window scores: what the last queries of a prompt attend to (KV-Compress, arXiv 2410.00161, eq. 8-10)."""

import torch
import torch.nn.functional as F

from kvcompress_hf.paging.store import PagedStore
from kvcompress_hf.recipe import WindowScores


def observe_window(
    observer: WindowScores,
    store: PagedStore,
    layer: int,
    query: torch.Tensor,
    keys: torch.Tensor,
    *,
    position: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
    valid: torch.Tensor | None,
) -> torch.Tensor:
    """Scores new tokens, and replaces the scores of the stored ones, by the last queries of this chunk.

    Per query head: sum over the observing queries of `p ** power`, then max-pool over neighbouring positions; then
    the sum over the query heads of a KV head. That is the order in which KV-Compress' code runs (its paper writes the
    group sum first; a sum of maxima is not the maximum of sums).

    Args:
        observer (`WindowScores`): Window, power and pool.
        store (`PagedStore`): What is stored already; its scores are replaced.
        layer (`int`): Index of the layer.
        query (`torch.Tensor`): `[batch, q_heads, tokens, head_dim]`, this chunk's queries.
        keys (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`, this chunk's keys.
        position (`int`): Logical position of the chunk's first token.
        scale (`float`): Factor on the logits.
        softcap (`float`, *optional*): Soft cap on the logits.
        window (`int`, *optional*): Sliding window in tokens.
        sinks (`torch.Tensor`, *optional*): Extra logit per query head, `[q_heads]`.
        valid (`torch.Tensor`, *optional*): `bool` `[batch, tokens]`, false for padding.

    Returns:
        `torch.Tensor`: float32 `[batch, kv_heads, tokens]`, zero for padding.
    """
    batch, kv_heads, tokens, _ = keys.shape
    observing = min(observer.window, tokens)
    rows, tail = store.rows(layer), store.tail(layer)
    past, tail_scores, fresh = store.backend.window_scores(
        query[:, :, tokens - observing :],
        keys,
        rows,
        tail,
        position=position + tokens - observing,
        key_position=position,
        scale=scale,
        power=observer.power,
        softcap=softcap,
        window=window,
        sinks=sinks,
        query_valid=None if valid is None else valid[:, tokens - observing :].contiguous(),
        key_valid=valid,
    )
    shape = (batch, kv_heads, -1)
    positions = [
        store.backend.read_field(rows, tier, "position", scores.shape[-1]).view(shape)
        for tier, scores in enumerate(past)
    ]
    filled = [
        torch.arange(scores.shape[-1], device=keys.device) < rows.lengths[tier].view(batch, kv_heads, 1)
        for tier, scores in enumerate(past)
    ]
    capacity = tail_scores.shape[-1]
    in_tail = torch.arange(capacity, device=keys.device) < tail.lengths[:, None]
    positions.append(tail.positions[:, None].expand(batch, kv_heads, capacity))
    filled.append(in_tail[:, None].expand(batch, kv_heads, capacity))
    fresh_positions = torch.arange(position, position + tokens, dtype=torch.int32, device=keys.device)
    positions.append(fresh_positions.expand(batch, kv_heads, tokens))
    is_real = torch.ones((batch, tokens), dtype=torch.bool, device=keys.device) if valid is None else valid
    filled.append(is_real[:, None].expand(batch, kv_heads, tokens))

    scores = torch.cat([*past, tail_scores, fresh], dim=-1)
    pooled = pool_by_position(scores, torch.cat(positions, -1), torch.cat(filled, -1), observer.pool)
    parts = pooled.split([s.shape[-1] for s in (*past, tail_scores, fresh)], dim=-1)
    for tier, part in enumerate(parts[: len(past)]):
        if part.shape[-1]:
            store.backend.write_field(rows, tier, "score", part.flatten(0, 1))
    if tail.fields is not None and bool(in_tail.any()):
        tail.fields[store.layout.fields.index("score")] = parts[-2].contiguous().view(torch.int32)
    return parts[-1].contiguous()


def pool_by_position(scores: torch.Tensor, positions: torch.Tensor, filled: torch.Tensor, width: int) -> torch.Tensor:
    """Max-pools scores over neighbours in position order and sums them over each KV head's query heads.

    Neighbours are neighbours among the slots still stored; storage order plays no part.

    Args:
        scores (`torch.Tensor`): float32 `[batch, q_heads, slots]`, not negative.
        positions (`torch.Tensor`): `int32` `[batch, kv_heads, slots]`.
        filled (`torch.Tensor`): `bool` `[batch, kv_heads, slots]`, false for slots that hold nothing.
        width (`int`): Width of the pool, odd.

    Returns:
        `torch.Tensor`: float32 `[batch, kv_heads, slots]`, zero where nothing is stored.
    """
    batch, kv_heads, slots = positions.shape
    scores = scores.view(batch, kv_heads, -1, slots)
    if width > 1 and slots:
        # Empty slots go to the end, where their zeros change no maximum of scores that are not negative.
        order = torch.where(filled, positions, torch.iinfo(torch.int32).max).argsort(dim=-1, stable=True)
        order = order[:, :, None].expand_as(scores)
        ordered = torch.where(filled[:, :, None], scores, 0.0).gather(-1, order)
        pooled = F.max_pool1d(ordered.flatten(0, 1), width, stride=1, padding=width // 2)
        scores = torch.empty_like(scores).scatter_(-1, order, pooled.view_as(scores))
    return torch.where(filled, scores.sum(2), 0.0)
