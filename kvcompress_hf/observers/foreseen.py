"""What a prompt would look at if it were read again by queries that know which token comes next.

Heads that copy come in two kinds (the first are the induction heads of Olsson et al., arXiv 2209.11895). The first find
where the present token stood before; their queries are the same at any reading. Later ones look for the token that the
first have found there, the next one. When a text is read for the first time nothing has been found yet, and their
queries hold a guess: they look at what the model would have foreseen, and pass by all that surprised it, which is what
only the text can tell.

So their queries are made from keys. A guess has something of the token that did come, so that over a text a head's
query at one token follows from its key at the next: a linear map, found by regression. What it makes of a key is the
query that looks for that key, though as weak as guesses are vague, so it is made stronger. Heads whose queries do not
follow from the next key do not look for the next token, and are left alone.
"""

import math
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch

from kvcompress_hf.kernels import Backend, Logits, get_backend
from kvcompress_hf.kernels.rotation import Rotation
from kvcompress_hf.paging.waiting import known, on_host

__all__ = ["Maps", "find_maps", "foreseen_queries", "foreseen_scores"]

_PAIRS = 512  # that the map is found from or tried on, at most
_APART = 4  # one pair of so many is for trying
_RIDGE = 0.1  # of the mean variance of a key's channels
_GAIN = 2.0  # how much stronger a query of who knows is than the guess that regression finds
_LEAST = 1e-12  # of a sum of squares
_COPIES = 0.4  # share of queries' variance that must follow from the next key in a head that copies, over its group


def foreseen_scores(
    backend: Backend,
    query: torch.Tensor,
    key: torch.Tensor,
    whole: torch.Tensor,
    *,
    logits: Logits,
    rotation: Rotation,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """[`Backend.non_causal_scores`] of [`foreseen_queries`], for KV heads with a query head that copies.

    Args:
        backend (`Backend`): Whose scores.
        query (`torch.Tensor`): `[batch, q_heads, tokens, head_dim]`, with rotary embedding.
        key (`torch.Tensor`): As they will be stored, `[batch, kv_heads, tokens, head_dim]`.
        whole (`torch.Tensor`): As the model made them, of the same shape; float32 is rounded to the dtype of `query`.
        logits (`Logits`): How queries and keys make logits.
        rotation (`Rotation`): How position turns queries and keys.
        valid (`torch.Tensor`, *optional*): `bool` `[batch, tokens]`, false for padding on one side.

    Returns:
        `torch.Tensor`: float32 `[batch, q_heads, tokens]`; 0 for padding and for other heads.
    """
    result = torch.zeros(query.shape[:3], device=query.device)
    whole = whole.to(query.dtype)  # that models make keys in
    if valid is None:
        _score(backend, (query, key, whole), logits, rotation, result)
        return result
    real = on_host(valid)
    starts, counts = torch.stack((real.to(torch.uint8).argmax(1), real.sum(1))).tolist()
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):  # so that padding changes nothing
        part = (slice(row, row + 1), slice(None), slice(start, start + count))
        states = tuple(each[part].contiguous() for each in (query, key, whole))
        _score(backend, (states[0], states[1], states[2]), logits, rotation, result[part])
    return result


def _score(
    backend: Backend,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    logits: Logits,
    rotation: Rotation,
    result: torch.Tensor,
) -> None:
    """Writes the scores of sequences without padding."""
    query, key, whole = states
    group = query.shape[1] // key.shape[1]
    if key.shape[2] < 2:
        return
    maps = find_maps(query, whole, rotation)
    copies = maps.explained.unflatten(1, (-1, group)).mean(-1) > _COPIES  # [batch, kv_heads]
    here = known(copies)
    if here is None:
        scores = backend.non_causal_scores(
            foreseen_queries(query, whole, maps, rotation), key, logits=logits, rotation=rotation
        )
        result[:] = scores * copies.repeat_interleave(group, 1)[..., None]
        return
    for heads in _neighbours(here.any(0).tolist()):
        asked = slice(heads.start * group, heads.stop * group)
        own = logits if logits.sinks is None else replace(logits, sinks=logits.sinks[asked])
        foreseen = foreseen_queries(query[:, asked], whole[:, heads], maps.of(asked), rotation)
        scores = backend.non_causal_scores(foreseen, key[:, heads], logits=own, rotation=rotation)
        if len(here) > 1:
            scores *= copies[:, heads].repeat_interleave(group, 1)[..., None]
        result[:, asked] = scores


def _neighbours(chosen: list[bool]) -> list[slice]:
    """The chosen places, those next to each other together: a part of a tensor need not be copied."""
    edges = [place for place, pair in enumerate(pairwise([False, *chosen, False])) if pair[0] != pair[1]]
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


class Maps(NamedTuple):
    """From a token's key to the query, at the token before it, that looks for it; both as at position 0.

    Args:
        mapping (`torch.Tensor`): float32 `[batch, q_heads, head_dim, head_dim]`, from channels of keys.
        offset (`torch.Tensor`): What is added, float32 `[batch, q_heads, head_dim]`.
        explained (`torch.Tensor`): The share of queries' variance that the regression foretells on pairs that it was
            not found from, float32 `[batch, q_heads]`; at most 1, and 0 or less where it foretells nothing.
    """

    mapping: torch.Tensor
    offset: torch.Tensor
    explained: torch.Tensor

    def of(self, heads: slice) -> "Maps":
        """Those of some query heads."""
        return Maps(*(each[:, heads] for each in self))


def find_maps(query: torch.Tensor, key: torch.Tensor, rotation: Rotation) -> Maps:
    """The map of each query head, by ridge regression on pairs of a token's query and the next one's key.

    Args:
        query (`torch.Tensor`): `[batch, q_heads, tokens, head_dim]`, with rotary embedding, of two tokens at least.
        key (`torch.Tensor`): As the model made them, `[batch, kv_heads, tokens, head_dim]`.
        rotation (`Rotation`): How position turns queries and keys.

    Returns:
        `Maps`: The maps.
    """
    step = math.ceil((key.shape[2] - 1) / _PAIRS)
    native = get_backend(key.device).plans
    if native is None:
        return maps_in_torch(query, key, rotation, step)
    return Maps(*native.fit_maps(query, key, rotation, step, apart=_APART, ridge=_RIDGE, gain=_GAIN))


def foreseen_queries(query: torch.Tensor, key: torch.Tensor, maps: Maps, rotation: Rotation) -> torch.Tensor:
    """Queries of a prompt's tokens as if each knew the token after it.

    Args:
        query (`torch.Tensor`): `[batch, q_heads, tokens, head_dim]`, with rotary embedding.
        key (`torch.Tensor`): As the model made them, `[batch, kv_heads, tokens, head_dim]`.
        maps (`Maps`): As from [`find_maps`].
        rotation (`Rotation`): How position turns queries and keys.

    Returns:
        `torch.Tensor`: In the shape and dtype of `query`; that of the last token is its own.
    """
    native = get_backend(key.device).plans
    if native is None:
        return mapped(query, key, maps.mapping, maps.offset, rotation)
    return native.foresee(query, key, maps.mapping, maps.offset, rotation)


def mapped(
    query: torch.Tensor, key: torch.Tensor, mapping: torch.Tensor, offset: torch.Tensor, rotation: Rotation
) -> torch.Tensor:
    """[`PlanOperations.foresee`] in torch."""
    place = torch.arange(key.shape[2], device=key.device)
    unturned = rotation.turn(key[:, :, 1:].float(), -place[1:])
    maps, offsets = (each.unflatten(1, (key.shape[1], -1)).to(query.dtype) for each in (mapping, offset))
    foreseen = unturned[:, :, None].to(query.dtype) @ maps + offsets[..., None, :]
    return torch.cat((rotation.turn(foreseen, place[:-1]).flatten(1, 2), query[:, :, -1:]), 2)


def maps_in_torch(query: torch.Tensor, key: torch.Tensor, rotation: Rotation, step: int) -> Maps:
    """[`find_maps`] on any device, from every `step`-th pair."""
    first = torch.arange(0, key.shape[2] - 1, step, device=key.device)
    asked, found = _pairs(query, key, rotation, torch.cat([first[i::_APART] for i in range(_APART - 1)]))
    mean_query, mean_key = asked.mean(-2, keepdim=True), found.mean(-2, keepdim=True)
    found = found - mean_key
    across = found.transpose(-1, -2)
    spread = across @ found
    ridge = _RIDGE * spread.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=_LEAST)
    spread.diagonal(dim1=-2, dim2=-1).add_(ridge[..., None])
    mapping = torch.linalg.solve_ex(spread, across @ (asked - mean_query))[0]  # the ridge leaves nothing singular
    asked, found = _pairs(query, key, rotation, first[_APART - 1 :: _APART])
    missed = (asked - mean_query - (found - mean_key) @ mapping).square().sum((-1, -2))
    explained = 1 - (missed + _LEAST) / ((asked - mean_query).square().sum((-1, -2)) + _LEAST)
    mapping = _GAIN * mapping
    offset = (mean_query - mean_key @ mapping).squeeze(-2)
    return Maps(*(each.flatten(1, 2) for each in (mapping, offset, explained)))


def _pairs(
    query: torch.Tensor, key: torch.Tensor, rotation: Rotation, first: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of tokens and keys of the next ones, as at position 0: `[batch, kv_heads, group or 1, pairs, dim]`."""
    asked = rotation.turn(query[:, :, first].float(), -first).unflatten(1, (key.shape[1], -1))
    return asked, rotation.turn(key[:, :, first + 1].float(), -first - 1)[:, :, None]
