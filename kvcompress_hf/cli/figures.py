"""The figures of `kvcompress eval`: summed up over contexts, with bootstrap intervals, and written as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .suites import ASKED

__all__ = ["ASKED_TOGETHER", "Ratio", "compare", "interval", "sum_up", "to_text"]

#: The probes with right answers, taken together.
ASKED_TOGETHER = "questions"
_DRAWS = 4000


@dataclass(frozen=True)
class Ratio:
    """A figure over contexts: a sum of one number per context over a sum of another.

    Args:
        values: per context, such as right answers.
        of: per context, such as questions; ones for a mean over contexts.
    """

    values: Sequence[float]
    of: Sequence[float]

    @property
    def value(self) -> float | None:
        """The figure; `None` where there was nothing to count."""
        return sum(self.values) / sum(self.of) if sum(self.of) else None

    def to_dict(self) -> dict[str, Any]:
        """Value, 95 % interval and the numbers per context, ready for JSON."""
        low, high = interval(self)
        return {
            "value": _short(self.value),
            "low": _short(low),
            "high": _short(high),
            "values": [_short(value) for value in self.values],
            "of": [_short(value) for value in self.of],
        }

    @classmethod
    def from_dict(cls, figures: dict[str, Any]) -> Ratio:
        """The numbers per context of a file."""
        return cls(figures["values"], figures["of"])


def interval(figure: Ratio, other: Ratio | None = None) -> tuple[float | None, float | None]:
    """The 95 % percentile bootstrap interval of a figure, or of its difference to another on the same contexts.

    Contexts are drawn with replacement, 4,000 times, from a fixed seed; in a difference both figures have the same
    draws. Few contexts make it too narrow, and one makes none.

    Args:
        figure: of one recipe.
        other: of the recipe to take away, with the contexts in the same order.

    Returns:
        Its ends; `None` for one context, or where nothing was counted.

    Raises:
        ValueError: where the two are not over as many contexts.
    """
    contexts = len(figure.values)
    if other is not None and len(other.values) != contexts:
        raise ValueError(f"a paired difference needs the same contexts, got {contexts} and {len(other.values)}")
    if contexts < 2:
        return None, None
    drawn = np.random.default_rng(0).integers(0, contexts, (_DRAWS, contexts))
    found = _drawn(figure, drawn)
    if other is not None:
        found = found - _drawn(other, drawn)
    found = found[np.isfinite(found)]
    if not found.size:
        return None, None
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _drawn(figure: Ratio, drawn: np.ndarray) -> np.ndarray:
    values, of = np.asarray(figure.values, float), np.asarray(figure.of, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return values[drawn].sum(1) / of[drawn].sum(1)


def _short(value: float | None) -> float | int | None:
    """Six significant digits: what the numbers are good for, and a file that can be read."""
    if value is None or isinstance(value, int):
        return value
    return int(value) if float(value).is_integer() else float(f"{value:.6g}")


def sum_up(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What one recipe did on all contexts.

    Args:
        rows: one per exchange, with `sample`, `probe` and what `answer_scores` gives; the samples in order.

    Returns:
        Per probe, and for the probes with right answers together: `kl`, `as_full` and `nll_change` (means over
        contexts), and where there are right answers `right` (of all questions) and `kept` (of those that the full
        cache gets right).
    """
    found: dict[str, Any] = {}
    probes = list(dict.fromkeys(row["probe"] for row in rows))
    for name in [*([ASKED_TOGETHER] if set(ASKED) & set(probes) else []), *probes]:
        members = ASKED if name == ASKED_TOGETHER else (name,)
        contexts = _by_sample(row for row in rows if row["probe"] in members)
        figures = {
            measure: _mean([[row[measure] for row in context] for context in contexts])
            for measure in ("kl", "as_full", "nll_change")
        }
        if members[0] in ASKED:
            right = [sum(row["right"] for row in context) for context in contexts]
            full = [sum(row["full_right"] for row in context) for context in contexts]
            both = [sum(row["right"] and row["full_right"] for row in context) for context in contexts]
            figures["kept"] = Ratio(both, full)
            figures["right"] = Ratio(right, [len(context) for context in contexts])
        found[name] = {measure: figure.to_dict() for measure, figure in figures.items()}
        if "layers" in contexts[0][0]:
            layers = zip(*(row["layers"] for context in contexts for row in context), strict=True)
            found[name] |= {
                "layers": [_short(sum(errors) / len(errors)) for errors in layers],
                "logits": _mean([[row["logits"] for row in context] for context in contexts]).to_dict(),
                "attention": _mean([[row["attention"] for row in context] for context in contexts]).to_dict(),
            }
    return found


def _by_sample(rows: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    contexts: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        contexts.setdefault(row["sample"], []).append(row)
    return list(contexts.values())


def _mean(contexts: Sequence[Sequence[float]]) -> Ratio:
    """A mean over contexts of means in each: what is asked of one context is not independent."""
    return Ratio([sum(values) / len(values) for values in contexts], [1] * len(contexts))


def compare(cells: Sequence[dict[str, Any]], against: str, modes: Sequence[str]) -> None:
    """Put into every cell the paired differences to a recipe: that of the same budget, or its only one.

    Args:
        cells: of all recipes, budgets and lengths; changed. Cells of the recipe itself, and those that have no partner,
            get none.
        against: the recipe as it was asked for.
        modes: whether questions were seen.
    """
    named = [cell for cell in cells if cell["recipe"] == against]
    for cell in cells:
        cell.pop("difference", None)
        partners = [
            one
            for one in named
            if one["context"] == cell["context"] and one["budget"] in ("", cell["budget"]) and one is not cell
        ]
        if cell["recipe"] == against or not partners:
            continue
        difference: dict[str, Any] = {"to": against}
        for mode in (mode for mode in modes if mode in cell and mode in partners[0]):  # some probes have only one
            difference[mode] = {
                probe: _differences(measures, partners[0][mode][probe]) for probe, measures in cell[mode].items()
            }
        cell["difference"] = difference


def _differences(measures: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for measure in ("kept", "right", "kl", "as_full", "nll_change"):
        if measure in measures:
            a, b = Ratio.from_dict(measures[measure]), Ratio.from_dict(other[measure])
            low, high = interval(a, b)
            value = None if a.value is None or b.value is None else a.value - b.value
            found[measure] = {"value": _short(value), "low": _short(low), "high": _short(high)}
    return found


def to_text(figures: dict[str, Any]) -> str:
    """JSON with lists of numbers on one line each."""
    lists = re.compile(r"\[\s+([^\[\]{}]*?)\s+\]")
    return lists.sub(lambda found: "[" + re.sub(r"\s*\n\s*", " ", found[1]) + "]", json.dumps(figures, indent=1)) + "\n"
