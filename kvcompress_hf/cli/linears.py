"""Linear layers of 16-bit models on CPUs that multiply only 32-bit numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["linears_in_float32"]


@contextmanager
def linears_in_float32(model: Any) -> Iterator[bool]:
    """Has a 16-bit model's linear layers computed in float32, for the length of a `with` block, where that is faster.

    torch adds the products of 16-bit numbers up in float32 anyway, and what comes out is rounded to 16 bits as before:
    only the order of a sum may differ. Without AVX512 it is several times faster. It takes twice the weights' bytes on
    top.

    Args:
        model: any module; its parameters stay what they are.

    Yields:
        Whether anything is done: not for other dtypes, other devices, or CPUs with AVX512.
    """
    found = []
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        for module in model.modules():
            weight = module.weight if type(module) is nn.Linear else None
            if weight is not None and weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16):
                found.append(module)
    shared: dict[int, torch.Tensor] = {}  # several layers may have one weight
    for module in found:
        if module.weight.data_ptr() not in shared:
            shared[module.weight.data_ptr()] = module.weight.detach().float()
        module.forward = _forward(shared[module.weight.data_ptr()], module.bias)
    try:
        yield bool(found)
    finally:
        for module in found:
            del module.forward


def _forward(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    bias = None if bias is None else bias.detach().float()

    def forward(states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(states.float(), weight, bias).to(states.dtype)

    return forward
