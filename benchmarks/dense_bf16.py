"""Compiles `dense_bf16.cpp`, a plain dense kernel to measure paged ones against."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["NotAvailableError", "dense_bf16"]

SOURCE = Path(__file__).with_suffix(".cpp")


class NotAvailableError(RuntimeError):
    """A form cannot be measured here; the message says why."""


def dense_bf16(group: int, head_dim: int) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """The kernel as a function of q `[kv_heads, group, head_dim]`, k and v `[kv_heads, slots, head_dim]` and scale.

    Args:
        group: Query heads per KV head, at most 4.
        head_dim: A multiple of 64.

    Returns:
        The function; all its tensors are contiguous bfloat16, its result is float32.

    Raises:
        NotAvailableError: No compiler, no AVX512-BF16, or sizes that the kernel was not written for.
    """
    if not 1 <= group <= 4 or head_dim % 64:
        raise NotAvailableError("written for groups of up to 4 and head_dim a multiple of 64")
    info = Path("/proc/cpuinfo")
    if not info.exists() or "avx512_bf16" not in info.read_text():
        raise NotAvailableError("the processor has no AVX512-BF16")
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise NotAvailableError(f"no C++ compiler ({compiler})")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense_bf16.so"
        sizes = [f"-DGROUP={group}", f"-DHEAD_DIM={head_dim}"]
        flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-shared", "-fPIC"]
        result = subprocess.run(
            [compiler, *flags, *sizes, str(SOURCE), "-o", str(path)], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise NotAvailableError(f"it does not compile: {result.stderr[-500:]}")
        function = ctypes.CDLL(str(path)).dense_decode
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int] * 2 + [ctypes.c_float]
    function.restype = None

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = torch.empty(q.shape, dtype=torch.float32)
        function(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), k.shape[0], k.shape[1], scale)
        return out

    return run
