"""Kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer: a part of what `make sanitize` runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCE = HERE.parents[1]
FOLDER = SOURCE / "build" / "sanitize"
LIBRARY = FOLDER / "libkvc_cpu.so"
# Every operation, in every instruction set, on odd shapes; what is left out takes long.
CHOSEN = [
    "storage/test_fields.py",
    "storage/test_move.py::test_any_sequence_of_moves_and_retiers",
    "storage/test_move.py::test_move_fills_holes_with_the_last_slots",
    "storage/test_pack.py",
    "test_attention_chunk.py::test_allowed_and_bias",
    "test_attention_chunk.py::test_shapes",
    "test_attention_decode.py::test_edges",
    "test_attention_decode.py::test_padding_and_append",
    "test_attention_sweep.py::test_random_shapes",
    "test_foreseen.py",
    "test_linear.py::test_rows_of_the_weight_apart",
    "test_linear.py::test_shapes",
    "test_losses.py",
    "test_non_causal.py::test_lengths",
    "test_non_causal.py::test_padding",
    "test_non_causal.py::test_rotations",
    "test_non_causal.py::test_shapes",
    "test_window_scores.py::test_both_powers_with_every_option",
    "test_window_scores.py::test_shapes",
    "-k not same_bytes_as_reference and not index_picks",
]


@pytest.fixture(scope="module")
def runtime() -> str:
    """What must be loaded before Python, once the library is built."""
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("already under AddressSanitizer")
    compiler = os.environ.get("CXX", "g++")
    for tool in (compiler, "cmake"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is needed to build the library with sanitizers, and was not found")
    names = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(map(os.path.isabs, names)):
        pytest.skip(f"{compiler} has no sanitizer libraries")
    configure = ["cmake", "-S", str(SOURCE), "-B", str(FOLDER), "-DKVC_SANITIZE=ON"]
    for command in (configure, ["cmake", "--build", str(FOLDER), "--parallel", str(os.cpu_count())]):
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    return " ".join(names)


def run(runtime: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"},
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_no_kernel_leaves_its_tensors(runtime):
    result = run(runtime, "sanitized.py", str(LIBRARY), "-q", "-x", "-p", "no:cacheprovider", *CHOSEN)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    print(result.stdout)


@pytest.mark.slow
def test_a_kernel_that_does_is_named(runtime):
    broken = f"""
from kvcompress_hf.kernels import library
library.library_path = lambda: {str(LIBRARY)!r}
import torch
from kvcompress_hf.kernels import CpuBackend, Rows, page_layout
layout = page_layout(64, torch.float32, [(8, 4)])
slab = torch.zeros(2, layout.page_bytes, dtype=torch.uint8)
addresses = torch.tensor([slab.data_ptr() + slab.nbytes])  # behind the slab
rows = Rows(layout, [slab], addresses, 1, [torch.zeros(1, 1, dtype=torch.int32)], [torch.ones(1, dtype=torch.int32)])
CpuBackend().read_slots(rows, 0, 1)
"""
    result = run(runtime, "-c", broken)
    assert result.returncode != 0
    # overflow or use after free: what lies behind the slab is the allocator's affair
    assert "AddressSanitizer: heap-" in result.stderr and "pack.cpp" in result.stderr
