"""benchmarks/sass_counts.py counts the way that most steps take through a loop; decode kernels keep to their counts."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from kvcompress_hf.kernels.cuda import NvrtcError, nvrtc

HEAD, PRODUCT, JUMP = "IADD3 R0, R0, 0x1, RZ", "HMMA.16816.F32 R4, R8, R12, R4", "@!P0 BRA `(.L_x_1)"
#: Most instructions of a warp per 16 slots, on the mean of a page, on sm_90a: a few more than docs/cuda.md says.
LIMITS = {
    ("decode128_8_k8v4", "k8v4"): 200,
    ("decode128_8_k4v4", "k4v4"): 205,
    ("decode128_8_k4v2", "k4v2"): 200,
    ("decode128_8_k2v2", "k2v2"): 200,
    ("decode128_8", "k8v8"): 210,
    ("decode128_8", "native"): 200,
}


@pytest.fixture
def sass_counts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("sass_counts")


def test_what_is_rare_is_left_out(sass_counts):
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
    way = sass_counts.longest_way(blocks, followers, 3)
    assert way == [*blocks[1], *blocks[2], *blocks[3], *blocks[7]]
    assert sass_counts.longest_way(blocks, followers, 4) is None


def test_the_innermost_loop_is_meant_and_pages_are_opened_once(sass_counts):
    blocks = [
        ["S2R R0, SR_TID.X"],
        ["LDS R1, [R0]"] * 20,  # of each tier
        [HEAD, "@P1 BRA `(.L_x_9)"],  # of each block
        [PRODUCT, PRODUCT],
        ["@!P0 BRA `(.L_x_2)"],
        ["@!P2 BRA `(.L_x_1)"],
        ["EXIT"],
        ["LDG.E.64 R8, [R2]", "IADD3 R2, R2, R3, RZ", "BRA `(.L_x_3)"],  # the next page, out of the way
    ]
    followers = [[1], [2], [7, 3], [4], [2, 5], [1, 6], [], [3]]
    within = [*blocks[2], *blocks[3], *blocks[4]]
    assert sass_counts.longest_way(blocks, followers, 2, opening=False) == within
    assert sass_counts.longest_way(blocks, followers, 2) == [*blocks[2], *blocks[7], *blocks[3], *blocks[4]]


@pytest.mark.slow
@pytest.mark.parametrize("unit, tier", LIMITS)
def test_decode_keeps_to_its_instructions(sass_counts, unit, tier):
    try:
        nvrtc.nvrtc_version()
    except NvrtcError as error:
        pytest.skip(f"no NVRTC: {error}")
    nvdisasm = sass_counts.find_nvdisasm()
    if nvdisasm is None:
        pytest.skip("no nvdisasm: `pip install nvidia-cuda-nvdisasm`")
    assert sass_counts.count(unit, tier, "sm_90a", nvdisasm).mean <= LIMITS[unit, tier]
