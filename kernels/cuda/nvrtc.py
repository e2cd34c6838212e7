"""Compiles the `.cu` files of this folder to cubins with NVRTC; no GPU, driver, nvcc or CUDA header is needed."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SOURCES", "Compiled", "KernelResources", "NvrtcError", "compile_source", "nvrtc_version", "source_texts"]

FOLDER = Path(__file__).parent
INCLUDE_DIR = FOLDER.parent / "include"
#: The tensor-core decode: head_dim and query heads handled together -> thread blocks that a multiprocessor holds.
RESIDENT: dict[tuple[int, int], int] = {(64, 8): 3, (64, 16): 2, (128, 8): 3, (128, 16): 2, (256, 8): 2, (256, 16): 2}
#: Tiers whose codes alone have kernels of their own, at 128 dimensions and up to 8 heads, and their thread blocks of a
#: multiprocessor. Of others, more blocks would need more registers than there are.
ALONE: dict[tuple[int, int], int] = {(8, 4): 4, (4, 4): 4, (4, 2): 4, (2, 2): 4}
#: Bytes of a warp's ring, by head_dim, in the kernels that bring pages to each warp by bulk copies: with what a thread
#: block has else, no more than the 48 KiB of shared memory that are there without asking.
RING_BYTES: dict[int, int] = {64: 10240, 128: 10240, 256: 8832}
BULK = "_bulk"  # at the end of the names of these kernels and of their units
#: Query rows that a thread block of `chunk.cu` may take, by head_dim; `scores.cu` and `non_causal.cu` take the same
#: head_dims.
CHUNK_ROWS = {64: (16, 32, 64), 128: (16, 32, 64), 256: (32,)}


def _decode_units() -> dict[str, tuple[str, ...]]:
    """The units of `decode.cu`: of each shape, and of each tier that has kernels of its own; with rings and without."""
    units = {}
    for (dim, heads), resident in RESIDENT.items():
        for tier in (None, *ALONE) if (dim, heads) == (128, 8) else (None,):
            for ring in (0, RING_BYTES[dim]) if heads == 8 else (0,):
                suffix = f"_k{tier[0]}v{tier[1]}" if tier else ""
                options: dict[str, int | str] = {"HEAD_DIM": dim, "HEADS": heads, "RESIDENT": resident}
                if tier:
                    options |= {"RESIDENT": ALONE[tier], "CODED": 10 * tier[0] + tier[1]}
                if ring:
                    suffix += BULK
                    options["RING"] = ring
                options["SUFFIX"] = suffix
                units[f"decode{dim}_{heads}{suffix}"] = ("decode.cu", *(f"-DKVC_{k}={v}" for k, v in options.items()))
    return units


#: Translation units: the file of each, and the options it needs beyond the common ones.
SOURCES: dict[str, tuple[str, ...]] = {
    "storage": ("storage.cu", "--fmad=false"),  # codes must be those of quantize.py, bit for bit
    "attention": ("attention.cu",),
    **_decode_units(),
    **{
        f"{name}{dim}": (f"{name}.cu", f"-DKVC_HEAD_DIM={dim}")
        for name in ("chunk", "scores", "non_causal")
        for dim in CHUNK_ROWS
    },
}
HEADERS = (
    "abi.h",
    "page_layout.h",
    "parameters.h",
    "fragments.cuh",
    "pages.cuh",
    "primitives.cuh",
    "ring.cuh",
    "tile.cuh",
)
#: NVRTC brings no headers; this is all of <stdint.h> that the sources use.
STDINT = """#pragma once
typedef signed char int8_t; typedef unsigned char uint8_t; typedef short int16_t; typedef unsigned short uint16_t;
typedef int int32_t; typedef unsigned int uint32_t; typedef long long int64_t; typedef unsigned long long uint64_t;
"""


class NvrtcError(RuntimeError):
    """NVRTC is missing, or refused a source."""


@dataclass(frozen=True)
class KernelResources:
    """What the assembler reported for one kernel.

    Args:
        name: The kernel.
        registers: Registers per thread.
        spill_bytes: Bytes spilled, stores and loads together; 0 is what is wanted.
        shared_bytes: Static shared memory per block.
    """

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Compiled:
    """A compiled translation unit.

    Args:
        cubin: The device code.
        kernels: What each kernel takes.
    """

    cubin: bytes
    kernels: tuple[KernelResources, ...]


def _candidates() -> Iterable[str]:
    # The library as pip installs it (CUDA 13 keeps all its libraries in one folder), then the system's.
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for pattern in ("cu1?/lib/libnvrtc.so.1?", "cuda_nvrtc/lib/libnvrtc.so.1?"):
            yield from (str(path) for path in sorted(Path(root).glob(pattern), reverse=True))
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


@functools.cache
def _library() -> ctypes.CDLL:
    for name in _candidates():
        try:
            for builtins in Path(name).parent.glob("libnvrtc-builtins.so.*") if "/" in name else ():
                ctypes.CDLL(str(builtins))  # NVRTC looks for it by bare name, outside its own folder
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise NvrtcError(
        "NVRTC was not found: `pip install nvidia-cuda-nvrtc` (PyTorch's CUDA builds bring it; this one is not such)"
    )


def _check(status: int) -> None:
    if status:
        raise NvrtcError(f"NVRTC: {_library().nvrtcGetErrorString(status).decode()}")


def nvrtc_version() -> tuple[int, int]:
    """Version of the NVRTC that will be used.

    Returns:
        `(major, minor)`.

    Raises:
        NvrtcError: There is none.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


@functools.cache
def source_texts() -> dict[str, str]:
    """Every file a translation unit may read, by name.

    Returns:
        The texts of the `.cu` files and their headers.
    """
    texts = {"stdint.h": STDINT}
    for name in (*HEADERS, *(file for file, *_ in SOURCES.values())):
        path = FOLDER / name
        texts[name] = (path if path.exists() else INCLUDE_DIR / name).read_text()
    return texts


def compile_source(unit: str, arch: str) -> Compiled:
    """Compiles one translation unit.

    Args:
        unit: A name in `SOURCES`.
        arch: A real architecture such as `"sm_90a"`.

    Returns:
        The cubin and the resources of its kernels.

    Raises:
        NvrtcError: There is no NVRTC, or it refused the source or the architecture; the message holds its log.
    """
    library, texts = _library(), source_texts()
    headers = {name: text for name, text in texts.items() if not name.endswith(".cu")}
    names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
    bodies = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    file, *extra = SOURCES[unit]
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v", *extra]
    program = ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), texts[file].encode(), file.encode(), len(headers), bodies, names
        )
    )
    try:
        argv = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), argv)
        log = _read(program, "ProgramLog").decode(errors="replace").rstrip("\0")
        if status:
            reason = library.nvrtcGetErrorString(status).decode()
            raise NvrtcError(f"NVRTC {nvrtc_version()} cannot compile {unit} for {arch}: {reason}\n{log[:2000]}")
        return Compiled(_read(program, "CUBIN"), _resources(log))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _resources(log: str) -> tuple[KernelResources, ...]:
    """Reads the assembler's report: `Compiling entry function 'name'`, `spill stores`, `Used n registers`."""
    found = []
    for part in re.split(r"Compiling entry function '", log)[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if spills and registers:
            spilled = int(spills[1]) + int(spills[2])
            found.append(
                KernelResources(part.split("'")[0], int(registers[1]), spilled, int(shared[1]) if shared else 0)
            )
    return tuple(found)
