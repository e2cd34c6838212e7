"""Bytes to words and back: `"512MiB"` to `536870912`, `536870912` to `"512.0 MiB"`."""

import re

_FACTORS = {
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]+)\s*")


def parse_bytes(text: str) -> int:
    """Reads a size with its unit.

    Args:
        text (`str`): A number and a unit out of B, KiB, MiB, GiB, TiB, kB, MB, GB, TB, such as `"512MiB"`.

    Returns:
        `int`: The size in bytes.

    Raises:
        ValueError: If the text is not a number followed by a known unit, or is less than one byte.
    """
    match = _PATTERN.fullmatch(text) if len(text) <= 10_000 else None
    factor = _FACTORS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise ValueError(
            f"{text[:40]!r} is not a size; write a number and a unit (B, KiB, MiB, GiB, kB, MB, GB), as in '512MiB'."
        )
    # Fifteen digits are exact, and more than fifteen before the point are beyond any memory.
    if len(match.group(1).partition(".")[0]) > 15 or (size := int(float(match.group(1)) * factor)) >= 2**63:
        raise ValueError(f"{text[:40]!r} is more than any machine holds; the most is 2**63 - 1 bytes.")
    if size < 1:
        raise ValueError(f"{text!r} is less than one byte; a budget must be positive.")
    return size


def format_bytes(size: float) -> str:
    """Writes a size in the largest binary unit that keeps it at 1 or above, as in `"1.5 MiB"`.

    Args:
        size (`float`): The size in bytes.

    Returns:
        `str`: The size in human units.
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
