"""Indices of sequences that people give to a cache, checked whole before anything is changed."""

import operator
from typing import Any

import torch

from kvcompress_hf.validation import shown

__all__ = ["as_integer", "as_sequences"]


def as_integer(name: str, value: Any) -> int:
    """An integer out of whatever holds one, such as a tensor of one element.

    Args:
        name (`str`): Name of the argument, for messages.
        value (`Any`): What was given.

    Returns:
        `int`: Python's own integer.

    Raises:
        ValueError: If it is a fraction, a truth value or no number at all.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {shown(value)}; it must be an integer.") from None


def as_sequences(name: str, indices: Any, batch: int) -> torch.Tensor:
    """Indices of sequences, or a mask over them, as indices from 0 to `batch - 1`.

    Args:
        name (`str`): Name of the argument, for messages.
        indices (`Any`): What was given: integers, negative ones counting from the last sequence, or truth values.
        batch (`int`): Sequences held; an empty cache takes any indices, as it has nothing to select from.

    Returns:
        `torch.Tensor`: `int64` `[new batch]`, at least one.

    Raises:
        ValueError: If they are anything else.
    """
    allowed = f"{name} must be integers from {-batch} to {batch - 1}, one per sequence to keep, or {batch} truth values"
    try:
        given = torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{allowed}; got {shown(indices)}.") from None
    if given.dim() != 1 or given.is_floating_point() or given.is_complex():
        raise ValueError(f"{allowed}; got {given.dtype} of shape {list(given.shape)}.")
    if not batch:
        return given.long()
    if given.dtype == torch.bool:
        if given.numel() != batch:
            raise ValueError(f"{allowed}; got {given.numel()} truth values.")
        given = given.nonzero().flatten()
    given = given.long()
    if not given.numel():
        raise ValueError(f"{allowed}; got none, and a cache holds at least one sequence. To empty it call reset().")
    low, high = int(given.min()), int(given.max())
    if low < -batch or high >= batch:
        raise ValueError(f"{allowed}; got {low if low < -batch else high}.")
    return torch.where(given < 0, given + batch, given)
