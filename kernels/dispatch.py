"""Picks the backend for a device, and says which and why."""

from __future__ import annotations

import functools

import torch

from .backend import Backend
from .cpu import CpuBackend
from .reference import ReferenceBackend

__all__ = ["get_backend"]


def get_backend(device: torch.device | str) -> Backend:
    """The backend for tensors on a device.

    Args:
        device: The device of the pages.

    Returns:
        A backend; its `name` and `reason` say which one and why. Backends hold no state, so one instance serves
        every cache.
    """
    return _backend_for(torch.device(device).type)


@functools.cache
def _backend_for(device_type: str) -> Backend:
    if device_type == "cpu":
        return CpuBackend()
    return ReferenceBackend(reason=f"there is no native backend for {device_type} tensors")
