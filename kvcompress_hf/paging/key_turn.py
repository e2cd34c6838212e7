"""Keys and queries at other positions: turned on by rotary embedding, stored keys that move nearer to the present too.

Rotary embedding turns each pair of channels by position times the pair's frequency, and attention sees the difference
of two positions only (RoFormer, arXiv 2104.09864). So a stored key that is to look `d` positions nearer is turned by
another `d` positions, whatever its own position was.
"""

from dataclasses import dataclass

import torch

from kvcompress_hf.paging.waiting import to_device

__all__ = ["Rotation", "newer_evicted", "turn", "turn_keys"]


@dataclass(frozen=True, eq=False)
class Rotation:
    """How position turns the queries of a layer.

    Args:
        inv_freq (`torch.Tensor`): Radians per position of each pair of channels, float32 `[pairs]` on the host;
            negative where a family turns the other way. No pairs: position does not turn queries at all.
        start (`int`): The first channel that is turned.
        interleaved (`bool`): Whether a pair is two neighbours, as in GPT-J, instead of two channels half of the turned
            ones apart, as in Llama.
    """

    inv_freq: torch.Tensor
    start: int = 0
    interleaved: bool = False

    @property
    def width(self) -> int:
        """`int`: Channels that are turned."""
        return 2 * self.inv_freq.numel()

    def turn(self, states: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """Queries as they would be at later positions.

        Args:
            states (`torch.Tensor`): `[..., head_dim]`.
            by (`torch.Tensor`): Positions to go forward, integers `[...]` or broadcasting to it.

        Returns:
            `torch.Tensor`: `[..., head_dim]` in the dtype of `states`, computed in float32.
        """
        width = self.width
        if not width:
            return states
        rotary = states[..., self.start : self.start + width]
        if self.interleaved:
            rotary = rotary.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        turned = turn(rotary, by, to_device(self.inv_freq, states.device)).to(states.dtype)
        if self.interleaved:
            turned = turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return torch.cat((states[..., : self.start], turned, states[..., self.start + width :]), dim=-1)


def turn(states: torch.Tensor, by: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Rotates the rotary channels of keys or queries on by some positions.

    Channel `i` of the first `2 * pairs` is paired with channel `i + pairs`, as in Llama; the channels behind them have
    no rotary embedding.

    Args:
        states (`torch.Tensor`): `[..., head_dim]`.
        by (`torch.Tensor`): Positions to go forward, integers `[...]` or broadcasting to it.
        inv_freq (`torch.Tensor`): Radians per position of each pair, float32 `[pairs]`.

    Returns:
        `torch.Tensor`: The rotary channels, rotated, float32 `[..., 2 * pairs]`.
    """
    pairs = inv_freq.numel()
    angles = by.double()[..., None] * inv_freq.double()  # in float32, a large number of positions would lose the angle
    cos, sin = angles.cos().float(), angles.sin().float()
    first, second = states[..., :pairs].float(), states[..., pairs : 2 * pairs].float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


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
