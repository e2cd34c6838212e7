"""Which slots of a row come first: the least important, and of equal ones the older."""

from dataclasses import dataclass

import torch

from kvcompress_hf.plans.base import PlanView
from kvcompress_hf.plans.native import native_for


def view_of(view: PlanView, rows: torch.Tensor) -> "FlatRows":
    """The slots of several rows as if they were one row.

    Args:
        view (`PlanView`): Every slot.
        rows (`torch.Tensor`): Indices of the rows, `int64` `[n]`.

    Returns:
        `FlatRows`: Importance, positions and filled, each `[batch, 1, rows * slots]`.
    """
    parts = (view.importance, view.positions, view.filled)
    return FlatRows(*(part[:, rows].flatten(1)[:, None] for part in parts))


@dataclass(frozen=True)
class FlatRows:
    """Slots of several rows in one; see [`view_of`]."""

    importance: torch.Tensor
    positions: torch.Tensor
    filled: torch.Tensor


def lowest(view: PlanView | FlatRows, candidates: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The least important candidates of every row; of equal ones the older.

    Args:
        view (`PlanView` or `FlatRows`): Importance and positions.
        candidates (`torch.Tensor`): `bool` `[batch, rows, slots]`.
        count (`torch.Tensor`): `int64` `[batch, rows]`, how many.

    Returns:
        `torch.Tensor`: `bool` `[batch, rows, slots]`.
    """
    native = native_for(view.importance)
    if native is not None:
        return native.lowest(view.importance, view.positions, candidates, count)
    return lowest_by_sorting(view, candidates, count)


def lowest_by_sorting(view: PlanView | FlatRows, candidates: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """[`lowest`] in torch, which sorts whole rows.

    Args:
        view (`PlanView` or `FlatRows`): Importance and positions.
        candidates (`torch.Tensor`): `bool` `[batch, rows, slots]`.
        count (`torch.Tensor`): `int64` `[batch, rows]`, how many.

    Returns:
        `torch.Tensor`: `bool` `[batch, rows, slots]`.
    """
    score = torch.where(candidates, view.importance, torch.inf)
    order = view.positions.argsort(dim=-1, stable=True)
    order = order.gather(-1, score.gather(-1, order).argsort(dim=-1, stable=True))
    return first_of(order, count) & candidates


def first_of(order: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The slots that come first in an order.

    Args:
        order (`torch.Tensor`): `int64` `[batch, rows, slots]`, a permutation of each row.
        count (`torch.Tensor`): `int64` `[batch, rows]`.

    Returns:
        `torch.Tensor`: `bool` `[batch, rows, slots]`.
    """
    place = torch.arange(order.shape[-1], device=order.device)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, (place < count[..., None]))
