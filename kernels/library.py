"""Finds and loads the native library that the build puts next to this package."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch  # noqa: F401  (first, so that our OpenMP calls bind to the libgomp that torch brings)

from .abi import declare

LIBRARY_NAME = "libkvc_cpu.so"


def library_path() -> Path:
    """Where `libkvc_cpu.so` lies.

    Raises:
        ImportError: It is not there: the package was not built, or was copied without it.
    """
    package = sys.modules[__package__]
    folders = [Path(__file__).parent, *map(Path, package.__path__)]  # an editable install has two of them
    # In the clone Python may take the sources from there while the build lies where the package is installed.
    installed = [Path(entry, *__package__.split(".")) for entry in sys.path]
    for folder in (*folders, *installed):
        path = folder / LIBRARY_NAME
        if path.exists():
            return path
    raise ImportError(
        f"{LIBRARY_NAME} was not found in {', '.join(sorted({str(f) for f in folders}))}; "
        "install kvcompress_hf with `pip install .` so that its native library is built"
    )


@functools.cache
def load_library() -> ctypes.CDLL:
    """Loads `libkvc_cpu.so` once per process.

    Returns:
        The loaded library; its functions are declared in `kernels/include/abi.h` and `kernels/cpu/dispatch.cpp`.

    Raises:
        ImportError: The library is not there, or is of another version.
    """
    library = ctypes.CDLL(str(library_path()))
    declare(library)
    return library
