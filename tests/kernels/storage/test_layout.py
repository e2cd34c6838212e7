"""The page layout: offsets, multiples, left-over, and errors."""

import contextlib
import ctypes
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress_hf.kernels import page_layout
from kvcompress_hf.kernels.abi import KvcLayout

BITS = (8, 4, 2)
TIERS = [(0, 0), *itertools.product(BITS, BITS)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FIELDS = ("position", "sum", "square", "age")


@settings(max_examples=200, deadline=None)
@given(
    head_dim=st.integers(1, 16).map(lambda n: 16 * n),
    dtype=st.sampled_from(DTYPES),
    tiers=st.lists(st.sampled_from(TIERS), min_size=1, max_size=4, unique=True),
    n_fields=st.integers(0, 4),
)
def test_sections_follow_each_other(head_dim, dtype, tiers, n_fields):
    layout = page_layout(head_dim, dtype, tiers, FIELDS[:n_fields])
    assert layout.page_bytes % 64 == 0
    assert head_dim % layout.rotation_block == 0
    assert head_dim // layout.rotation_block % 2 == 1  # the largest power of two
    waste = 0.0
    for (key_bits, value_bits), tier in zip(tiers, layout.tiers, strict=True):
        native = key_bits == 0
        assert (tier.key_bits, tier.value_bits, tier.native) == (key_bits, value_bits, native)
        assert tier.rotate_keys == (key_bits in (4, 2))
        assert tier.slots % 16 == 0
        assert tier.slots >= 16
        elements = tier.slots * head_dim
        params = 0 if native else 4 * tier.slots
        sizes = [
            elements * dtype.itemsize if native else elements * key_bits // 8,
            params,
            elements * dtype.itemsize if native else elements * value_bits // 8,
            params,
            4 * tier.slots * n_fields,
        ]
        starts = [tier.keys, tier.key_params, tier.values, tier.value_params, tier.fields, tier.used]
        assert starts == [0, *itertools.accumulate(sizes)]
        assert all(start % 64 == 0 for start in starts)
        assert tier.used <= layout.page_bytes < tier.used + 16 * (tier.used // tier.slots)
        assert layout.slot_bytes(layout.tiers.index(tier)) * tier.slots == tier.used
        waste = max(waste, 1 - tier.used / layout.page_bytes)
    smallest = 16 * max(layout.slot_bytes(i) for i in range(len(tiers)))
    if len(tiers) == 1:
        assert layout.tiers[0].slots <= 64 and waste < 1e-9
    else:
        assert layout.page_bytes <= max(96 * head_dim, smallest)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("fields", [(), ("position",), ("position", "sum")])
def test_usual_recipes_waste_little(head_dim, fields):
    for tiers in ([(8, 4), (4, 2)], [(8, 4), (4, 4), (4, 2)], [(0, 0), (8, 4)]):
        layout = page_layout(head_dim, torch.bfloat16, tiers, fields)
        waste = worst_waste(layout)
        assert waste < (0.19 if (0, 0) in tiers else 0.1)
        # No page within the limit wastes less in its worst tier, but for the rounding of the comparison.
        for page_bytes in range(64, 96 * head_dim + 1, 64):
            with contextlib.suppress(ValueError):
                assert waste <= worst_waste(page_layout(head_dim, torch.bfloat16, tiers, fields, page_bytes)) + 0.005


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pages_suit_the_tiers_that_slots_stay_in(head_dim, dtype):
    tiers, fields = [(8, 4), (4, 4), (4, 2)], ("position", "score")
    for stays in range(3):
        layout = page_layout(head_dim, dtype, tiers, fields, resting=[stays])
        assert layout.tiers[stays].used == layout.page_bytes and layout.tiers[stays].slots <= 64
        assert min(tier.slots for tier in layout.tiers) >= 16
    two = page_layout(head_dim, dtype, tiers, fields, resting=[2, 1])
    assert two.page_bytes == page_layout(head_dim, dtype, tiers[1:], fields).page_bytes
    every = page_layout(head_dim, dtype, tiers, fields, resting=[0, 1, 2])
    assert every == page_layout(head_dim, dtype, tiers, fields)
    given = page_layout(head_dim, dtype, tiers, fields, every.page_bytes, resting=[2])
    assert given == every
    # Where 64 slots of the tier are less than 16 of another, that other decides.
    large = page_layout(head_dim, dtype, [(0, 0), (2, 2)], resting=[1])
    assert large.tiers[0].slots >= 16 and large.page_bytes >= 16 * large.slot_bytes(0)


def worst_waste(layout):
    return max(1 - tier.used / layout.page_bytes for tier in layout.tiers)


def test_given_page_bytes_are_kept():
    layout = page_layout(128, torch.float16, [(8, 4), (4, 2)], ("position",), page_bytes=16384)
    assert layout.page_bytes == 16384
    assert [tier.slots for tier in layout.tiers] == [16384 // 204 // 16 * 16, 16384 // 108 // 16 * 16]


def test_layouts_compare_by_content():
    assert page_layout(64, torch.float32, [(8, 8)]) == page_layout(64, torch.float32, [(8, 8)])
    assert page_layout(64, torch.float32, [(8, 8)]) != page_layout(64, torch.float16, [(8, 8)])


def test_c_struct_holds_the_same_numbers():
    layout = page_layout(96, torch.float16, [(4, 4), (0, 0)], ("position",))
    assert isinstance(layout.c, KvcLayout)
    assert (layout.c.head_dim, layout.c.dtype, layout.c.n_tiers, layout.c.n_fields) == (96, 1, 2, 1)
    assert layout.c.tier[0].value_params == layout.tiers[0].value_params
    assert layout.field_index("position") == 0
    assert ctypes.sizeof(layout.c) == 288


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(head_dim=72), "head_dim must be a multiple of 16"),
        (dict(head_dim=272), "head_dim must be a multiple of 16"),
        (dict(head_dim=0), "head_dim must be a multiple of 16"),
        (dict(dtype=torch.float64), "dtype must be one of"),
        (dict(tiers=[]), "1 to 4 tiers"),
        (dict(tiers=[(8, 8)] * 5), "1 to 4 tiers"),
        (dict(tiers=[(8, 3)]), "bits in"),
        (dict(tiers=[(0, 4)]), "bits in"),
        (dict(fields=("a", "a")), "different names"),
        (dict(fields=tuple("abcde")), "at most 4 slot fields"),
        (dict(page_bytes=1024), "page_bytes=1024 is too small"),
        (dict(page_bytes=10001), "multiple of 64"),
        (dict(page_bytes=0), "multiple of 64"),
        (dict(resting=[2]), "indices of 2 tiers"),
        (dict(resting=[-1]), "indices of 2 tiers"),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    good = dict(head_dim=64, dtype=torch.float32, tiers=[(8, 4), (0, 0)])
    with pytest.raises(ValueError, match=message):
        page_layout(**{**good, **arguments})


def test_unknown_field():
    layout = page_layout(64, torch.float32, [(8, 4)], ("position",))
    with pytest.raises(ValueError, match="no slot field 'score'"):
        layout.field_index("score")
