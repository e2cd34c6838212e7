"""What a prompt would look at if it were read again by queries that know which token comes next.

Heads that copy come in two kinds (the first are the induction heads of Olsson et al., arXiv 2209.11895). The first find
where the present token stood before; their queries are the same at any reading. Later ones look for the token that the
first have found there, the next one. When a text is read for the first time nothing has been found yet, and their
queries hold a guess: they look at what the model would have foreseen, and pass by all that surprised it, which is what
only the text can tell.

So their queries are made from keys. Where a guess was right, a head's query at one token and its key at the next fit
each other; from these pairs follows a linear map, and from the map the query that would look for any key.
"""

import math
from dataclasses import replace
from itertools import pairwise

import torch

from kvcompress_hf.kernels import Backend, Logits, get_backend
from kvcompress_hf.kernels.rotation import Rotation
from kvcompress_hf.paging.waiting import known, on_host

__all__ = ["foreseen_queries", "foreseen_scores"]

_PAIRS = 512  # that the map is found from, at most
_OTHERS = 64  # keys that stand for all in the softmax of a pair, at most
_RIDGE = 0.01  # of the mean variance of a key's channels
_LEAST = 1e-4  # weight of a pair that does not look at each other at all
_COPIES = 3e-5  # mean weight of pairs, without that, from which on a head is taken for one that copies


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
    weight = pair_weights(query, whole, logits=logits, rotation=rotation)
    copies = weight.mean(-1).amax(-1) > _COPIES  # [batch, kv_heads]
    here = known(copies)
    if here is None:
        scores = backend.non_causal_scores(
            foreseen_queries(query, whole, weight, rotation), key, logits=logits, rotation=rotation
        )
        result[:] = scores * copies.repeat_interleave(group, 1)[..., None]
        return
    for heads in _neighbours(here.any(0).tolist()):
        asked = slice(heads.start * group, heads.stop * group)
        own = logits if logits.sinks is None else replace(logits, sinks=logits.sinks[asked])
        foreseen = foreseen_queries(query[:, asked], whole[:, heads], weight[:, heads], rotation)
        scores = backend.non_causal_scores(foreseen, key[:, heads], logits=own, rotation=rotation)
        if len(here) > 1:
            scores *= copies[:, heads].repeat_interleave(group, 1)[..., None]
        result[:, asked] = scores


def _neighbours(chosen: list[bool]) -> list[slice]:
    """The chosen places, those next to each other together: a part of a tensor need not be copied."""
    edges = [place for place, pair in enumerate(pairwise([False, *chosen, False])) if pair[0] != pair[1]]
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def foreseen_queries(query: torch.Tensor, key: torch.Tensor, weight: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Queries of a prompt's tokens as if each knew the token after it.

    Per query head a ridge regression maps keys to queries, both as at position 0, from pairs of a token's query and the
    next one's key.

    Args:
        query (`torch.Tensor`): `[batch, q_heads, tokens, head_dim]`, with rotary embedding, of two tokens at least.
        key (`torch.Tensor`): As the model made them, `[batch, kv_heads, tokens, head_dim]`.
        weight (`torch.Tensor`): Of each pair, as from [`pair_weights`].
        rotation (`Rotation`): How position turns queries and keys.

    Returns:
        `torch.Tensor`: In the shape and dtype of `query`; that of the last token is its own.
    """
    weight = weight + _LEAST
    weight = weight / weight.sum(-1, keepdim=True)
    native = get_backend(key.device).plans
    if native is None:
        return mapped(query, key, *maps_in_torch(query, key, weight, rotation), rotation)
    mapping, offset = native.fit_maps(query, key, weight.flatten(1, 2), rotation, _pairs(key).step, _RIDGE)
    return native.foresee(query, key, mapping, offset, rotation)


def mapped(
    query: torch.Tensor, key: torch.Tensor, mapping: torch.Tensor, offset: torch.Tensor, rotation: Rotation
) -> torch.Tensor:
    """[`PlanOperations.foresee`] in torch."""
    place = torch.arange(key.shape[2], device=key.device)
    unturned = rotation.turn(key[:, :, 1:].float(), -place[1:])
    maps, offsets = (each.unflatten(1, (key.shape[1], -1)).to(query.dtype) for each in (mapping, offset))
    foreseen = unturned[:, :, None].to(query.dtype) @ maps + offsets[..., None, :]
    return torch.cat((rotation.turn(foreseen, place[:-1]).flatten(1, 2), query[:, :, -1:]), 2)


def maps_in_torch(
    query: torch.Tensor, key: torch.Tensor, weight: torch.Tensor, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`PlanOperations.fit_maps`] in torch; `weight` is `[batch, kv_heads, group, pairs]`."""
    pairs, place = _pairs(key), torch.arange(key.shape[2], device=key.device)
    weight = weight[..., None]
    asked = rotation.turn(query[:, :, pairs].float(), -place[pairs]).unflatten(1, (key.shape[1], -1))
    found = rotation.turn(key[:, :, 1:][:, :, pairs].float(), -place[1:][pairs])[:, :, None]
    mean_query, mean_key = (weight * asked).sum(-2, keepdim=True), (weight * found).sum(-2, keepdim=True)
    found = found - mean_key
    weighted = (weight * found).transpose(-1, -2)
    spread = weighted @ found
    ridge = _RIDGE * spread.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
    spread.diagonal(dim1=-2, dim2=-1).add_(ridge[..., None])
    mapping = torch.linalg.solve_ex(spread, weighted @ (asked - mean_query))[0]  # the ridge leaves nothing singular
    offset = mean_query - mean_key @ mapping
    return mapping.flatten(1, 2), offset.flatten(1, 2).squeeze(2)


def pair_weights(query: torch.Tensor, key: torch.Tensor, *, logits: Logits, rotation: Rotation) -> torch.Tensor:
    """How much a token's query looks at the next token's key when it is turned behind the prompt.

    Args:
        query (`torch.Tensor`): `[batch, q_heads, tokens, head_dim]`, with rotary embedding, of two tokens at least.
        key (`torch.Tensor`): As the model made them, `[batch, kv_heads, tokens, head_dim]`.
        logits (`Logits`): How queries and keys make logits.
        rotation (`Rotation`): How position turns queries and keys.

    Returns:
        `torch.Tensor`: Squared probabilities, of evenly spaced tokens, float32 `[batch, kv_heads, group, pairs]`.
    """
    native = get_backend(key.device).plans
    if native is None:
        return pair_weights_in_torch(query, key, logits=logits, rotation=rotation)
    weight = native.pair_weights(query, key, logits, rotation, _pairs(key).step, _stride(key))
    return weight.unflatten(1, (key.shape[1], -1))


def pair_weights_in_torch(
    query: torch.Tensor, key: torch.Tensor, *, logits: Logits, rotation: Rotation
) -> torch.Tensor:
    """[`pair_weights`] on any device."""
    tokens, pairs = key.shape[2], _pairs(key)
    others = key[:, :, None, :: _stride(key)].float()
    asked = query[:, :, pairs].float().unflatten(1, (key.shape[1], -1)) * logits.scale
    turned = rotation.turn(asked, torch.full((), tokens, device=key.device))
    far = turned @ others.transpose(-1, -2)
    ahead = (turned * key[:, :, None, 1:][..., pairs, :]).sum(-1)
    itself = (asked * key[:, :, None, pairs]).sum(-1)
    if logits.softcap is not None:
        far, ahead, itself = (logits.softcap * (each / logits.softcap).tanh() for each in (far, ahead, itself))
    total = torch.logaddexp(far.logsumexp(-1) + math.log(tokens / others.shape[-2]), torch.logaddexp(ahead, itself))
    return (2 * (ahead - total)).exp()


def _pairs(key: torch.Tensor) -> slice:
    """The first tokens of the pairs that are looked at; the last token of all is nobody's first."""
    last = key.shape[2] - 1
    return slice(0, last, math.ceil(last / _PAIRS))


def _stride(key: torch.Tensor) -> int:
    """From one key that stands for all to the next."""
    return math.ceil(key.shape[2] / _OTHERS)
