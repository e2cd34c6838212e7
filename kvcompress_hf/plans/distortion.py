"""What storing a slot in a tier loses, measured on the spot as a fraction of what evicting it would lose."""

from collections.abc import Sequence

import torch

from kvcompress_hf.kernels.quantize import dequantize, hadamard, quantize
from kvcompress_hf.paging.waiting import on_host, to_device
from kvcompress_hf.plans.native import native_for

MOST_MEASURED = 256  # newest tokens that are sampled
_KEYS = 64
_QUERIES = 16


def measure_distortion(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    tiers: Sequence[tuple[int, int]],
    padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss per tier: relative error of values plus variance of the error of logits.

    With attention weights `p`, noise of variance `s` on the logits moves the output by about `p * |v - o|` times its
    square root, and noise on the values by `p` times it; evicting a slot moves it by `p * |v - o|`. So the loss
    relative to evicting is `|v' - v|**2 / |v - mean v|**2 + var(q.k' - q.k)`, and native storage loses nothing. The
    logits' error counts without each query's mean, which softmax does not see.

    Args:
        query (`torch.Tensor`): `[batch, q_heads, tokens, head_dim]`.
        keys (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`.
        values (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`, as they will be stored.
        scale (`float`): Factor on the logits.
        tiers (`Sequence[tuple[int, int]]`): Key and value bits of each tier, (0, 0) for native.
        padding (`torch.Tensor`, *optional*): `int64` `[batch]`, padding tokens at the front of each sequence; best if
            known on the host.

    Returns:
        `torch.Tensor`: float32 `[batch, kv_heads, tiers]`, NaN for a sequence that is all padding.
    """
    native = native_for(keys)
    if native is not None:
        return native.tier_losses(query, keys, values, scale, tiers, padding)
    return in_torch(query, keys, values, scale, tiers, padding)


def in_torch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    tiers: Sequence[tuple[int, int]],
    padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """[`measure_distortion`] in torch, for every device.

    Args:
        query (`torch.Tensor`): As for [`measure_distortion`], like all that follows.
        keys (`torch.Tensor`): Likewise.
        values (`torch.Tensor`): Likewise.
        scale (`float`): Likewise.
        tiers (`Sequence[tuple[int, int]]`): Likewise.
        padding (`torch.Tensor`, *optional*): Likewise.

    Returns:
        `torch.Tensor`: As of [`measure_distortion`].
    """
    counts = [keys.shape[2]] * keys.shape[0] if padding is None else (keys.shape[2] - on_host(padding)).tolist()
    result = torch.full((keys.shape[0], keys.shape[1], len(tiers)), float("nan"), device=keys.device)
    for real in sorted(set(counts) - {0}):  # a sequence is measured as if it came alone
        alike = to_device(torch.tensor([i for i, count in enumerate(counts) if count == real]), keys.device)
        q, k, v = (x[:, :, -min(real, MOST_MEASURED) :][alike] for x in (query, keys, values))
        # Where numbers leave their range, storing is as bad as evicting; NaN is for what has not been measured.
        result[alike] = _measure(q, k, v, scale, tiers).nan_to_num(nan=1.0, posinf=1.0)
    return result


def _measure(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, tiers: Sequence[tuple[int, int]]
) -> torch.Tensor:
    tokens, kv_heads, dim = keys.shape[2], keys.shape[1], keys.shape[3]
    step = max(1, min(tokens, MOST_MEASURED) // _KEYS)
    k = keys[:, :, -MOST_MEASURED:][:, :, ::step].float()
    v = values[:, :, -MOST_MEASURED:][:, :, ::step].float()
    q = query[:, :, -_QUERIES:].float()
    q = q.reshape(q.shape[0], kv_heads, -1, dim)
    block = dim & -dim
    spread = (v - v.mean(2, keepdim=True)).square().sum(-1).mean(2)  # [batch, kv_heads]
    losses = []
    for key_bits, value_bits in tiers:
        loss = torch.zeros_like(spread)
        if value_bits:
            loss += (_round_trip(v, value_bits, values=True) - v).square().sum(-1).mean(2) / spread.clamp(min=1e-12)
        if key_bits:
            stored = hadamard(_round_trip(hadamard(k, block), key_bits), block) if key_bits <= 4 else None
            error = (_round_trip(k, key_bits) if stored is None else stored) - k
            logits = (q @ error.transpose(-1, -2)) * scale
            loss += (logits - logits.mean(-1, keepdim=True)).square().mean((-1, -2))
        losses.append(loss)
    return torch.stack(losses, dim=-1)


def _round_trip(x: torch.Tensor, bits: int, values: bool = False) -> torch.Tensor:
    codes, scale, offset, _ = quantize(x, bits, values)
    return dequantize(codes, scale, offset)
