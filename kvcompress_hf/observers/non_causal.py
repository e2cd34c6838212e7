"""What the queries of a prompt would look at if the same text came again after it; nothing is read a second time.

Who judges slots by the last queries of a prompt cannot know what will be asked later. KVzip (arXiv 2505.23416) reads
the prompt again and keeps what that looks at. Compactor (arXiv 2507.08143) comes near it without a second reading:
every query looks at the keys around it, later ones too. Here, as well,

- rotary embedding turns each query on, to the position behind the prompt, from where it would look;
- it competes with itself: where it stands, it looks at what came just before it, as it would in a text read again;
- a sample of the prompt's keys stands for all of them in the softmax, so that the work per query does not grow with
  the prompt.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from kvcompress_hf.observers.base import Chunk
from kvcompress_hf.observers.foreseen import foreseen_scores
from kvcompress_hf.paging.key_turn import Rotation
from kvcompress_hf.paging.new_tokens import NewTokens
from kvcompress_hf.paging.waiting import derive

__all__ = ["non_causal_scores"]

_ASKED = 32  # queries that tell how much a later chunk looks at what was stored before


def non_causal_scores(chunk: Chunk, foresee: bool = False) -> torch.Tensor | None:
    """Squared probabilities that the chunk's tokens would give each other if they came again, summed over queries.

    Query `i`, turned to the position behind the chunk, gives key `j` the probability `p(i, j)`; key `j` gets the sum of
    `p(i, j) ** 2` over the queries up to 16 tokens away from it. The softmax runs over those keys, over the keys at and
    shortly before `i` seen from `i` itself, over the first four tokens, and over 96 others evenly spaced, which stand
    for all that are further away. In a later chunk, what falls on the tokens before it is estimated per query head from
    32 of its queries. In a layer with a sliding window only what a later token can still see is looked at, as if the
    chunk began there, and counts by the share of the text that would go by before it is out of reach.

    Args:
        chunk (`Chunk`): The new tokens.
        foresee (`bool`): Whether to add what [`foreseen_scores`] give, in the same way.

    Returns:
        `torch.Tensor` or `None`: float32 `[batch, kv_heads, group, tokens]`, 0 for padding and for what has left the
        window; `None` where it is not known how position turns the queries of this layer.
    """
    if chunk.rotation is None:
        return None
    new = chunk.new
    window = new.logits.window
    if window is None:
        return _scores(chunk, chunk.rotation, foresee)
    gone = max(0, new.tokens - max(window - 1, 1))
    if gone:
        valid = None if new.valid is None else derive(new.valid, lambda to: to[:, gone:].contiguous())
        query, key, value = (states[:, :, gone:] for states in (new.query, new.key, new.value))
        within = NewTokens(query, key, value, new.logits, valid=valid)  # at position 0: no past is within reach
        scores = _scores(replace(chunk, new=within), chunk.rotation, foresee)
    else:
        scores = _scores(chunk, chunk.rotation, foresee)
    seen = new.position + new.tokens
    reached = window - torch.arange(new.tokens - gone, 0, -1, device=scores.device)  # later tokens that see each
    return F.pad(scores * (reached / seen).clamp(0, 1), (gone, 0))


def _scores(chunk: Chunk, rotation: Rotation, foresee: bool) -> torch.Tensor:
    """[`non_causal_scores`] of tokens that a later one can all see."""
    new = chunk.new
    found = chunk.store.backend.non_causal_scores(
        new.query, new.key, logits=new.logits, rotation=rotation, valid=new.valid
    )
    if foresee:
        shift = chunk.store.key_shift_of(chunk.layer)
        found += foreseen_scores(
            chunk.store.backend,
            new.query,
            new.key,
            new.key if shift is None else new.key + shift,  # whole: added in float32, and rounded as models round
            logits=new.logits,
            rotation=rotation,
            valid=new.valid,
        )
    found = found.unflatten(1, (new.key.shape[1], -1))
    if not new.position:
        return found
    return found * (1 - _share_of_the_past(chunk, rotation))[..., None].square()


def _share_of_the_past(chunk: Chunk, rotation: Rotation) -> torch.Tensor:
    """How much of their attention the chunk's queries give to what was stored before it, `[batch, kv_heads, group]`."""
    new, store = chunk.new, chunk.store
    batch, kv_heads, tokens, _ = new.key.shape
    asked = torch.linspace(0, tokens - 1, min(_ASKED, tokens), device=new.key.device).long()
    by = (tokens - asked)[None]  # from where each stands to behind the chunk
    if new.valid is not None:  # padding is on one side
        first = new.valid.to(torch.uint8).argmax(1, keepdim=True)
        by = first + new.valid.sum(1, keepdim=True) - asked
    query_valid = None if new.valid is None else new.valid[:, asked].contiguous()
    past, tail, _ = store.backend.window_scores(
        rotation.turn(new.query[:, :, asked], by[:, None]),
        new.key,
        store.rows(chunk.layer),
        store.tail(chunk.layer),
        power=1,
        position=new.position + tokens,
        key_position=new.position,
        logits=new.logits,
        query_valid=query_valid,
        key_valid=new.valid,
    )
    total = torch.stack([part.sum(-1) for part in (*past, tail)]).sum(0)  # [batch, q_heads]
    queries = torch.full((1,), asked.numel(), device=total.device) if query_valid is None else query_valid.sum(1)
    return (total / queries.clamp(min=1)[:, None]).clamp(max=1.0).view(batch, kv_heads, -1)
