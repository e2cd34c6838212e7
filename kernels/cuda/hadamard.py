"""Starts the transform of values and of attention's output; arguments have been checked."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import abi
from ..arguments import fill_strides
from ..layout import DTYPES
from .launch import Launcher

__all__ = ["launch_hadamard"]

WARPS = 4  # of a block, one vector each


def launch_hadamard(launcher: Launcher, x: Tensor, block: int) -> Tensor:
    """`Backend.hadamard` of checked arguments.

    Args:
        launcher: Where kernels run.
        x: `[batch, outer, inner, head_dim]`.
        block: Size of a block.

    Returns:
        The transformed vectors, contiguous.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, outer, inner, head_dim = x.shape
    c = abi.KvcHadamard(batch=batch, outer=outer, inner=inner, head_dim=head_dim, block=block, dtype=DTYPES[x.dtype])
    c.x, c.out = x.data_ptr(), out.data_ptr()
    fill_strides(c, "x", x)
    launcher.launch("kvc_hadamard", -(-(batch * outer * inner) // WARPS), 32 * WARPS, (c,), x.device)
    return out
