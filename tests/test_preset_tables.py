"""benchmarks/presets.py: what its marks mean, and that docs/evaluation.md holds the tables of the figures."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
presets = runpy.run_path(str(ROOT / "benchmarks" / "presets.py"), run_name="presets")


def cell(recipe, values, ratio=0.25, budget="1/4"):
    """A cell in which every probe of every mode has the same numbers."""
    mean = sum(values) / len(values)
    kl = {"value": mean, "low": min(values), "high": max(values), "values": values, "of": [1] * len(values)}
    probes = {probe: {"kl": kl} for probe in ("questions", "copy", "prose")}
    return {
        "recipe": recipe,
        "budget": budget,
        "context": 1000,
        "bytes": {"ratio": ratio, "most": ratio},
        "seen": probes,
        "unseen": probes,
    }


FLOOR = cell("streaming", [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("values", "ratio", "marks"),
    [
        ([0.5, 1.5, 2.5], 0.25, ""),  # always a half less, though the intervals overlap
        ([0.5, 1.5, 4.0], 0.25, "†"),
        ([0.5, 1.5, 2.5], 0.2510, ""),  # tables and the like
        ([1.5, 2.5, 3.5], 0.26, "!†"),
    ],
)
def test_marks_are_for_too_many_bytes_and_for_what_is_not_ahead(values, ratio, marks):
    assert presets["marks"](cell("one", values, ratio), FLOOR, "unseen", "copy") == marks
    assert presets["marks"](FLOOR, FLOOR, "unseen", "copy") == ""


def test_a_table_has_a_column_per_budget_and_the_best_first():
    cells = [FLOOR, cell("one", [0.5, 1.5, 2.5]), cell("two", [0.1, 0.2, 0.3]), cell("k8v4", [0.0] * 3, 0.4, "")]
    cells += [cell("two", [0.4, 0.4, 0.4], 0.06, "1/16")]
    header, _, *rows = presets["table"](cells, "seen", "prose").splitlines()
    assert header == "|  | 1/4 | 1/16 |"
    assert rows[0] == "| `two` | .2 [.1, .3] | .4 [.4, .4] |"  # at 1/16 there is nothing to be ahead of
    assert [row.split("`")[1] for row in rows] == ["two", "one", "streaming"]
    assert rows[1].endswith("|  |")


def test_the_page_holds_the_tables_of_the_figures():
    assert presets["FIGURES"]
    cells = presets["cells_of"](presets["FIGURES"])
    page = (ROOT / "docs" / "evaluation.md").read_text()
    drawn = [presets["table"](cells, *one) for one in presets["TABLES"].values()]
    missing = [line for one in drawn for line in one.splitlines()[2:] if line not in page]
    assert not missing, "docs/evaluation.md lacks lines: python benchmarks/presets.py prints them"
