"""Picks the backend for a device, and says which and why."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch

from .backend import Backend
from .cpu import CpuBackend
from .cuda import CudaBackend, DriverError, NvrtcError, launcher_for
from .reference import ReferenceBackend

__all__ = ["get_backend"]


def get_backend(device: torch.device | str) -> Backend:
    """The backend for tensors on a device.

    Args:
        device: The device of the pages.

    Returns:
        A backend; its `name` and `reason` say which one and why. Backends hold no state, so one instance serves
        every cache. Where the CUDA kernels cannot be used, a warning says why and plain torch does the work.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return _backend_for(device.type, device.index if device.type != "cuda" else None)
    return _backend_for(device.type, torch.cuda.current_device() if device.index is None else device.index)


def _cpu(index: int | None) -> Backend:
    return CpuBackend()


def _cuda(index: int | None) -> Backend:
    if index is None:
        return ReferenceBackend(reason="PyTorch sees no CUDA device")
    if torch.version.cuda is None:
        return ReferenceBackend(reason="this PyTorch is not built for CUDA")
    try:
        return CudaBackend(launcher_for(index))
    except (DriverError, NvrtcError) as error:
        reason = f"the CUDA kernels cannot be used: {error}"
        warnings.warn(f"kvcompress_hf falls back to plain torch on cuda:{index}, which is slow; {reason}")
        return ReferenceBackend(reason=reason)


#: What makes the backend of a device, by `torch.device.type`; it is given the device's index, or `None`.
MAKERS: dict[str, Callable[[int | None], Backend]] = {"cpu": _cpu, "cuda": _cuda}


@functools.cache
def _backend_for(device_type: str, index: int | None) -> Backend:
    make = MAKERS.get(device_type)
    if make is None:
        return ReferenceBackend(reason=f"there is no native backend for {device_type} tensors")
    return make(index)
