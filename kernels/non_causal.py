"""`Backend.non_causal_scores` in plain torch, on any device: the oracle, and what backends without a kernel run.

In the words of the observer that asks for it (`observers/non_causal.py`): queries look once more at the keys of their
chunk, turned to the position behind it, each at the keys near it and at a sample that stands for all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .rotation import Rotation
from .types import Logits

__all__ = ["SAMPLE", "SINKS", "non_causal_scores"]

SINKS = 4  # the first keys often draw most of the attention: they are taken as they are
SAMPLE = 96  # keys that stand for all others
MARGIN = 16  # a query counts for keys up to this distance from where it stands
_BLOCK = 32  # queries that are worked on with the same keys
_NEAR = _BLOCK + 2 * MARGIN  # keys that some query of a block counts for,
_HERE = _BLOCK + MARGIN  # and the first of them, which some query sees from where it stands
_NUMBERS = {"cpu": 2**19}  # logits that exist at once, by device: in cache on a CPU,
_MOST_NUMBERS = 2**24  # few launches elsewhere


@dataclass(frozen=True)
class _Places:
    """Where the tokens of a chunk stand, counted from the first that is not padding.

    Args:
        count: Real tokens, `int64` `[batch, 1]`; here and below `batch` is 1 without padding.
        first: Index of the first of them, `int64` `[batch, 1]`.
        of_token: `int64` `[batch, tokens]`, negative or at least `count` for padding.
        of_far: Of the sinks and then of the sample, evenly spaced over the others: `int64` `[batch, sinks + sample]`;
            beyond `count` where there are not as many sinks.
    """

    count: Tensor
    first: Tensor
    of_token: Tensor
    of_far: Tensor

    @classmethod
    def of(cls, valid: Tensor) -> _Places:
        """The places of tokens of which `valid`, `bool` `[batch, tokens]`, are real; padding is on one side."""
        count = valid.sum(1, keepdim=True)
        first = valid.to(torch.uint8).argmax(1, keepdim=True)
        of_token = torch.arange(valid.shape[1], device=valid.device) - first
        sinks = torch.arange(SINKS, device=valid.device).expand(len(count), -1)
        halves = 2 * torch.arange(SAMPLE, device=valid.device) + 1
        sample = SINKS + halves * (count - SINKS).clamp(min=1) // (2 * SAMPLE)
        return cls(count, first, of_token, torch.cat([sinks, sample], 1))


def non_causal_scores(
    q: Tensor, k: Tensor, logits: Logits, rotation: Rotation, valid: Tensor | None, compute: torch.dtype
) -> Tensor:
    """See `Backend.non_causal_scores`.

    Args:
        q: `[batch, q_heads, tokens, head_dim]`.
        k: `[batch, kv_heads, tokens, head_dim]`.
        logits: How logits are made.
        rotation: How position turns queries; turned ones are rounded to the dtype of `q`.
        valid: bool `[batch, tokens]`; `None` = all valid.
        compute: The dtype of the dot products. What follows is float32, or float64 if this is.

    Returns:
        float32 `[batch, q_heads, tokens]`.
    """
    batch, kv_heads, tokens, head_dim = k.shape
    padded = valid is not None
    if valid is None:
        valid = torch.ones((1, tokens), dtype=torch.bool, device=k.device)
    places = _Places.of(valid)
    by = places.count - places.of_token  # from where each token stands to behind the chunk
    blocks = -(-tokens // _BLOCK)
    filling = blocks * _BLOCK - tokens
    keys = torch.where(valid[:, None, :, None], k, 0).to(compute)
    near = F.pad(keys, (0, 0, MARGIN, MARGIN + filling)).unfold(2, _NEAR, _BLOCK)
    is_near = F.pad(valid, (MARGIN, MARGIN + filling)).unfold(1, _NEAR, _BLOCK)  # [batch, blocks, near]
    of_query = F.pad(places.of_token, (0, filling), value=-1).view(-1, blocks, _BLOCK)
    index = (places.first + places.of_far).clamp(max=tokens - 1)[:, None, :, None]
    far = keys.gather(2, index.expand(batch, kv_heads, -1, head_dim)).transpose(-1, -2)

    per_block = q[:, :, 0, 0].numel() * _BLOCK * (_NEAR + _HERE + far.shape[-1])
    step = max(1, _NUMBERS.get(keys.device.type, _MOST_NUMBERS) // per_block)
    found = []
    for part in (slice(at, at + step) for at in range(0, blocks, step)):
        inside = slice(part.start * _BLOCK, part.stop * _BLOCK)
        query = q[:, :, inside]
        if padded:  # padding may hold anything
            query = torch.where(valid[:, None, inside, None], query, 0)
        turned = rotation.turn(query, by[:, None, inside])
        # Scaled before the products, which may not fit into float16.
        here, ahead = (_in_blocks(states.to(compute) * logits.scale, kv_heads) for states in (query, turned))
        real = (of_query[:, part] >= 0) & (of_query[:, part] < places.count[:, :, None])
        bias = _bias(is_near[:, part], of_query[:, part], places)
        found.append(_squares(_logits(here, ahead, near[:, :, part], far), bias, real, logits))
    overlapping = torch.cat(found, 2).permute(0, 1, 3, 4, 2).flatten(0, 2)  # [batch * q_heads, near, blocks]
    summed = F.fold(overlapping, (1, blocks * _BLOCK + 2 * MARGIN), (1, _NEAR), stride=(1, _BLOCK))
    result = summed[:, 0, 0, MARGIN : MARGIN + tokens].unflatten(0, (batch, -1)).float()
    return torch.where(valid[:, None], result, 0.0)


def _logits(here: Tensor, ahead: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """Dot products of queries, where they stand and turned, with near and far keys.

    Returns:
        `[batch, kv_heads, blocks, group, block, keys]`, at least float32.
    """
    shape = (*here.shape[:-1], _NEAR + _HERE + far.shape[-1])
    result = here.new_empty(shape, dtype=torch.promote_types(here.dtype, torch.float32))
    result[..., :_NEAR] = ahead @ near
    result[..., _NEAR : _NEAR + _HERE] = here @ near[..., :_HERE]
    result[..., _NEAR + _HERE :] = (ahead.flatten(2, 3) @ far).view(*here.shape[:-1], -1)
    return result.unflatten(3, (-1, _BLOCK))


def _squares(found: Tensor, bias: Tensor, real: Tensor, made: Logits) -> Tensor:
    """Squared probabilities of the near keys, summed over a block's queries: `[batch, kv_heads, blocks, group, near]`.

    Args:
        found: Logits `[batch, kv_heads, blocks, group, block, keys]`; changed.
        bias: What is added to them, `[batch, blocks, block, keys]`.
        real: Which queries are not padding, `[batch, blocks, block]`.
        made: How logits are made.
    """
    if made.softcap is not None:
        found.div_(made.softcap).tanh_().mul_(made.softcap)
    found.add_(bias[:, None, :, None])
    top = found.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)  # some padding sees nothing
    total = found.sub_(top).exp_().sum(-1, keepdim=True)
    if made.sinks is not None:
        total += (made.sinks.view(1, found.shape[1], 1, -1, 1, 1) - top).exp()
    total.masked_fill_(~real[:, None, :, None, :, None], torch.inf)
    return (found[..., :_NEAR] / total).square_().sum(-2)


def _in_blocks(query: Tensor, kv_heads: int) -> Tensor:
    """`[batch, kv_heads, blocks, group * block, head_dim]` from `[batch, q_heads, tokens, head_dim]` and zeros."""
    query = F.pad(query, (0, 0, 0, -query.shape[2] % _BLOCK))
    return query.unflatten(1, (kv_heads, -1)).unflatten(3, (-1, _BLOCK)).transpose(2, 3).flatten(3, 4)


def _bias(is_near: Tensor, of_query: Tensor, places: _Places) -> Tensor:
    """What is added to logits: nothing, minus infinity, or the logarithm of how many keys a sampled key stands for.

    Args:
        is_near: Whether the near keys of each block are real, `bool` `[batch, blocks, near]`.
        of_query: Places of the queries, `int64` `[batch, blocks, block]`.
        places: Of the chunk.

    Returns:
        float32 `[batch, blocks, block, near + here + sinks + sample]`: for the near keys seen from behind the chunk,
        for those seen from where a query stands, and for the far ones.
    """
    device = is_near.device
    behind = torch.arange(_BLOCK, device=device)[:, None] + MARGIN - torch.arange(_NEAR, device=device)
    ahead = is_near[:, :, None] & (behind.abs() <= MARGIN)
    here = (ahead & (behind >= 0))[..., :_HERE]
    distance = (of_query[..., None] - places.of_far[:, None, None]).abs()
    far = (distance > MARGIN) & (places.of_far < places.count)[:, None, None]
    sinks = far[..., :SINKS].sum(-1)
    sampled = far.sum(-1) - sinks
    all_others = (places.count[:, :, None] - ahead.sum(-1) - sinks).clamp(min=1)
    each = (all_others / sampled.clamp(min=1)).log()[..., None].expand(*sampled.shape, SAMPLE)
    seen = torch.cat([ahead, here, far], -1)
    return F.pad(each, (seen.shape[-1] - SAMPLE, 0)).masked_fill(~seen, -torch.inf)
