"""The CUDA kernels under sanitizers: nothing is read or written outside the tensors, nor a word where none may lie."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcompress_hf.kernels.host_shim import ShimError, build_shim

SCRIPT = Path(__file__).parent / "sanitized.py"
FOLDER = Path(__file__).parents[2] / "build" / "host_shim"


@pytest.fixture(scope="module")
def library():
    try:
        return build_shim(FOLDER, sanitize=True)
    except ShimError as error:
        if "was not found" in str(error) or "asan" in str(error):
            pytest.skip(f"no compiler with AddressSanitizer: {error}")
        raise


def run(library: Path, *arguments: str) -> subprocess.CompletedProcess:
    compiler = os.environ.get("CXX", "g++")
    # libstdc++ too: what Python imports may throw, which AddressSanitizer must find the way to.
    names = ("libasan.so", "libstdc++.so")
    runtime = " ".join(
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names
    )
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(library), *arguments],
        env=os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_no_kernel_leaves_its_tensors(library):
    result = run(library)
    assert result.returncode == 0 and "clean" in result.stdout, result.stderr[:2000]


@pytest.mark.slow
def test_a_kernel_that_does_is_named(library):
    result = run(library, "broken")
    assert result.returncode != 0
    # overflow or use after free: what lies behind the slabs is the allocator's affair
    assert "AddressSanitizer: heap-" in result.stderr and "storage.cu" in result.stderr


@pytest.mark.slow
def test_words_where_none_may_lie_are_named(library):
    result = run(library, "askew")
    assert result.returncode != 0
    assert "misaligned address" in result.stderr
