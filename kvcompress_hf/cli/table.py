"""Plain text tables."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], header: Sequence[str] = (), right: bool = False) -> str:
    """Lay out rows in columns two spaces apart.

    Args:
        rows: cells of equal count per row.
        header: titles, drawn above a rule; none when empty.
        right: align every column but the first to the right.

    Returns:
        The table, without a newline at the end.
    """
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))] if lines else []

    def draw(line: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if right and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    drawn = [draw(line) for line in lines]
    if header:
        drawn.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(drawn)
