"""Finds the native code for the arithmetic of plans, where the slots lie on a device that has some."""

import torch

from kvcompress_hf.kernels import PlanOperations, get_backend

__all__ = ["native_for"]


def native_for(values: torch.Tensor) -> PlanOperations | None:
    """The native operations where values lie.

    Args:
        values (`torch.Tensor`): What a plan looks at.

    Returns:
        `PlanOperations` or `None`: `None` where the plan is to use torch, as on a GPU.
    """
    return get_backend(values.device).plans
