"""benchmarks/sass_counts.py counts the way that most steps take through a loop; decode kernels keep to their counts."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from kvcompress_hf.kernels import page_layout
from kvcompress_hf.kernels.cuda import NvrtcError, build, nvrtc

HEAD, PRODUCT, JUMP = "IADD3 R0, R0, 0x1, RZ", "HMMA.16816.F32 R4, R8, R12, R4", "@!P0 BRA `(.L_x_1)"
#: Most instructions of a warp per 16 slots, on the mean of a page, on sm_90a: a few more than docs/cuda.md says.
LIMITS = {
    ("decode128_8_k8v4", "k8v4"): 200,
    ("decode128_8_k4v4", "k4v4"): 205,
    ("decode128_8_k4v2", "k4v2"): 200,
    ("decode128_8_k2v2", "k2v2"): 200,
    ("decode128_8_k8v4_bulk", "k8v4"): 210,
    ("decode128_8_k4v4_bulk", "k4v4"): 210,
    ("decode128_8_k4v2_bulk", "k4v2"): 200,
    ("decode128_8_k2v2_bulk", "k2v2"): 198,
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


def test_a_wait_and_a_part_of_a_page_are_left_out(sass_counts):
    blocks = [
        ["S2R R0, SR_TID.X"],
        [HEAD, PRODUCT, "@P1 BRA `(.L_x_6)"],  # most blocks are not the last of their page
        ["BRA.DIV UR4, `(.L_x_7)"],  # lanes of a warp are hardly ever at different places
        ["UBLKCP.S.G [UR8], [UR4], UR6", "BRA `(.L_x_5)"],
        ["UBLKCP.S.G [UR8], [UR4], UR6"] * 4,
        ["SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3", "@!P0 BRA `(.L_x_8)"],
        [JUMP],
        ["WARPSYNC.COLLECTIVE R5, `(.L_x_3)", "BRA `(.L_x_3)"],
        ["YIELD"],
        ["SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3", "BRA `(.L_x_6)"],
        ["EXIT"],
    ]
    followers = [[1], [6, 2], [7, 3, 4], [5], [5], [8, 6], [1, 10], [3], [9], [6], []]
    assert sass_counts.longest_way(blocks, followers, 1, opening=False) == [*blocks[1], *blocks[6]]
    way = sass_counts.longest_way(blocks, followers, 1)
    assert way == [x for i in (1, 2, 3, 5, 6) for x in blocks[i]]


@pytest.fixture
def disassembler(sass_counts):
    try:
        nvrtc.nvrtc_version()
    except NvrtcError as error:
        pytest.skip(f"no NVRTC: {error}")
    nvdisasm = sass_counts.find_nvdisasm()
    if nvdisasm is None:
        pytest.skip("no nvdisasm: `pip install nvidia-cuda-nvdisasm`")
    return nvdisasm


@pytest.mark.slow
@pytest.mark.parametrize("unit, tier", LIMITS)
def test_decode_keeps_to_its_instructions(sass_counts, disassembler, unit, tier):
    found = sass_counts.count(unit, tier, "sm_90a", disassembler)
    assert found.mean <= LIMITS[unit, tier]
    kinds = ["UBLKCP", "SYNCS.ARRIVE", "SYNCS.PHASECHK", "LDG"]
    within, opening = ([sum(kind in x for x in way) for kind in kinds] for way in (found.way, found.opening_way))
    if unit.endswith("_bulk"):
        assert within == [0, 0, 0, 0]
        assert opening == [1, 1, 1, 2]  # one copy, told of once, one wait; the next page's id and its slab's address
        ask, wait = (next(i for i, x in enumerate(found.opening_way) if kind in x) for kind in (kinds[0], kinds[2]))
        assert ask < wait and not any("LDS" in x for x in found.opening_way[ask:])  # nothing is read until then
    else:
        assert within[:3] == opening[:3] == [0, 0, 0]


@pytest.mark.slow
def test_operands_of_the_second_look_stay_where_they_are(sass_counts, disassembler):
    (code, _) = sass_counts.basic_blocks(nvrtc.compile_source("non_causal128", "sm_90a").cubin, disassembler)
    both = [x for block in code for x in block]  # fp16 and bf16
    products = sum("HMMA" in x for x in both)
    assert products == 2 * 8 * (4 + 4 + 7)  # eights of keys: here, of the sample at a time, near and sinks
    assert len(both) <= 2 * 2950
    assert sum(re.search(r"\bMOV\b|IMAD\.MOV", x) is not None for x in both) < products  # one for each would be 4


@pytest.mark.slow
@pytest.mark.parametrize("tier", nvrtc.ALONE)
def test_a_multiprocessor_has_96_kib_of_pages_under_way(tier):
    try:
        (kernel, _) = nvrtc.compile_source(f"decode128_8_k{tier[0]}v{tier[1]}_bulk", "sm_90a").kernels
    except NvrtcError as error:
        pytest.skip(f"no NVRTC: {error}")
    bytes_of_page = page_layout(128, torch.float16, [tier]).tiers[0].fields
    stages = 2 if 2 * bytes_of_page <= nvrtc.RING_BYTES[128] else 1
    assert build.resident_warps(kernel, "sm_90a") * stages * bytes_of_page >= 96 << 10
