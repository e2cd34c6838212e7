"""What may be subtracted from every key of a row before it is stored: a steady part of its mean.

Softmax does not change when all logits of a query change by the same number, so one vector taken off all keys of a
row need never be added back. Without its mean a key has a smaller range, and its codes a finer step (LeanKV's per-token
groups, arXiv 2412.03131, are at their worst with offset channels; KIVI, arXiv 2402.02750, measures those).

Rotary embedding makes the mean of most channels turn with position, so the mean of a prompt may be wrong for what
follows. A channel is trusted only as far as the quarters of the prompt agree on its mean.
"""

import torch

from kvcompress_hf.kernels import get_backend
from kvcompress_hf.kernels.quantize import affine_parameters, hadamard

_QUERIES = 32  # the last ones of the first chunk say which keys matter
# What may be left of the squared error. 8-bit keys have little to gain but for large biases (Qwen2), and SmolLM2 lost
# a little by a mean taken off.
_LEFT_OF_4_BITS, _LEFT_OF_8_BITS = 0.9, 0.25
_PARTS = 4
_LEAST_TOKENS = 16  # of a sequence; fewer say nothing about a mean
_MOST_TOKENS = 1024  # of a sequence that are looked at, evenly spread


def wanted_shift(keys: torch.Tensor, query: torch.Tensor, real: torch.Tensor | None, bits: int) -> torch.Tensor:
    """The steady mean of the heads that gain by it, zero for the others.

    Args:
        keys (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`.
        query (`torch.Tensor`): As for [`gains`].
        real (`torch.Tensor`, *optional*): `bool` `[batch, tokens]`, false for padding.
        bits (`int`): Bits of the keys' codes.

    Returns:
        `torch.Tensor`: `[batch, kv_heads, 1, head_dim]` in the dtype of `keys`.
    """
    native = get_backend(keys.device).plans
    if native is not None:
        return native.key_shift(keys, query, real, bits, _left(bits))
    mean = steady_mean(keys, real)
    return torch.where(gains(keys, mean, query, real, bits), mean, 0.0)


def _left(bits: int) -> float:
    return _LEFT_OF_4_BITS if bits <= 4 else _LEFT_OF_8_BITS


def steady_mean(keys: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """The mean key of each sequence and head, each channel moved towards zero by the range of its quarters' means.

    Args:
        keys (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`.
        real (`torch.Tensor`, *optional*): `bool` `[batch, tokens]`, which tokens count; all when left out.

    Returns:
        `torch.Tensor`: `[batch, kv_heads, 1, head_dim]` in the dtype of `keys`, rounded to bfloat16 so that another
        order of additions rarely shows; zero for a sequence of fewer than 16 tokens.
    """
    batch, _, tokens, _ = keys.shape
    if real is None:
        real = torch.ones((batch, tokens), dtype=torch.bool, device=keys.device)
    count = real.sum(1, keepdim=True)
    index, used = evenly_spread(real, _MOST_TOKENS)
    part = ((real.cumsum(1) - 1) * _PARTS // count.clamp(min=1)).gather(1, index)
    # One sequence at a time: copying whole rows is many times faster than indexing all sequences at once.
    states = torch.stack([one.index_select(1, chosen).float() for one, chosen in zip(keys, index, strict=True)])
    weight = (used[:, None] & (part[:, None] == torch.arange(_PARTS, device=keys.device)[:, None])).float()
    means = weight[:, None] @ states / weight.sum(2).clamp(min=1)[:, None, :, None]
    mean, spread = means.mean(2, keepdim=True), means.amax(2, keepdim=True) - means.amin(2, keepdim=True)
    steady = mean - mean.clamp(-spread, spread)
    steady = torch.where((count >= _LEAST_TOKENS)[:, :, None, None], steady, 0.0)
    return steady.bfloat16().to(keys.dtype)


def evenly_spread(real: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Picks tokens of each sequence, evenly spread and the same whatever padding there is.

    Args:
        real (`torch.Tensor`): `bool` `[batch, tokens]`, false for padding.
        most (`int`): Most tokens of a sequence.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Which tokens, in their order, `int64` `[batch, picked]`; and whether there
        is one, `bool` likewise: where there is none the first is named again, as padding may hold anything, NaN too.
    """
    count = real.sum(1, keepdim=True)
    rank = real.cumsum(1) - 1
    sampled = real & (rank % (1 + (count - 1) // most).clamp(min=1) == 0)
    # A stable sort brings the sampled tokens to the front.
    index = (~sampled).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    used = sampled.gather(1, index)
    return torch.where(used, index, index[:, :1]), used


def gains(
    keys: torch.Tensor, shift: torch.Tensor, query: torch.Tensor, real: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Whether logits get closer to the true ones when a shift is taken off the keys before they are quantised.

    Most keys of a head have a smaller range without their mean, but that need not help: the first token of a text is
    often unlike the others and looked at the most; and the extreme channel of a key is stored exactly, which is the one
    that queries are large in too. So both ways are tried, and the errors of the logits of the last queries compared.

    Args:
        keys (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`.
        shift (`torch.Tensor`): `[batch, kv_heads, 1, head_dim]`.
        query (`torch.Tensor`): Queries times the factor on the logits, `[batch, q_heads, queries, head_dim]`; the last
            32 are looked at.
        real (`torch.Tensor`, *optional*): `bool` `[batch, tokens]`, false for padding.
        bits (`int`): Bits of the keys' codes; of 4 and fewer they are Hadamard-rotated before.

    Returns:
        `torch.Tensor`: True for heads that gain, `bool` `[batch, kv_heads, 1, 1]`.
    """
    batch, kv_heads, tokens, dim = keys.shape
    stride = -(-tokens // _MOST_TOKENS)
    there = torch.ones((batch, tokens), dtype=torch.bool, device=keys.device) if real is None else real
    # The first token of each sequence, and others evenly spread.
    first = there.to(torch.uint8).argmax(1)
    index = torch.cat([first[:, None], torch.arange(0, tokens, stride, device=keys.device).expand(batch, -1)], dim=1)
    used = there.gather(1, index)
    used[:, 1:] &= index[:, 1:] != first[:, None]
    # One sequence at a time: copying whole rows is many times faster than indexing all sequences at once.
    sampled = torch.stack([one.index_select(1, chosen).float() for one, chosen in zip(keys, index, strict=True)])
    sampled.masked_fill_(~used[:, None, :, None], 0.0)
    looks = query[:, :, -_QUERIES:].float()
    looking = there[:, -looks.shape[2] :].float()[:, None, None]
    looks = looks.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [batch, kv_heads, group * queries, head_dim]
    logits = looks @ sampled.transpose(-1, -2)
    logits.masked_fill_(~used[:, None, None], torch.finfo(torch.float32).min)
    weight = logits.softmax(-1).nan_to_num_()
    if bits <= 4:  # orthonormal: products of transformed vectors are what they were
        transform = hadamard(torch.eye(dim, device=keys.device), dim & -dim)
        sampled, looks, shift = sampled @ transform, looks @ transform, shift.float() @ transform

    def error(states: torch.Tensor) -> torch.Tensor:
        noise = looks @ _rounding(states, bits).transpose(-1, -2)
        # Softmax does not see what all keys have in common.
        noise.sub_(torch.linalg.vecdot(noise, weight)[..., None]).square_()
        of_query = torch.linalg.vecdot(noise, weight).unflatten(2, (-1, looking.shape[-1]))
        return (of_query * looking).sum((2, 3))

    return (error(sampled - shift.float()) < _left(bits) * error(sampled))[..., None, None]


def _rounding(states: torch.Tensor, bits: int) -> torch.Tensor:
    """What quantising changes in float32 `[..., head_dim]`: [`dequantize`] of [`quantize`], less the states."""
    scale, offset, _ = affine_parameters(states, bits)
    step, low = scale.float()[..., None], offset.float()[..., None]
    codes = (states - low).div_(step.clamp(min=torch.finfo(torch.float32).tiny)).clamp_(0, 2**bits - 1).round_()
    return codes.mul_(step).add_(low).sub_(states)
