"""What the queries of a prompt would look at if the same text came again after it; nothing is read a second time.

Who judges slots by the last queries of a prompt cannot know what will be asked later. KVzip (arXiv 2505.23416) reads
the prompt again and keeps what that looks at. Compactor (arXiv 2507.08143) comes near it without a second reading:
every query looks at the keys around it, later ones too. Here, as well,

- rotary embedding turns each query on, to the position behind the prompt, from where it would look;
- it competes with itself: where it stands, it looks at what came just before it, as it would in a text read again;
- a sample of the prompt's keys stands for all of them in the softmax, so that the work per query does not grow with
  the prompt.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from kvcompress_hf.observers.base import Chunk
from kvcompress_hf.paging.key_turn import Rotation
from kvcompress_hf.paging.new_tokens import NewTokens

__all__ = ["non_causal_scores"]

_BLOCK = 32  # queries that are worked on with the same keys
_MARGIN = 16  # a query counts for keys up to this distance from where it stands
_NEAR = _BLOCK + 2 * _MARGIN  # keys that some query of a block counts for,
_HERE = _BLOCK + _MARGIN  # and the first of them, which some query sees from where it stands
_SINKS = 4  # the first keys often draw most of the attention: they are taken as they are
_SAMPLE = 96  # keys that stand for all others
_ASKED = 32  # queries that tell how much a later chunk looks at what was stored before
_NUMBERS = {"cpu": 2**19}  # logits that exist at once, by device: in cache on a CPU,
_MOST_NUMBERS = 2**24  # few launches elsewhere


@dataclass(frozen=True)
class _Places:
    """Where the tokens of a chunk stand, counted from the first that is not padding.

    Args:
        count (`torch.Tensor`): Real tokens, `int64` `[batch, 1]`; here and below `batch` is 1 without padding.
        first (`torch.Tensor`): Index of the first of them, `int64` `[batch, 1]`.
        of_token (`torch.Tensor`): `int64` `[batch, tokens]`, negative or at least `count` for padding.
        of_far (`torch.Tensor`): Of the sinks and then of the sample, evenly spaced over the others: `int64`
            `[batch, sinks + sample]`; beyond `count` where there are not as many sinks.
    """

    count: torch.Tensor
    first: torch.Tensor
    of_token: torch.Tensor
    of_far: torch.Tensor

    @classmethod
    def of(cls, valid: torch.Tensor) -> "_Places":
        """The places of tokens of which `valid`, `bool` `[batch, tokens]`, are real; padding is on one side."""
        count = valid.sum(1, keepdim=True)
        first = valid.to(torch.uint8).argmax(1, keepdim=True)
        of_token = torch.arange(valid.shape[1], device=valid.device) - first
        sinks = torch.arange(_SINKS, device=valid.device).expand(len(count), -1)
        halves = 2 * torch.arange(_SAMPLE, device=valid.device) + 1
        sample = _SINKS + halves * (count - _SINKS).clamp(min=1) // (2 * _SAMPLE)
        return cls(count, first, of_token, torch.cat([sinks, sample], 1))


def non_causal_scores(chunk: Chunk) -> torch.Tensor | None:
    """Squared probabilities that the chunk's tokens would give each other if they came again, summed over queries.

    Query `i`, turned to the position behind the chunk, gives key `j` the probability `p(i, j)`; key `j` gets the sum of
    `p(i, j) ** 2` over the queries up to 16 tokens away from it. The softmax runs over those keys, over the keys at and
    shortly before `i` seen from `i` itself, over the first four tokens, and over 96 others evenly spaced, which stand
    for all that are further away. In a later chunk, what falls on the tokens before it is estimated per query head from
    32 of its queries. In a layer with a sliding window only what a later token can still see is looked at, as if the
    chunk began there, and counts by the share of the text that would go by before it is out of reach.

    Args:
        chunk (`Chunk`): The new tokens.

    Returns:
        `torch.Tensor` or `None`: float32 `[batch, kv_heads, group, tokens]`, 0 for padding and for what has left the
        window; `None` where it is not known how position turns the queries of this layer.
    """
    if chunk.rotation is None:
        return None
    new = chunk.new
    window = new.logits.window
    if window is None:
        return _scores(chunk, chunk.rotation)
    gone = max(0, new.tokens - max(window - 1, 1))
    if gone:
        valid = None if new.valid is None else new.valid[:, gone:].contiguous()
        query, key, value = (states[:, :, gone:] for states in (new.query, new.key, new.value))
        within = NewTokens(query, key, value, new.logits, valid=valid)  # at position 0: no past is within reach
        scores = _scores(replace(chunk, new=within), chunk.rotation)
    else:
        scores = _scores(chunk, chunk.rotation)
    seen = new.position + new.tokens
    reached = window - torch.arange(new.tokens - gone, 0, -1, device=scores.device)  # later tokens that see each
    return F.pad(scores * (reached / seen).clamp(0, 1), (gone, 0))


def _scores(chunk: Chunk, rotation: Rotation) -> torch.Tensor:
    """[`non_causal_scores`] of tokens that a later one can all see."""
    new, made = chunk.new, chunk.new.logits
    batch, kv_heads, tokens, head_dim = new.key.shape
    valid = new.valid
    if valid is None:
        valid = torch.ones((1, tokens), dtype=torch.bool, device=new.key.device)
    places = _Places.of(valid)
    by = places.count - places.of_token  # from where each token stands to behind the chunk
    blocks = -(-tokens // _BLOCK)
    filling = blocks * _BLOCK - tokens
    keys = torch.where(valid[:, None, :, None], new.key, 0)
    near = F.pad(keys, (0, 0, _MARGIN, _MARGIN + filling)).unfold(2, _NEAR, _BLOCK)
    is_near = F.pad(valid, (_MARGIN, _MARGIN + filling)).unfold(1, _NEAR, _BLOCK)  # [batch, blocks, near]
    of_query = F.pad(places.of_token, (0, filling), value=-1).view(-1, blocks, _BLOCK)
    index = (places.first + places.of_far).clamp(max=tokens - 1)[:, None, :, None]
    far = keys.gather(2, index.expand(batch, kv_heads, -1, head_dim)).transpose(-1, -2)

    per_block = new.query[:, :, 0, 0].numel() * _BLOCK * (_NEAR + _HERE + far.shape[-1])
    step = max(1, _NUMBERS.get(keys.device.type, _MOST_NUMBERS) // per_block)
    found = []
    for part in (slice(at, at + step) for at in range(0, blocks, step)):
        bias = _bias(is_near[:, part], of_query[:, part], places)
        inside = slice(part.start * _BLOCK, part.stop * _BLOCK)
        query = new.query[:, :, inside] * made.scale  # before the products, which may not fit into float16
        if new.valid is not None:  # padding may hold anything
            query = torch.where(valid[:, None, inside, None], query, 0)
        here = _in_blocks(query, kv_heads)
        ahead = _in_blocks(rotation.turn(query, by[:, None, inside]), kv_heads)
        part_of_near = near[:, :, part]
        logits = here.new_empty((*here.shape[:-1], bias.shape[-1]), dtype=torch.float32)
        logits[..., :_NEAR] = ahead @ part_of_near
        logits[..., _NEAR : _NEAR + _HERE] = here @ part_of_near[..., :_HERE]
        logits[..., _NEAR + _HERE :] = (ahead.flatten(2, 3) @ far).view(*here.shape[:-1], -1)
        logits = logits.unflatten(3, (-1, _BLOCK))  # [batch, kv_heads, blocks, group, block, keys]
        if made.softcap is not None:
            logits.div_(made.softcap).tanh_().mul_(made.softcap)
        logits.add_(bias[:, None, :, None])
        top = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)  # some padding sees nothing
        total = logits.sub_(top).exp_().sum(-1, keepdim=True)
        if made.sinks is not None:
            total += (made.sinks.view(1, kv_heads, 1, -1, 1, 1) - top).exp()
        real = (of_query[:, part] >= 0) & (of_query[:, part] < places.count[:, :, None])
        total.masked_fill_(~real[:, None, :, None, :, None], torch.inf)
        found.append((logits[..., :_NEAR] / total).square_().sum(-2))
    overlapping = torch.cat(found, 2).permute(0, 1, 3, 4, 2).flatten(0, 2)  # [batch * q_heads, near, blocks]
    summed = F.fold(overlapping, (1, blocks * _BLOCK + 2 * _MARGIN), (1, _NEAR), stride=(1, _BLOCK))
    result = summed[:, 0, 0, _MARGIN : _MARGIN + tokens].unflatten(0, (batch, kv_heads, -1))
    if new.position:
        result = result * (1 - _share_of_the_past(chunk, by, rotation))[..., None].square()
    return torch.where(valid[:, None, None], result, 0.0)


def _in_blocks(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """`[batch, kv_heads, blocks, group * block, head_dim]` from `[batch, q_heads, tokens, head_dim]` and zeros."""
    query = F.pad(query, (0, 0, 0, -query.shape[2] % _BLOCK))
    return query.unflatten(1, (kv_heads, -1)).unflatten(3, (-1, _BLOCK)).transpose(2, 3).flatten(3, 4)


def _bias(is_near: torch.Tensor, of_query: torch.Tensor, places: _Places) -> torch.Tensor:
    """What is added to logits: nothing, minus infinity, or the logarithm of how many keys a sampled key stands for.

    Args:
        is_near (`torch.Tensor`): Whether the near keys of each block are real, `bool` `[batch, blocks, near]`.
        of_query (`torch.Tensor`): Places of the queries, `int64` `[batch, blocks, block]`.
        places (`_Places`): Of the chunk.

    Returns:
        `torch.Tensor`: float32 `[batch, blocks, block, near + here + sinks + sample]`: for the near keys seen from
        behind the chunk, for those seen from where a query stands, and for the far ones.
    """
    device = is_near.device
    behind = torch.arange(_BLOCK, device=device)[:, None] + _MARGIN - torch.arange(_NEAR, device=device)
    ahead = is_near[:, :, None] & (behind.abs() <= _MARGIN)
    here = (ahead & (behind >= 0))[..., :_HERE]
    distance = (of_query[..., None] - places.of_far[:, None, None]).abs()
    far = (distance > _MARGIN) & (places.of_far < places.count)[:, None, None]
    sinks = far[..., :_SINKS].sum(-1)
    sampled = far.sum(-1) - sinks
    all_others = (places.count[:, :, None] - ahead.sum(-1) - sinks).clamp(min=1)
    each = (all_others / sampled.clamp(min=1)).log()[..., None].expand(*sampled.shape, _SAMPLE)
    seen = torch.cat([ahead, here, far], -1)
    return F.pad(each, (seen.shape[-1] - _SAMPLE, 0)).masked_fill(~seen, -torch.inf)


def _share_of_the_past(chunk: Chunk, by: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """How much of their attention the chunk's queries give to what was stored before it, `[batch, kv_heads, group]`."""
    new, store = chunk.new, chunk.store
    batch, kv_heads, tokens, _ = new.key.shape
    asked = torch.linspace(0, tokens - 1, min(_ASKED, tokens), device=by.device).long()
    query_valid = None if new.valid is None else new.valid[:, asked].contiguous()
    past, tail, _ = store.backend.window_scores(
        rotation.turn(new.query[:, :, asked], by[:, None, asked]),
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
