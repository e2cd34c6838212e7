"""JSON from strangers, measured before it is parsed: a small text must not take much memory, time or stack."""

import json
from typing import Any

__all__ = ["parse_json"]

_TO_SQUARE = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_MOST_DIGITS = 19  # of an integer of 64 bits


def parse_json(text: str | bytes | bytearray, *, most_bytes: int, most_values: int, most_depth: int) -> Any:
    """Parses JSON that is no larger than what is allowed.

    The parser makes objects of up to a hundred times the size of the text and calls itself at every bracket, so length,
    brackets and commas are counted first.

    Args:
        text (`str` or `bytes`): The JSON; bytes are UTF-8.
        most_bytes (`int`): Longest text, in bytes.
        most_values (`int`): Most values, those of objects, lists and their elements counted together.
        most_depth (`int`): Most brackets inside each other.

    Returns:
        `Any`: The parsed value: dicts, lists, numbers, strings.

    Raises:
        ValueError: If it is not JSON, larger than allowed, names a key twice or has integers beyond 64 bits.
    """
    if len(text) > most_bytes:
        raise ValueError(f"it is {len(text):,} bytes long, more than {most_bytes:,}")
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 4 * most_values:  # each value may have a key
        raise ValueError(f"it has more than {2 * most_values:,} texts")
    bare = b"".join(plain.split(b'"')[::2])  # every other piece between quotes lies outside of strings
    brackets = bare.translate(_TO_SQUARE, _NO_BRACKETS)
    values = 1 + bare.count(b",") + len(brackets) // 2
    if values > most_values:
        raise ValueError(f"it has up to {values:,} values, more than {most_values:,}")
    for _ in range(most_depth):
        brackets = brackets.replace(b"[]", b"")  # the innermost pairs
    if brackets:
        raise ValueError(f"its brackets do not match, or are nested more than {most_depth} deep")
    decoded = text if isinstance(text, str) else text.decode("utf-8")
    return json.loads(decoded, object_pairs_hook=_no_repeats, parse_int=_small_int)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name comes twice")
    return result


def _small_int(text: str) -> int:
    # Converting takes time that grows with the square of the digits.
    if len(text) > _MOST_DIGITS + 1 or abs(value := int(text)) >= 2**63:
        raise ValueError(f"{text[:40]} does not fit 64 bits")
    return value
