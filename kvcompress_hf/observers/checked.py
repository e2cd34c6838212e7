"""Calls of observers that check what comes back, so that a slip in somebody's own class is reported by its name."""

from typing import Any

import torch

from kvcompress_hf.observers.base import Chunk, Observer
from kvcompress_hf.observers.look import Look
from kvcompress_hf.paging.slots import Slots
from kvcompress_hf.validation import check_returned, naming


def observe(observer: Observer, chunk: Chunk) -> dict[str, torch.Tensor]:
    """Lets an observer look at a chunk.

    Args:
        observer (`Observer`): The observer.
        chunk (`Chunk`): The new tokens.

    Returns:
        `dict[str, torch.Tensor]`: The fields of the new tokens by name, float32 `[batch, kv_heads, tokens]`.

    Raises:
        TypeError: If it returned something else.
        ValueError: If fields are missing or too many, or of another shape.
    """
    with naming(observer, "observe"):
        fields: Any = observer.observe(chunk)
    expected = [name for name in observer.fields if name not in observer.describes]
    return _fields(observer, "observe", fields, expected, chunk.new.key.shape)


def observe_again(observer: Observer, chunk: Chunk) -> None:
    """Lets an observer look at tokens that are read a second time.

    Args:
        observer (`Observer`): The observer.
        chunk (`Chunk`): The tokens.
    """
    with naming(observer, "observe_again"):
        observer.observe_again(chunk)


def look(observer: Observer, at: Look) -> dict[str, torch.Tensor]:
    """Lets an observer look at stored keys.

    Args:
        observer (`Observer`): The observer.
        at (`Look`): Everything a layer holds.

    Returns:
        `dict[str, torch.Tensor]`: The fields that it makes, by name, float32 `[batch, kv_heads, slots]`.

    Raises:
        TypeError: If it returned something else.
        ValueError: If fields are missing or too many, or of another shape.
    """
    with naming(observer, "look"):
        fields: Any = observer.look(at)
    return _fields(observer, "look", fields, list(observer.looks), at.keys.shape)


def describe(
    observer: Observer,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_mean: torch.Tensor,
    value_mean: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Asks an observer for the fields that follow from keys and values.

    Args:
        observer (`Observer`): The observer.
        keys (`torch.Tensor`): As for [`Observer.describe`].
        values (`torch.Tensor`): As for [`Observer.describe`].
        key_mean (`torch.Tensor`): As for [`Observer.describe`].
        value_mean (`torch.Tensor`): As for [`Observer.describe`].

    Returns:
        `dict[str, torch.Tensor]`: Its fields by name, float32 `[batch, kv_heads, tokens]`.

    Raises:
        TypeError: If it returned something else.
        ValueError: If fields are missing or too many, or of another shape.
    """
    with naming(observer, "describe"):
        fields: Any = observer.describe(keys, values, key_mean, value_mean)
    return _fields(observer, "describe", fields, list(observer.describes), keys.shape)


def rank(observer: Observer, slots: Slots) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Asks an observer how important slots are, and how unsettled that is.

    Args:
        observer (`Observer`): The observer.
        slots (`Slots`): Every stored slot.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: Importance, and how unsettled it is if the observer can tell;
        float32 `[batch, rows, slots]` each.

    Raises:
        TypeError: If it returned something else.
        ValueError: If a tensor is of another shape.
    """
    shape = tuple(slots.filled.shape)
    with naming(observer, "importance"):
        importance: Any = observer.importance(slots)
    check_returned(observer, "importance", importance, torch.float32, shape, "[batch, rows, slots]")
    with naming(observer, "spread"):
        spread: Any = observer.spread(slots)
    if spread is not None:
        check_returned(observer, "spread", spread, torch.float32, shape, "[batch, rows, slots]")
    return importance, spread


def _fields(
    observer: Observer, method: str, fields: Any, expected: list[str], of_keys: torch.Size
) -> dict[str, torch.Tensor]:
    called = f"{type(observer).__name__}.{method}"
    if not isinstance(fields, dict):
        raise TypeError(f"{called} returned {type(fields).__name__}; it must return a dict of slot fields by name.")
    if sorted(map(str, fields)) != sorted(expected):
        wanted = f"its fields {', '.join(expected)}" if expected else "an empty dict"
        raise ValueError(
            f"{called} returned the fields {', '.join(map(str, fields)) or '(none)'}; it must return {wanted} "
            f"(fields={observer.fields}, describes={observer.describes})."
        )
    for name, values in fields.items():
        shape = tuple(of_keys[:3])
        check_returned(observer, f"{method}()[{name!r}]", values, torch.float32, shape, "[batch, kv_heads, tokens]")
    return fields
