"""How position turns queries and keys: rotary embedding (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .staging import send

__all__ = ["Rotation", "turn"]


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

    inv_freq: Tensor
    start: int = 0
    interleaved: bool = False

    @property
    def width(self) -> int:
        """`int`: Channels that are turned."""
        return 2 * self.inv_freq.numel()

    def turn(self, states: Tensor, by: Tensor) -> Tensor:
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
        turned = turn(rotary, by, send(self.inv_freq, states.device)).to(states.dtype)
        if self.interleaved:
            turned = turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return torch.cat((states[..., : self.start], turned, states[..., self.start + width :]), dim=-1)


def turn(states: Tensor, by: Tensor, inv_freq: Tensor) -> Tensor:
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
