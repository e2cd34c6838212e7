"""Test only: runs the `.cu` files of `kernels/cuda` on the CPU (`cuda_shim.h`). Not part of the wheel."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import subprocess
from pathlib import Path

import torch

from ..cuda.backend import CudaBackend

__all__ = ["ORDERS", "ShimError", "ShimLauncher", "build_shim", "shim_backend"]

FOLDER = Path(__file__).parent
ORDERS = ("ascending", "descending", "shuffled")
#: `shim::Status` of `cuda_shim.h` but the first.
FAULTS = {
    1: "its threads wait for each other for ever, or for bytes that do not come",
    2: "too many threads",
    3: "there is no such kernel",
    4: "a bulk copy whose addresses and bytes are not multiples of 16, or that does not lie in shared memory",
    5: "a gate that was not made, or was made twice, or is told what to expect before its last phase has ended",
    6: "bulk copies were still under way at the end of a block",
}


class ShimError(RuntimeError):
    """Threads of a block wait for each other for ever, or the shim could not be built."""


def build_shim(folder: Path, *, sanitize: bool = False) -> Path:
    """Compiles shim and kernels into one library, unless that has been done already.

    Args:
        folder: Where the library goes.
        sanitize: Whether to compile with AddressSanitizer, and with checks that words lie where words may lie: a GPU
            faults where this CPU does not.

    Returns:
        Path of the library that was built.

    Raises:
        ShimError: There is no g++, or it refused the sources.
    """
    sources = [
        path for place in (FOLDER, FOLDER.parent / "cuda", FOLDER.parent / "include") for path in place.iterdir()
    ]
    newest = max(path.stat().st_mtime_ns for path in sources if path.suffix in (".cu", ".cuh", ".h", ".cpp"))
    library = folder / f"libkvc_shim{'_asan' if sanitize else ''}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # processes that run tests side by side build it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists() or library.stat().st_mtime_ns <= newest:
            _compile(library, sanitize)
    return library


def _compile(library: Path, sanitize: bool) -> None:
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = [
        os.environ.get("CXX", "g++"),
        "-std=c++17",
        "-O0" if sanitize else "-O1",
        "-g1",
        "-fPIC",
        "-shared",
        "-ffp-contract=off",
        "-w",
    ]
    command += ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment"] if sanitize else []
    command += [f"-I{place}" for place in (FOLDER, FOLDER.parent / "cuda", FOLDER.parent / "include")]
    command += [str(FOLDER / "shim.cpp"), "-o", str(unfinished)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ShimError(f"the host shim needs a C++ compiler: {command[0]} was not found") from error
    if result.returncode:
        raise ShimError(f"the host shim does not compile:\n{result.stderr[-4000:]}")
    unfinished.replace(library)


class ShimLauncher:
    """A `Launcher` for tensors on the CPU.

    Args:
        library: What `build_shim` made.
        order: Schedule of the threads: one of `ORDERS`.
        bulk_copies: Whether decoding uses the kernels with bulk copies, where these take a layout.

    Raises:
        ValueError: There is no such order.
    """

    device_type = "cpu"
    blocks = 9  # that are said to run at the same time: few, and odd, so that rows are split in the middle

    def __init__(self, library: Path, order: str = "ascending", bulk_copies: bool = False) -> None:
        if order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
        self.name = f"cuda-shim-{order}"
        self.reason = "the CUDA kernels on the CPU, for tests"
        self.bulk_copies = bulk_copies
        self._order = ORDERS.index(order)
        self._library = _load(library)

    def launch(
        self,
        kernel: str,
        grid: int,
        block: int,
        arguments: tuple[ctypes._CData, ...],
        device: torch.device,
        cooperative: bool = False,
    ) -> None:
        """See `Launcher`.

        Raises:
            ShimError: One of `FAULTS`.
        """
        if grid == 0:
            return
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        status = self._library.kvc_shim_launch(kernel.encode(), self._order, grid, block, cooperative, pointers)
        if status:
            raise ShimError(f"{kernel}: {FAULTS[status]}")

    def resident(self, kernel: str, block: int, device: torch.device) -> int:
        """See `Launcher`."""
        return self.blocks

    def capturing(self) -> bool:
        """See `Launcher`; the shim has no graphs."""
        return False


@functools.cache
def _load(library: Path) -> ctypes.PyDLL:
    return ctypes.PyDLL(str(library))  # keeps the GIL: the shim is not made for several threads


def shim_backend(library: Path, order: str = "ascending", bulk_copies: bool = False) -> CudaBackend:
    """A `CudaBackend` that runs on the CPU.

    Args:
        library: What `build_shim` made.
        order: Schedule of the threads: one of `ORDERS`.
        bulk_copies: As in `ShimLauncher`.

    Returns:
        A backend whose kernels run on the CPU.
    """
    return CudaBackend(ShimLauncher(library, order, bulk_copies))
