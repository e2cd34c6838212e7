"""Linear layers of a patched 16-bit model on a CPU: in decoding steps, the kernel for few rows where it is quicker.

A layer keeps its class, its parameters and its hooks; only its `forward` is another, and that goes the stock way
wherever it is not asked for exactly what the kernel does. Layers whose `forward` somebody else has replaced, and
subclasses (LoRA, quantised ones), are left alone.
"""

import functools
import math
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress_hf.kernels import MOST_ROWS, LinearPlan, get_backend

__all__ = ["LINEARS", "give_back_linears", "take_linears"]

#: What `patch` may be asked for: the kernel where it pays, or torch's linear layers everywhere.
LINEARS = ("auto", "stock")

_DTYPES = (torch.bfloat16, torch.float16)
_TRIED = 768  # features in and out of the layer that is timed: its weight does not leave the cache
_ROUNDS = 15


class _Prepared:
    """What a layer's `forward` keeps between calls; a copied or pickled model begins without."""

    __slots__ = ("plan",)

    def __init__(self) -> None:
        self.plan: LinearPlan | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Prepared, ()


def take_linears(model: nn.Module) -> None:
    """Gives the layers that the kernel is for our `forward`. Doing it again does it for those that came since.

    Args:
        model (`nn.Module`): The model.
    """
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in module.__dict__ and _suits(module.weight):
            module.__dict__["forward"] = functools.partial(_forward, module, _Prepared())


def give_back_linears(model: nn.Module) -> None:
    """Undoes [`take_linears`], also under a hook that accelerate has put around our `forward` since.

    Args:
        model (`nn.Module`): The model.
    """
    for module in model.modules():
        state = module.__dict__
        if _is_ours(state.get("forward")):
            del state["forward"]
        elif _is_ours(state.get("_old_forward")):
            state["_old_forward"] = stock = types.MethodType(type(module).forward, module)
            around = state.get("forward")
            if isinstance(around, functools.partial):
                functools.update_wrapper(around, stock)


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func is _forward


def _suits(weight: Any) -> bool:
    """Whether a weight is a plain 16-bit one on the CPU, its rows without gaps in them."""
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.dtype in _DTYPES
        and weight.is_cpu
        and weight.dim() == 2
        and weight.stride(1) == 1
        and weight.numel() > 0
    )


def _forward(module: nn.Linear, prepared: _Prepared, x: Tensor) -> Tensor:
    """`forward` of a linear layer of a patched model.

    Args:
        module (`nn.Linear`): The layer.
        prepared (`_Prepared`): Of the layer.
        x (`Tensor`): `[..., in_features]`.

    Returns:
        `Tensor`: `[..., out_features]`.
    """
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and type(x) is Tensor:
        plan, parameters = prepared.plan, module._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        if plan is None or not plan.is_of(weight, bias):
            prepared.plan = plan = _plan(weight, bias)
        if plan is not None and _is_for(plan, x):
            return plan.run(x)
    return nn.Linear.forward(module, x)


def _plan(weight: Tensor | None, bias: Tensor | None) -> LinearPlan | None:
    """The kernel made ready for a layer as it is now; `None` where the layer is not for it."""
    if weight is None or not _suits(weight) or not (bias is None or type(bias) in (nn.Parameter, Tensor)):
        return None
    if bias is not None and (bias.dtype != weight.dtype or not bias.is_cpu or not bias.is_contiguous()):
        return None
    return get_backend("cpu").plan_linear(weight, bias)


def _is_for(plan: LinearPlan, x: Tensor) -> bool:
    """Whether an input is what a plan takes, and the kernel is quicker."""
    numbers, width, dtype = x.numel(), plan.in_features, x.dtype
    return (
        type(numbers) is int  # a tensor while torch.jit traces
        and width <= numbers <= MOST_ROWS * width
        and x.shape[-1] == width
        and dtype is plan.dtype
        and x.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and _pays(numbers // width, dtype, torch.get_num_threads())
    )


@functools.cache
def _pays(rows: int, dtype: torch.dtype, threads: int) -> bool:
    """Whether the kernel is quicker than torch on this machine, by a trial of a few milliseconds, once per process.

    Args:
        rows (`int`): Of the input.
        dtype (`torch.dtype`): Of everything.
        threads (`int`): That torch computes with.
    """
    weight, x = torch.ones(_TRIED, _TRIED, dtype=dtype), torch.ones(rows, _TRIED, dtype=dtype)
    plan = get_backend("cpu").plan_linear(weight)
    runs: tuple[Callable[[Tensor], Tensor], ...]
    runs = (plan.run, functools.partial(nn.functional.linear, weight=weight))
    least = [math.inf, math.inf]
    for _ in range(_ROUNDS):  # in turn, as a machine may be busy
        for i, run in enumerate(runs):
            started = time.perf_counter()
            run(x)
            least[i] = min(least[i], time.perf_counter() - started)
    return least[0] < least[1]
