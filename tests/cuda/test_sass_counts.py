"""benchmarks/sass_counts.py counts the way that most steps take through a loop."""

from __future__ import annotations

from pathlib import Path

import pytest

HEAD, PRODUCT, JUMP = "IADD3 R0, R0, 0x1, RZ", "HMMA.16816.F32 R4, R8, R12, R4", "@!P0 BRA `(.L_x_1)"


@pytest.fixture
def longest_way(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from sass_counts import longest_way

    return longest_way


def test_what_is_rare_is_left_out(longest_way):
    blocks = [
        ["S2R R0, SR_TID.X"],
        [HEAD, "@P1 BRA `(.L_x_2)"],  # the loop; the next block is for all steps but the last
        ["LDG.E.128 R8, [R2]"] * 4,
        [PRODUCT, PRODUCT, "@P2 BRA `(.L_x_3)"],
        ["MUFU.RCP R1, R1"] * 30,  # a soft cap
        ["ISETP.GE.AND P1, PT, R1, R2, PT", "@P1 BRA `(.L_x_4)"],  # decides about statistics
        ["ST.E.64 [R2.64], R4"] * 2,
        [PRODUCT, JUMP],
        ["EXIT"],
    ]
    followers = [[1], [3, 2], [3], [7, 4], [5], [7, 6], [7], [1, 8], []]
    way = longest_way(blocks, followers, 3)
    assert way == [*blocks[1], *blocks[2], *blocks[3], *blocks[7]]
    assert longest_way(blocks, followers, 4) is None
