"""Budgets in bytes, fractions and tokens."""

import pytest

from kvcompress_hf.plans.budget import RowGroup, allowed_bytes
from kvcompress_hf.recipe import Budget


def group(**changes):
    values = dict(rows=4, slots_per_page=4, page_bytes=1000, dense_slot_bytes=256, tail_bytes=512)
    return RowGroup(**{**values, **changes})


def test_tokens_keep_ceil_of_c_rows_over_b_pages():
    assert allowed_bytes(Budget(8), [group()], tokens=999) == 8 * 1000
    assert allowed_bytes(Budget(7), [group()], tokens=999) == 7 * 1000
    assert allowed_bytes(Budget(7), [group(rows=3)], tokens=999) == 6 * 1000  # ceil(21 / 4)


def test_fractions_are_of_dense_bytes_with_the_tail_set_aside():
    assert allowed_bytes(Budget(0.5), [group()], tokens=100) == 4 * 256 * 100 // 2 - 512


def test_a_window_bounds_what_a_dense_layer_would_hold():
    assert allowed_bytes(Budget(0.5), [group(window=10)], tokens=100) == 4 * 256 * 10 // 2 - 512


def test_bytes_are_per_sequence():
    assert allowed_bytes(Budget("64KiB"), [group(), group()], tokens=5) == 65536 - 1024


@pytest.mark.parametrize("amount", [0, -1, 0.0, 1.5, "12 parsecs", "0B", "MiB"])
def test_budgets_out_of_range_are_refused(amount):
    with pytest.raises(ValueError, match="budget|size|byte"):
        Budget(amount)


@pytest.mark.parametrize("amount", [True, None, [1]])
def test_budgets_of_another_type_are_refused(amount):
    with pytest.raises(TypeError, match="budget"):
        Budget(amount)
