"""Figures of `kvcompress eval`: the bootstrap against cases that are known, sums over contexts, the file."""

import json
import math

import numpy as np
import pytest

from kvcompress_hf.cli.eval_tables import measured_bytes, number, with_interval
from kvcompress_hf.cli.figures import Ratio, compare, interval, sum_up, to_text


def mean(values):
    return Ratio(values, [1] * len(values))


def test_an_interval_of_many_is_the_normal_one():
    values = np.random.default_rng(3).normal(5, 2, 400)
    low, high = interval(mean(values.tolist()))
    half = 1.959964 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_an_interval_of_two_is_their_span():
    # Both draws are of one context in a quarter of the cases each, more than the 2.5 % that are cut off.
    assert interval(mean([0.0, 1.0])) == (0, 1)
    assert interval(mean([3.0, 3.0])) == (3, 3)
    assert interval(mean([3.0])) == (None, None)


def test_it_holds_what_it_should_in_95_of_100():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        low, high = interval(mean(rng.exponential(1.0, 40).tolist()))
        held += low <= 1 <= high
    assert 0.88 < held / 300 < 0.98


def test_a_paired_difference_does_not_see_what_both_share():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 24)
    a, b = mean((hard + 1).tolist()), mean(hard.tolist())
    assert interval(a, b) == (pytest.approx(1), pytest.approx(1))
    low, high = interval(a)
    assert low < 0 < high  # alone it says nothing
    with pytest.raises(ValueError, match="the same contexts, got 24 and 2"):
        interval(a, mean([1.0, 2.0]))


def test_a_ratio_counts_questions_not_contexts():
    figure = Ratio([3, 0, 1], [4, 0, 1])
    assert figure.value == 0.8
    low, high = interval(figure)
    assert low == 0.75 and high == 1  # the second context alone has nothing to count
    assert Ratio([0, 0], [0, 0]).value is None and interval(Ratio([0, 0], [0, 0])) == (None, None)
    assert Ratio.from_dict(figure.to_dict()) == figure


def row(sample, probe, **changes):
    figures = {"kl": 0.0, "as_full": 1.0, "nll_change": 0.0, "right": True, "full_right": True}
    return {"sample": sample, "probe": probe, **figures, **changes}


def test_sums_are_over_contexts():
    rows = [
        row(0, "needle"),
        row(0, "multi-key", right=False, kl=0.4),
        row(0, "multi-key", full_right=False, kl=0.2),
        row(0, "prose", kl=0.1),
        row(1, "needle", right=False, full_right=False),
        row(1, "prose", kl=0.3, as_full=0.5),
    ]
    found = sum_up(rows)
    assert list(found) == ["questions", "needle", "multi-key", "prose"]
    asked = found["questions"]
    assert (asked["right"]["values"], asked["right"]["of"]) == ([2, 0], [3, 1])
    assert (asked["kept"]["values"], asked["kept"]["of"]) == ([1, 0], [2, 0])
    assert asked["kept"]["value"] == 0.5 and asked["kl"]["values"] == [pytest.approx(0.2), 0]
    assert found["prose"]["kl"]["value"] == pytest.approx(0.2) and "right" not in found["prose"]


def cell(recipe, budget, kl, context=1000):
    figures = sum_up([row(i, "prose", kl=value) for i, value in enumerate(kl)])
    return {"recipe": recipe, "budget": budget, "context": context, "unseen": figures}


def test_differences_are_to_the_same_budget_and_length():
    cells = [cell("auto", "1/4", [1, 2]), cell("auto", "1/8", [3, 5]), cell("auto", "1/4", [0, 0], 2000)]
    cells += [cell("snapkv", "1/8", [4, 7]), cell("k8v4", "", [0, 1]), cell("snapkv", "1/2", [1, 1])]
    compare(cells, "auto", ["unseen"])
    assert [one["recipe"] for one in cells if "difference" in one] == ["snapkv"]
    found = cells[3]["difference"]
    assert found["to"] == "auto"
    assert found["unseen"]["prose"]["kl"] == {"value": 1.5, "low": 1, "high": 2}
    compare(cells, "k8v4", ["unseen"])  # has no budget: all of its length are compared with it
    assert [one["recipe"] for one in cells if "difference" in one] == ["auto", "auto", "snapkv", "snapkv"]
    assert cells[0]["difference"]["unseen"]["prose"]["kl"]["value"] == 1


def test_probes_that_have_no_questions_are_compared_in_their_one_mode():
    """As in `kvcompress eval --probes copy --recipes auto,k8v4`, where `--modes` is both."""
    cells = [cell("auto", "1/8", [3, 5]), cell("k8v4", "", [0, 1])]
    compare(cells, "auto", ["unseen", "seen"])
    compare(cells, "k8v4", ["unseen", "seen"])
    assert cells[0]["difference"].keys() == {"to", "unseen"}


def test_lists_of_numbers_take_a_line():
    figures = {"a": [1, 2.5, None], "b": [{"c": ["x", "y"], "d": []}], "e": "[\n 1 ]"}
    text = to_text(figures)
    assert json.loads(text) == figures
    assert '"a": [1, 2.5, null]' in text and '"c": ["x", "y"]' in text


def test_numbers_in_tables():
    assert [number(value) for value in (None, 0.0123, 0.00123, -0.5, 1.0, 2.345)] == [
        "-",
        ".012",
        ".0012",
        "-.500",
        "1.00",
        "2.35",
    ]
    assert with_interval({"value": 0.5, "low": 0.25, "high": 1}) == ".500 [.250, 1.00]"
    assert with_interval({"value": 0.5, "low": None, "high": None}) == ".500"
    over = {"budget": "1/4", "bytes": {"ratio": 0.25, "most": 0.251}}
    assert measured_bytes(over) == "25.0%!" and measured_bytes({**over, "budget": "0.26"}) == "25.0%"
