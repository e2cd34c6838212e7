"""The operations on CUDA tensors: device-only CUDA C++ beside this file, loaded without any compiler where possible."""

from .backend import CudaBackend
from .driver import CudaLauncher, DriverError, launcher_for, load_driver
from .nvrtc import NvrtcError

__all__ = ["CudaBackend", "CudaLauncher", "DriverError", "NvrtcError", "launcher_for", "load_driver"]
