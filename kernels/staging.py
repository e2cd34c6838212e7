"""Copies from the host to a device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["STAGED", "send"]

STAGED = ("cuda",)  # kinds of devices that copy from pinned memory


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copies values to a device without waiting until they have arrived.

    A copy out of ordinary memory may wait for the stream while the driver stages it. PyTorch keeps pinned memory until
    the copy is done, and then hands it out again.

    Args:
        values: On the host.
        device: Where they are needed.

    Returns:
        The values on `device`; `values` themselves where that is the host.
    """
    if device.type in STAGED:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
