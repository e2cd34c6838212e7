"""Tables and curves of `kvcompress eval`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .figures import ASKED_TOGETHER
from .table import columns

__all__ = ["draw_curves", "draw_differences", "draw_errors", "draw_tables"]

_LEGEND = "measured bytes as a share of the full cache's, ! where more than the budget; 95 % bootstrap over contexts"
#: Title, mode, probe, measure of each column; those that were not measured are left out.
_ANSWERS = (
    ("kept", "unseen", ASKED_TOGETHER, "kept"),
    ("KL", "unseen", ASKED_TOGETHER, "kl"),
    ("needle kept", "unseen", "needle", "kept"),
    ("multi-key kept", "unseen", "multi-key", "kept"),
    ("seen: kept", "seen", ASKED_TOGETHER, "kept"),
    ("seen: KL", "seen", ASKED_TOGETHER, "kl"),
)
_TEXT = (
    ("copy ΔNLL", "unseen", "copy", "nll_change"),
    ("copy KL", "unseen", "copy", "kl"),
    ("prose KL", "unseen", "prose", "kl"),
    ("prose top-1", "unseen", "prose", "as_full"),
    ("summary KL", "unseen", "summary", "kl"),
    ("generation KL", "unseen", "generation", "kl"),
    ("conversation KL", "unseen", "conversation", "kl"),
    ("conv. top-1", "unseen", "conversation", "as_full"),
)
_TABLES = (("Answers", _ANSWERS), ("Text", _TEXT))
#: The panels of the picture: mode, probe, measure, title.
_PANELS = (
    ("unseen", ASKED_TOGETHER, "kept", "right answers kept, question unseen"),
    ("unseen", ASKED_TOGETHER, "kl", "KL of answers, question unseen"),
    ("seen", ASKED_TOGETHER, "kept", "right answers kept, question seen"),
    ("seen", ASKED_TOGETHER, "kl", "KL of answers, question seen"),
    ("unseen", "copy", "kl", "KL of copies"),
    ("unseen", "prose", "kl", "KL of prose that goes on"),
    ("unseen", "summary", "kl", "KL of summaries"),
    ("unseen", "conversation", "kl", "KL of conversations"),
)


def _get(cell: dict[str, Any], mode: str, probe: str, measure: str) -> dict[str, Any] | None:
    return cell.get(mode, {}).get(probe, {}).get(measure)


def in_order(cells: Sequence[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """Cells of one length by budget as asked for, largest first, those without one ahead; then by measured bytes."""
    from . import parse_budget

    def size(cell: dict[str, Any]) -> tuple[float, float]:
        budget = parse_budget(cell["budget"]) if cell["budget"] else math.inf
        return -float(budget) if not isinstance(budget, str) else 0.0, -cell["bytes"]["ratio"]

    return sorted((cell for cell in cells if cell["context"] == length), key=size)


def measured_bytes(cell: dict[str, Any]) -> str:
    """Measured bytes as a share of the full cache's, with a `!` where a context took more than a fraction budget."""
    from . import parse_budget

    budget = parse_budget(cell["budget"]) if cell["budget"] else None
    over = isinstance(budget, float) and cell["bytes"]["most"] > budget
    return f"{cell['bytes']['ratio']:.1%}" + ("!" if over else "")


def number(value: float | None) -> str:
    """With three digits after the point, four below a hundredth, and no zero before the point."""
    if value is None:
        return "-"
    digits = 3 if abs(value) >= 0.00995 else 4
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"


def with_interval(figure: dict[str, Any] | None) -> str:
    """A value and its interval."""
    if figure is None:
        return ""
    if figure["low"] is None:
        return number(figure["value"])
    return f"{number(figure['value'])} [{number(figure['low'])}, {number(figure['high'])}]"


def draw_tables(figures: dict[str, Any], length: int) -> str:
    """One table of answers and one of text, for one length of contexts."""
    cells, full = in_order(figures["cells"], length), figures["full"][str(length)]
    drawn = []
    for title, wanted in _TABLES:
        shown = [column for column in wanted if any(_get(cell, *column[1:]) for cell in cells)]
        if not shown:
            continue
        rows = [["full cache", "", "100.0%", *(_of_full(full, *column[1:]) for column in shown)]]
        for cell in cells:
            values = [with_interval(_get(cell, *column[1:])) for column in shown]
            rows.append([cell["recipe"], cell["budget"], measured_bytes(cell), *values])
        header = ["recipe", "budget", "bytes", *(column[0] for column in shown)]
        drawn.append(f"{title}, {length:,} tokens; {_LEGEND}\n" + columns(rows, header, right=True))
    return "\n\n".join(drawn)


def _of_full(full: dict[str, Any], mode: str, probe: str, measure: str) -> str:
    """What the full cache has to lose: right answers of all questions."""
    if measure == "kept":
        right = full[mode][probe]["right"]
        return f"{sum(right['values'])} of {sum(right['of'])} right"
    return "1" if measure == "as_full" else "0"


def draw_differences(figures: dict[str, Any], length: int) -> str:
    """The same columns as differences to a recipe, paired by context; empty where there is nothing to compare."""
    cells = [cell for cell in in_order(figures["cells"], length) if "difference" in cell]
    shown = [
        column
        for _, wanted in _TABLES
        for column in wanted
        if any(_get(cell["difference"], *column[1:]) for cell in cells)
    ]
    rows = []
    for cell in cells:
        values = [with_interval(_get(cell["difference"], *column[1:])) for column in shown]
        rows.append([cell["recipe"], cell["budget"], *values])
    if not rows:
        return ""
    title = f"Differences to {cells[0]['difference']['to']} (at the same budget, if it has one), paired by context"
    return f"{title}, {length:,} tokens\n" + columns(
        rows, ["recipe", "budget", *(column[0] for column in shown)], right=True
    )


def draw_errors(figures: dict[str, Any], length: int) -> str:
    """The table of the output-error suite for one length."""
    cells = in_order(figures["cells"], length)
    layers = len(cells[0]["unseen"]["prose"]["layers"])
    header = ["recipe", "budget", "bytes", "logits", *(f"layer {i}" for i in range(layers))]
    rows = []
    for cell in cells:
        got = cell["unseen"]["prose"]
        row = [cell["recipe"], cell["budget"], measured_bytes(cell), with_interval(got["logits"])]
        rows.append(row + [f"{error:.3f}" for error in got["layers"]])
    title = f"Relative errors of logits and of each layer's attention output, {length:,} tokens; {_LEGEND}"
    return title + "\n" + columns(rows, header, right=True)


def draw_curves(figures: dict[str, Any], lengths: Sequence[int], path: Path) -> None:
    """Write a PNG: each figure against measured bytes, one line per recipe, one row per length.

    Raises:
        ImportError: where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise ImportError("the curves need matplotlib: install kvcompress_hf[plot]") from error

    cells = figures["cells"]
    panels = [panel for panel in _PANELS if any(_get(cell, *panel[:3]) for cell in cells)]
    figure = Figure(figsize=(5 * len(panels) + 2, 4 * len(lengths)), layout="constrained")
    grid = figure.subplots(len(lengths), len(panels), squeeze=False, sharex=True)
    names = list(dict.fromkeys(cell["recipe"] for cell in cells))
    for row, length in zip(grid, lengths, strict=True):
        for axes, (mode, probe, measure, title) in zip(row, panels, strict=True):
            for i, name in enumerate(names):
                mine = [cell for cell in cells if cell["recipe"] == name and cell["context"] == length]
                found = [(cell["bytes"]["ratio"], _get(cell, mode, probe, measure)) for cell in mine]
                points = sorted((x, got["value"]) for x, got in found if got and got["value"] is not None)
                if points:
                    style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
                    axes.plot(*zip(*points, strict=True), marker="osD^v"[i % 5], markersize=4, label=name, **style)
            if measure == "kl":
                axes.set_yscale("log")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"1/{1 / x:.0f}" if x < 1 else f"{x:g}"))
            axes.set(title=title, xlabel="measured bytes / full cache's", ylabel=f"{length:,} tokens")
            axes.grid(alpha=0.3)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"{figures['model']}, {figures['split']}, {figures['contexts']} contexts", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
