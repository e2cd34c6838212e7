"""What the backend needs of a place where kernels run: a GPU (`driver.py`), or the host shim of the tests."""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch

__all__ = ["KvcWidths", "KvcWorkspace", "Launcher"]

MAX_TIERS = 4


class KvcWidths(ctypes.Structure):
    """Mirror of `KvcWidths` in `parameters.h`."""

    _fields_ = [("width", ctypes.c_int32 * MAX_TIERS), ("tiles", ctypes.c_int32)]


class KvcWorkspace(ctypes.Structure):
    """Mirror of `KvcWorkspace` in `parameters.h`."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("partial", "partial_max", "partial_sum", "arrived", "lse", "clock", "logits")
    ]


class Launcher(Protocol):
    """Runs kernels by name on one kind of device.

    Attributes:
        name: Name of the backend that uses it, such as `"cuda-sm_90a"`.
        reason: Why this one was picked, in a few words.
        device_type: `torch.device.type` of the tensors it works on.
        bulk_copies: Whether decoding uses the kernels that bring pages by bulk copies, where these take a layout.
    """

    name: str
    reason: str
    device_type: str
    bulk_copies: bool

    def resident(self, kernel: str, block: int, device: torch.device) -> int:
        """How many blocks of a kernel the device runs at the same time, as it says itself.

        Args:
            kernel: Its name.
            block: Threads of a block.
            device: The device.

        Returns:
            The number of blocks, at least 1.

        Raises:
            RuntimeError: Not even one fits, or the device could not be asked.
        """
        ...

    def launch(
        self,
        kernel: str,
        grid: int,
        block: int,
        arguments: tuple[ctypes._CData, ...],
        device: torch.device,
        cooperative: bool = False,
    ) -> None:
        """Starts a kernel on the device's current stream.

        Args:
            kernel: Its name.
            grid: Blocks; nothing happens when there are none.
            block: Threads of a block.
            arguments: ctypes values, passed by value in this order.
            device: Where the tensors lie that the arguments point to.
            cooperative: Whether blocks wait for each other: then they all run at the same time, or the start fails.

        Raises:
            RuntimeError: It could not be started.
        """
        ...

    def capturing(self) -> bool:
        """Whether what is started now is recorded into a CUDA graph instead of run."""
        ...
