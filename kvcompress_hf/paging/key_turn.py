"""Keys and queries at other positions: turned on by rotary embedding, stored keys that move nearer to the present too.

Rotary embedding turns each pair of channels by position times the pair's frequency, and attention sees the difference
of two positions only (RoFormer, arXiv 2104.09864). So a stored key that is to look `d` positions nearer is turned by
another `d` positions, whatever its own position was.
"""

import torch

from kvcompress_hf.kernels.rotation import Rotation, turn

__all__ = ["Rotation", "newer_evicted", "turn", "turn_keys"]


def turn_keys(keys: torch.Tensor, by: torch.Tensor, inv_freq: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """Rotates stored keys on by some positions, see [`turn`].

    Args:
        keys (`torch.Tensor`): `[n, head_dim]`.
        by (`torch.Tensor`): Positions to go forward, `int32` `[n]`.
        inv_freq (`torch.Tensor`): Radians per position of each pair, float32 `[pairs]`.
        seed (`torch.Tensor`): `int32` `[n]`, another one each time a key is turned; see [`_round`].

    Returns:
        `torch.Tensor`: `[n, head_dim]` in the dtype of `keys`, computed in float32.
    """
    turned = turn(keys, by, inv_freq)
    return torch.cat((_round(turned, keys.dtype, seed), keys[:, turned.shape[1] :]), dim=1)


def _round(values: torch.Tensor, dtype: torch.dtype, seed: torch.Tensor) -> torch.Tensor:
    """Rounds `[n, channels]` up or down by chance, right on average; the chance follows from values and seed.

    A key that is turned again and again must not be rounded to nearest: turns smaller than the grid would never happen,
    and large ones lock into cycles on it.
    """
    if dtype == values.dtype:
        return values
    bits = values.view(torch.int32).long() + seed.long()[:, None] * 0x9E3779B1
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    chance = ((bits >> 16).float() + 0.5) / 0x10000 - 0.5
    spacing = torch.ldexp(torch.full_like(values, torch.finfo(dtype).eps), values.frexp().exponent - 1)
    return (values + chance * spacing).to(dtype)


def newer_evicted(positions: torch.Tensor, filled: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """How many slots that go are newer than each one that stays, in its row.

    Args:
        positions (`torch.Tensor`): `int32` `[..., slots]`.
        filled (`torch.Tensor`): `bool` `[..., slots]`, false where there is no slot.
        gone (`torch.Tensor`): `bool` `[..., slots]`, which of them go.

    Returns:
        `torch.Tensor`: `int32` `[..., slots]`, 0 for what goes and where there is no slot.
    """
    order = torch.where(filled, positions, -1).argsort(dim=-1, descending=True)
    newer = (filled & gone).gather(-1, order).cumsum(-1, dtype=torch.int32)
    counts = torch.empty_like(newer).scatter_(-1, order, newer)
    return torch.where(filled & ~gone, counts, 0)
