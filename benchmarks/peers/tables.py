"""The tables of docs/evaluation.md and docs/benchmarks.md from the figures of the peers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcompress_hf.cli.eval_tables import in_order

ANSWERS = "peers_kvpress_smollm2.json"
DECODING = "peers_decode_smollm2_cpu.json"
ATTENTION = "peers_attention_cpu.json"
#: Probe and measure of each column.
COLUMNS = {
    "right answers kept": ("questions", "kept"),
    "KL of answers": ("questions", "kl"),
    "copy KL": ("copy", "kl"),
    "prose KL": ("prose", "kl"),
}


def print_tables(results: Path) -> None:
    """Prints every table whose figures there are."""
    for name, draw in ((ANSWERS, answers), (DECODING, decoding), (ATTENTION, decoding)):
        if (results / name).exists():
            print(f"{name}\n\n{draw(json.loads((results / name).read_text()))}\n")


def lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def number(value: float) -> str:
    """Two significant digits, no zero before the point."""
    text = f"{value:.2g}"
    text = f"{value:.5f}".rstrip("0") if "e-" in text else text
    return text.removeprefix("0") or "0"


def interval(figure: dict[str, Any], percent: bool) -> str:
    """A value and its interval."""
    ends = [figure[end] for end in ("value", "low", "high")]
    value, low, high = ("-" if x is None else f"{100 * x:.0f}" if percent else number(x) for x in ends)
    return f"{value}{' %' if percent else ''} [{low}, {high}]"


def answers(figures: dict[str, Any]) -> str:
    """Recipes and presses with the bytes they hold, by what they were asked to keep and then by the answers' KL."""
    (length,) = figures["full"]
    cells = in_order(figures["cells"], int(length))
    budgets = list(dict.fromkeys(cell["budget"] for cell in cells))
    cells.sort(key=lambda cell: (budgets.index(cell["budget"]), cell["unseen"]["questions"]["kl"]["value"]))
    rows = []
    for cell in cells:
        found = [interval(cell["unseen"][probe][measure], measure == "kept") for probe, measure in COLUMNS.values()]
        name = cell["recipe"] if cell["recipe"].startswith("kvpress") else f"`{cell['recipe']}`"
        rows.append([f"{name} {cell['budget']}".strip(), f"{100 * cell['bytes']['ratio']:.1f} %", *found])
    return lines(["", "bytes", *COLUMNS], rows)


def decoding(figures: dict[str, Any]) -> str:
    """Per engine the milliseconds of a step, by wall clock and of processor time, and what a stored token costs."""
    points = list(dict.fromkeys((row["batch"], row["stored"]) for row in figures["results"]))
    found = {(row["engine"], row["batch"], row["stored"]): row for row in figures["results"]}
    one = str(points[0][0])
    rows = []
    for engine in dict.fromkeys(row["engine"] for row in figures["results"]):
        mine = [found[engine, *point] for point in points]
        cells = [f"{row['ms']:.1f} ({row['processor_ms']:.1f})" if "ms" in row else "refused" for row in mine]
        slope = figures["slopes"].get(engine, {}).get(one, {})
        rows.append([engine, *cells, f"{slope['ns']:,.0f} ({slope['processor_ns']:,.0f})" if slope else "-"])
    header = ["ms (of processor time)", *(f"{stored:,} x {batch}" for batch, stored in points)]
    return lines([*header, f"ns per stored token, batch {one}"], rows)
