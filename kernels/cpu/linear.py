"""The native product of few rows with a weight."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import abi, checks
from ..arguments import pointer
from ..layout import DTYPES
from ..linear import MOST_ROWS, LinearPlan

__all__ = ["CpuLinearPlan"]

_MOST_SHAPES = 16  # of inputs that are remembered


class CpuLinearPlan(LinearPlan):
    """The hot path: everything but two addresses is ready. Threads may run one plan at once.

    Args:
        function: `kvc_linear` of the library.
        isa: Its instruction set.
        weight: bfloat16 or float16, contiguous in its last dimension.
        bias: Contiguous, or `None`.
    """

    def __init__(self, function: ctypes._FuncPointer, isa: int, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias, torch.float32)
        self._function, self._isa = function, isa
        self._one = torch.empty(1, dtype=weight.dtype)
        #: By the shape of x: arguments to copy, as threads may not share them, and something of the output's shape.
        self._ready: dict[torch.Size, tuple[abi.KvcLinear, Tensor]] = {}

    def _prepare(self, x: Tensor) -> tuple[abi.KvcLinear, Tensor]:
        checks.check_linear_input(x, self.weight, MOST_ROWS)
        c = abi.KvcLinear(
            x_stride=self.in_features,
            weight_stride=self.weight.stride(0),
            out_stride=self.out_features,
            rows=x.numel() // self.in_features,
            in_features=self.in_features,
            out_features=self.out_features,
            dtype=DTYPES[self.dtype],
        )
        c.weight, c.bias = self.weight.data_ptr(), pointer(self.bias)
        if len(self._ready) >= _MOST_SHAPES:
            self._ready = {}
        like = self._one.as_strided((*x.shape[:-1], self.out_features), (0,) * x.dim())
        self._ready[x.shape] = c, like
        return c, like

    def run(self, x: Tensor) -> Tensor:
        ready = self._ready.get(x.shape)
        if ready is None or x.dtype is not self.dtype or not x.is_cpu:
            ready = self._prepare(x)
        if not x.is_contiguous():
            x = x.contiguous()
        c, out = abi.KvcLinear.from_buffer_copy(ready[0]), torch.empty_like(ready[1])
        c.x, c.out = x.data_ptr(), out.data_ptr()
        status = self._function(self._isa, ctypes.addressof(c))
        if status:
            raise ValueError(f"the native linear refused its arguments (status {status})")
        return out
