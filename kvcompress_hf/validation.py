"""Checks of what people give: numbers and truth values within bounds, refused with the value, the bounds and the name.

Numbers must be Python's own `int` and `float` (or subclasses, such as `numpy.float64`, which become plain); booleans,
NaN, infinities, strings and other number types are refused, because each of them gets past a comparison somewhere.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from kvcompress_hf.units import parse_bytes

__all__ = [
    "MOST_BYTES",
    "MOST_TOKENS",
    "check_choice",
    "check_flags",
    "check_ints",
    "check_numbers",
    "check_returned",
    "naming",
    "require_bytes",
    "require_int",
    "shown",
]

MOST_TOKENS = 2**31 - 1  # positions and lengths are int32
MOST_BYTES = 2**63 - 1


def shown(value: object) -> str:
    """A value for an error message, cut where it is long.

    Args:
        value (`object`): Anything.

    Returns:
        `str`: Its `repr`, of at most 80 characters.
    """
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to write out very long ones
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def require_int(owner: str, name: str, value: object, low: int, high: int = MOST_TOKENS) -> int:
    """Refuses what is not an integer within bounds.

    Args:
        owner (`str`): Class of the argument, for the message; empty for the argument of a function.
        name (`str`): Name of the argument.
        value (`object`): What was given.
        low (`int`): Least allowed.
        high (`int`): Most allowed; by default the most tokens that a cache can count.

    Returns:
        `int`: The value as Python's own integer.

    Raises:
        ValueError: If it is not allowed.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        called = f"{owner}.{name}" if owner else name
        allowed = f">= {low}" if high == MOST_TOKENS else f"in [{low}, {high}]"
        if high == MOST_TOKENS and isinstance(value, int) and value > high:
            allowed = f"of at most {high}"
        raise ValueError(f"{called} is {shown(value)}; it must be an integer {allowed}.")
    return int(value)


def require_bytes(name: str, value: object) -> int:
    """Refuses what is not a number of bytes, or a text that says one.

    Args:
        name (`str`): Name of the argument.
        value (`object`): What was given.

    Returns:
        `int`: The value in bytes.

    Raises:
        TypeError: If it is neither an integer nor a string.
        ValueError: If it is not positive, too large, or the text is not a size.
    """
    if isinstance(value, str):
        return parse_bytes(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {shown(value)}; give an integer number of bytes, or a size such as '2GiB'.")
    return require_int("", name, value, 1, MOST_BYTES)


def check_ints(part: Any, *names: str, low: int, high: int = MOST_TOKENS) -> None:
    """Refuses arguments of a frozen dataclass that are not integers within bounds; `None` passes.

    Args:
        part (`Any`): The dataclass, in its `__post_init__`; the arguments become plain `int`.
        names (`str`): Names of the arguments.
        low (`int`): Least allowed.
        high (`int`): Most allowed.

    Raises:
        ValueError: If one of them is not allowed.
    """
    for name in names:
        value = getattr(part, name)
        if value is not None:
            object.__setattr__(part, name, require_int(type(part).__name__, name, value, low, high))


def check_numbers(part: Any, *names: str, low: float, high: float, without: tuple[float, ...] = ()) -> None:
    """Refuses arguments of a frozen dataclass that are not finite numbers within bounds.

    Args:
        part (`Any`): The dataclass, in its `__post_init__`; the arguments become plain `int` or `float`.
        names (`str`): Names of the arguments.
        low (`float`): Least allowed.
        high (`float`): Most allowed.
        without (`tuple[float, ...]`): Bounds that are not allowed themselves.

    Raises:
        ValueError: If one of them is not allowed.
    """
    for name in names:
        value = getattr(part, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high or value in without:
            opening, closing = "(" if low in without else "[", ")" if high in without else "]"
            raise ValueError(
                f"{type(part).__name__}.{name} is {shown(value)}; it must lie in {opening}{low:g}, {high:g}{closing}."
            )
        object.__setattr__(part, name, int(value) if isinstance(value, int) else float(value))


def check_flags(part: Any, *names: str) -> None:
    """Refuses arguments of a dataclass that are not truth values.

    Args:
        part (`Any`): The dataclass.
        names (`str`): Names of the arguments.

    Raises:
        ValueError: If one of them is neither `True` nor `False`.
    """
    for name in names:
        value = getattr(part, name)
        if not isinstance(value, bool):
            raise ValueError(f"{type(part).__name__}.{name} is {shown(value)}; it must be True or False.")


def check_choice(part: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Refuses an argument of a dataclass that is none of some words.

    Args:
        part (`Any`): The dataclass.
        name (`str`): Name of the argument.
        allowed (`tuple[str, ...]`): The words.

    Raises:
        ValueError: If it is another.
    """
    value = getattr(part, name)
    if not isinstance(value, str) or value not in allowed:
        words = " or ".join(map(repr, allowed)) if len(allowed) == 2 else f"one of {', '.join(allowed)}"
        raise ValueError(f"{type(part).__name__}.{name} is {shown(value)}; it must be {words}.")


@contextlib.contextmanager
def naming(part: Any, method: str) -> Iterator[None]:
    """Adds the name of a class to whatever its method raises.

    Args:
        part (`Any`): An instance of the class.
        method (`str`): Name of the method that is called inside.
    """
    try:
        yield
    except Exception as error:
        error.add_note(f"Raised in {type(part).__name__}.{method}, from {type(part).__module__}.")
        raise


def check_returned(part: Any, what: str, value: Any, dtype: Any, shape: tuple[int, ...], dims: str) -> None:
    """Refuses what a method returned if it is not a tensor of a dtype and a shape.

    Args:
        part (`Any`): Whose method it is.
        what (`str`): The method.
        value (`Any`): What it returned.
        dtype (`torch.dtype`): What it should be.
        shape (`tuple[int, ...]`): What it should be.
        dims (`str`): What the dimensions mean, as in `"[batch, rows, slots]"`.

    Raises:
        TypeError: If it is no tensor, or of another dtype.
        ValueError: If it is of another shape.
    """
    wanted = f"it must be {str(dtype).removeprefix('torch.')} {dims}, here {list(shape)}"
    called = f"{type(part).__name__}.{what}"
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(f"{called} returned {type(value).__name__}; {wanted}.")
    if value.dtype != dtype:
        raise TypeError(f"{called} returned a tensor of {value.dtype}; {wanted}.")
    if tuple(value.shape) != shape:
        raise ValueError(f"{called} returned a tensor of shape {list(value.shape)}; {wanted}.")


def finite(value: object) -> float | None:
    """A number as a finite float32 holds it, or `None` for anything else.

    Args:
        value (`object`): What was given.

    Returns:
        `float` or `None`: The number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 3.4e38:
        return None
    return float(value) if math.isfinite(value) else None
