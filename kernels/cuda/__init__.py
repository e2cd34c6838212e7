"""The operations on CUDA tensors: device-only CUDA C++ beside this file, loaded without any compiler where possible."""

from .backend import CudaBackend
from .driver import CudaLauncher, DriverError, driver_version, launcher_for, load_driver
from .images import shipped_architectures
from .nvrtc import NvrtcError, nvrtc_version

__all__ = [
    "CudaBackend",
    "CudaLauncher",
    "DriverError",
    "NvrtcError",
    "describe",
    "driver_version",
    "launcher_for",
    "load_driver",
]


def describe() -> list[tuple[str, str]]:
    """What the CUDA backend depends on, and whether it is there, for a person to read.

    Returns:
        `(what, text)` pairs; reads files, starts nothing.
    """
    try:
        driver = f"CUDA {driver_version()}"
    except DriverError as error:
        driver = f"none: {error}"
    try:
        compiler = ".".join(map(str, nvrtc_version()))
    except NvrtcError as error:
        compiler = f"none: {error}"
    code = ", ".join(shipped_architectures()) or "none: kernels are compiled by NVRTC at first use"
    return [("cuda driver", driver), ("cuda device code", code), ("NVRTC", compiler)]
