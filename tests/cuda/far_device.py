"""A device that only pretends to be far away: its tensors lie in host memory, but waits for them are noted.

Device tensors know their device, so that copies in either direction are told from what stays on one side, and mixing
both is an error, as with a GPU. What counts as a wait is what makes PyTorch's CUDA code wait for its stream:

- a number or a truth value of a device tensor (`item`, `int()`, `bool()`), a list, a copy to the host;
- operations whose result has a size that only the device knows: `nonzero`, boolean masks, `unique`,
  `repeat_interleave` without `output_size`, ...;
- a copy to the device, unless it is `non_blocking` and out of pinned memory; indexing with a host tensor included.

Registering the device changes the whole process, so this is imported by scripts that run in a process of their own.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompress_hf.kernels import staging
from kvcompress_hf.paging import waiting

backend_registration._setup_privateuseone_for_python_backend("far")
FAR = torch.device("far:0")
HERE = Path(__file__).parent
PACKAGE = ("kvcompress_hf", "kernels")
SIZED_BY_DATA = ("nonzero", "masked_select", "unique", "bincount", "equal", "_local_scalar_dense")
MIXING = ("copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_")  # may be given both kinds


staging.STAGED += (FAR.type,)


def _pin_memory(values: torch.Tensor) -> torch.Tensor:
    """`Tensor.pin_memory`, which needs a GPU: a copy that knows that it is pinned."""
    pinned = values.clone()
    pinned.is_staged = True
    return pinned


torch.Tensor.pin_memory = _pin_memory


class FarTensor(torch.Tensor):
    """A tensor on the device; `near` is where its memory really is."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> FarTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device=FAR
        )

    def __init__(self, near: torch.Tensor) -> None:
        self.near = near

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def tolist(self) -> Any:
        note("tolist")
        return self.near.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a tensor of the device to numpy; use Tensor.cpu() first")

    def __repr__(self, **kwargs: Any) -> str:
        return f"FarTensor({self.near!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


_make_tensor = torch.tensor


def _tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    """`torch.tensor`, which makes a host tensor first and then waits until it has been copied."""
    if device is None or torch.device(device).type != FAR.type:
        return _make_tensor(data, device=device, **options)
    note("torch.tensor to the device")
    return FarTensor(_make_tensor(data, **options))


torch.tensor = _tensor


class FarDevice(TorchDispatchMode):
    """While it is entered, tensors can be made on `FAR`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


_noted: Counter[str] = Counter()


def note(what: str) -> None:
    """Notes a wait with the place in the package that asked."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).parent != HERE]
    own = [
        f
        for f in frames
        if any(part in Path(f.filename).parts for part in PACKAGE) and "site-packages" not in f.filename
    ]
    where = (
        "test"
        if not own
        else f"{Path(own[-1].filename).parent.name}/{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}"
    )
    if len(own) > 1:
        where += f" < {Path(own[-2].filename).name}:{own[-2].lineno} {own[-2].name}"
    _noted[f"{what} at {where}"] += 1


def taken() -> dict[str, int]:
    """The waits since this was last called, by operation and place."""
    result = dict(_noted)
    _noted.clear()
    return result


def each_of(values: Any, make: Callable[[Any], Any]) -> Any:
    """What a function makes of each value in lists and tuples; named tuples become plain ones."""
    if isinstance(values, (list, tuple)) and not isinstance(values, torch.Size):
        return (
            [each_of(x, make) for x in values] if isinstance(values, list) else tuple(each_of(x, make) for x in values)
        )
    return make(values)


def run(function, args, kwargs):
    """Runs an operation on host memory, and notes it where the host would have to wait."""
    name = function._schema.name.removeprefix("aten::")
    tensors: list[torch.Tensor] = []
    each_of((*args, *kwargs.values()), lambda x: tensors.append(x) if isinstance(x, torch.Tensor) else None)
    far = [x for x in tensors if isinstance(x, FarTensor)]
    near = [x for x in tensors if not isinstance(x, FarTensor) and x.dim()]
    wanted = kwargs.get("device")
    to_far = bool(far) if wanted is None else torch.device(wanted).type == FAR.type
    if name in ("copy_",):
        to_far = isinstance(args[0], FarTensor)
    if name in ("copy_", "_to_copy"):
        source = args[-1] if name == "copy_" and len(args) < 3 else args[1] if name == "copy_" else args[0]
        if isinstance(source, FarTensor) != to_far:
            asked = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            blocking = not (asked and getattr(source, "is_staged", False))
            if not to_far or (blocking and source.dim() + (name == "_to_copy")):
                note(f"{name} {'to' if to_far else 'from'} the device")
    elif far and near:
        if name not in MIXING:
            raise RuntimeError(f"{name}: tensors on the host and on the device, shapes {[x.shape for x in tensors]}")
        note(f"{name} by host tensor")
    if far and any(part in name for part in SIZED_BY_DATA):
        note(name)
    if far and name == "repeat_interleave" and kwargs.get("output_size") is None:
        note(name)
    indices = args[1] if name in MIXING[2:] else ()
    if far and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices):
        note(f"{name} by mask")

    def inner(x):
        if isinstance(x, FarTensor):
            return x.near
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == FAR.type else x

    result = function(*each_of(args, inner), **{key: each_of(x, inner) for key, x in kwargs.items()})
    if (
        function._schema.is_mutable
        and name.endswith("_")
        and far
        and args[0] is far[0]
        and isinstance(result, torch.Tensor)
    ):
        return args[0]
    return each_of(result, lambda x: FarTensor(x) if isinstance(x, torch.Tensor) and to_far else x)


WAITS = (
    "int(x.max())",
    "float(x[0])",
    "bool((x > 1).any())",
    "x[2].item()",
    "x.tolist()",
    "x[:x[2]]",
    "range(x[2])",
    "torch.arange(x[2], device=FAR)",
    "torch.zeros(x[2])",
    "x[:3].split(x[:3].tolist())",
    "x.cpu()",
    "x.to('cpu')",
    "host.copy_(x[:3])",
    "host.to(FAR)",
    "x[:3].copy_(host)",
    "torch.tensor([1, 2], device=FAR)",
    "host.to(FAR, non_blocking=True)",
    "host.pin_memory().to(FAR)",
    "x[host]",
    "x[x > 1]",
    "x.__setitem__(x > 1, 2)",
    "x.masked_select(x > 1)",
    "torch.nonzero(x)",
    "torch.where(x > 1)",
    "torch.unique(x)",
    "torch.bincount(x)",
    "torch.equal(x, x)",
    "torch.repeat_interleave(x)",
    "torch.nn.functional.one_hot(x)",
)
NO_WAITS = (
    "x + 1",
    "x[0]",
    "x[1:3].add_(1)",
    "x[torch.arange(3, device=FAR)]",
    "x.__setitem__(0, 5)",
    "x.masked_fill_(x > 1, 2)",
    "torch.where(x > 1, x, 0)",
    "x.cumsum(0)",
    "torch.searchsorted(x, x)",
    "torch.repeat_interleave(x, output_size=int(host.sum()) + 12)",
    "host.pin_memory().to(FAR, non_blocking=True)",
    "waiting.to_device(host, FAR)",
    "host.tolist()",
    "x.argsort(stable=True)",
    "torch.full((3,), 2, device=FAR)",
)


def noticed(expression: str) -> bool:
    """Whether evaluating an expression over device tensor `x` and host tensor `host` counts as a wait."""
    taken()
    eval(
        expression,
        {"torch": torch, "waiting": waiting, "FAR": FAR, "x": torch.arange(6, device=FAR), "host": torch.arange(3)},
    )
    return bool(taken())


if __name__ == "__main__":
    import json
    import sys

    with FarDevice():
        missed = [each for each in WAITS if not noticed(each)]
        imagined = [each for each in NO_WAITS if noticed(each)]
    sys.stdout.write(json.dumps({"missed": missed, "imagined": imagined}) + "\n")
