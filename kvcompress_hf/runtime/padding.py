"""Where the padding of each sequence was, so that plans and observers see it as if none had come between tokens."""

from dataclasses import replace

import torch
from torch import Tensor

from kvcompress_hf.paging.waiting import known_as, to_device
from kvcompress_hf.runtime.call import AttentionCall


def runs_of(real: Tensor, position: int) -> Tensor:
    """Runs of padding in a chunk.

    Args:
        real (`torch.Tensor`): `bool` `[batch, tokens]` on the host, false for padding.
        position (`int`): Logical position of the first token.

    Returns:
        `torch.Tensor`: `int64` `[batch, runs, 2]`, first position and length; of length 0 where a sequence has fewer.
    """
    batch = real.shape[0]
    edge = torch.zeros((batch, 1), dtype=torch.int8)
    steps = torch.cat([edge, (~real).to(torch.int8), edge], dim=1).diff(dim=1)
    starts, ends = ((steps == way).nonzero() for way in (1, -1))  # sorted by sequence, then by position
    counts = torch.bincount(starts[:, 0], minlength=batch)
    runs = torch.zeros((batch, int(counts.max()), 2), dtype=torch.int64)
    place = torch.arange(len(starts)) - (counts.cumsum(0) - counts)[starts[:, 0]]
    runs[starts[:, 0], place] = torch.stack([starts[:, 1] + position, ends[:, 1] - starts[:, 1]], dim=1)
    return runs


def with_runs(runs: Tensor | None, more: Tensor) -> Tensor:
    """Runs of padding, and those of what came later.

    Args:
        runs (`torch.Tensor`, *optional*): `int64` `[batch, runs, 2]`.
        more (`torch.Tensor`): Likewise.

    Returns:
        `torch.Tensor`: `int64` `[batch, runs, 2]`; a run that goes on is one, where that is so for every sequence.
    """
    if runs is None or not runs.shape[1]:
        return more
    if more.shape[1] == 1:
        last, new = runs[:, -1], more[:, 0]
        goes_on = (last.sum(1) == new[:, 0]) | (new[:, 1] == 0)
        if bool(goes_on.all()):
            joined = torch.stack([last[:, 0], last[:, 1] + new[:, 1]], dim=1)
            return torch.cat([runs[:, :-1], joined[:, None]], dim=1)
    return torch.cat([runs, more], dim=1)


def cut_runs(runs: Tensor, seen: int) -> Tensor:
    """Runs of padding once the newest tokens are gone.

    Args:
        runs (`torch.Tensor`): `int64` `[batch, runs, 2]`.
        seen (`int`): Tokens that are left.

    Returns:
        `torch.Tensor`: `int64` `[batch, runs, 2]`; zeros in place of runs of which nothing is left.
    """
    left = torch.minimum(runs[..., 1], (seen - runs[..., 0]).clamp(min=0))
    return torch.stack([runs[..., 0] * (left > 0), left], dim=-1)


def padding_first(positions: Tensor, runs: Tensor | None) -> Tensor:
    """Positions as they would be if all padding had come before the first token.

    Args:
        positions (`torch.Tensor`): `int32` `[batch, rows, slots]`.
        runs (`torch.Tensor`, *optional*): `int64` `[batch, runs, 2]`, all padding of each sequence.

    Returns:
        `torch.Tensor`: The moved positions, `int32` `[batch, rows, slots]`.
    """
    if runs is None or not bool(((runs[..., 0] > 0) & (runs[..., 1] > 0)).any()):
        return positions
    moved = positions
    for start, length in _columns(runs, positions):
        moved = moved + torch.where(start > positions, length, 0)
    return moved


def _columns(runs: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Start and length of each run, to be compared with `[batch, rows, slots]`."""
    there = to_device(runs.to(torch.int32), positions.device)
    return [(there[:, i, 0, None, None], there[:, i, 1, None, None]) for i in range(there.shape[1])]


def aligned(new: AttentionCall, real: Tensor | None) -> tuple[AttentionCall, Tensor | None]:
    """New tokens with each sequence's padding before its tokens, as observers look at them.

    Args:
        new (`AttentionCall`): The tokens.
        real (`torch.Tensor`, *optional*): `new.valid` on the host.

    Returns:
        `tuple[AttentionCall, torch.Tensor | None]`: The tokens; and where each was, `int64` `[batch, tokens]`, or
        `None` if they were so already.
    """
    if real is None or bool((real[:, 1:] >= real[:, :-1]).all()):
        return new, None
    order_here = real.to(torch.uint8).argsort(dim=1, stable=True)
    order = to_device(order_here, new.key.device)

    def moved(states: Tensor) -> Tensor:
        return states.gather(2, order[:, None, :, None].expand_as(states))

    valid = None if new.valid is None else known_as(new.valid.gather(1, order), real.gather(1, order_here))
    return replace(
        new, query=moved(new.query), key=moved(new.key), value=moved(new.value), valid=valid, mask=None
    ), order


def put_back(fields: dict[str, Tensor], order: Tensor | None) -> dict[str, Tensor]:
    """Fields of aligned tokens in the order in which the tokens came.

    Args:
        fields (`dict[str, torch.Tensor]`): `[batch, kv_heads, tokens]`.
        order (`torch.Tensor`, *optional*): As from [`aligned`].

    Returns:
        `dict[str, torch.Tensor]`: Fields by name in that order, `[batch, kv_heads, tokens]`.
    """
    if order is None:
        return fields
    at = order[:, None]
    return {name: torch.empty_like(x).scatter_(2, at.expand_as(x), x) for name, x in fields.items()}
