"""A capturer for the host shim: what a pass starts goes on a tape, and a replay runs the tape and nothing else.

As in a capture on a GPU nothing is carried out meanwhile that anybody could see: kernels are not started, what was
there before is not written to, and what was made on the way holds garbage (NaN) until the first replay. Asking for a
value is an error. Tensors stay where they were, so that a kernel started again finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import ShimLauncher

__all__ = ["RecordingLauncher", "TapeCapturer"]

ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "aten::equal")


class RecordingLauncher(ShimLauncher):
    """While there is a `tape`, launches go on it with their arguments instead of being run."""

    def __init__(self, library: Path, order: str = "ascending") -> None:
        super().__init__(library, order)
        self.tape: list[Callable[[], Any]] | None = None

    def capturing(self) -> bool:
        return self.tape is not None

    def launch(self, kernel, grid, block, arguments, device, cooperative=False):
        if self.tape is None:
            super().launch(kernel, grid, block, arguments, device, cooperative)
            return
        copies = tuple(type(each).from_buffer_copy(each) for each in arguments)
        again = super().launch
        self.tape.append(lambda: again(kernel, grid, block, copies, device, cooperative))


def _tensors(value: Any) -> list[torch.Tensor]:
    found = value if isinstance(value, (list, tuple)) else [value]
    return [each for each in found if isinstance(each, torch.Tensor)]


def _place(tensor: torch.Tensor) -> int:
    return getattr(tensor, "near", tensor).untyped_storage().data_ptr()


class Taping(TorchDispatchMode):
    """Puts every operation of PyTorch on a tape."""

    def __init__(self, tape: list[Callable[[], Any]]) -> None:
        super().__init__()
        self.tape, self.made = tape, dict[int, torch.Tensor]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, function._schema
        if any(part in schema.name for part in ASKING):
            raise RuntimeError(f"{schema.name}: operation not permitted when stream is capturing")
        if schema.is_mutable:
            self.tape.append(lambda: function(*args, **kwargs))
            return function(*args, **kwargs) if _place(args[0]) in self.made else args[0]
        out = function(*args, **kwargs)
        if any(each.alias_info is not None for each in schema.returns):
            return out  # a view, which stays one
        self.made.update((_place(each), each) for each in _tensors(out))
        if not any(part in schema.name for part in ("empty", "_unsafe_view")):
            self.tape.append(lambda: self._again(function, args, kwargs, out))
        return out

    @staticmethod
    def _again(function, args, kwargs, out):
        for old, new in zip(_tensors(out), _tensors(function(*args, **kwargs)), strict=True):
            old.copy_(new)


class TapeCapturer:
    """A `Capturer` on the shim.

    Args:
        launcher: Of the backend in use.
    """

    def __init__(self, launcher: RecordingLauncher) -> None:
        self.launcher, self.tape = launcher, list[Callable[[], Any]]()
        self.replaying = False
        self.taping: Taping | None = None

    def capture(self, run):
        self.tape = []
        self.launcher.tape, self.taping = self.tape, Taping(self.tape)
        try:
            with self.taping:
                result = run()
        finally:
            self.launcher.tape = None
        for each in self.taping.made.values():
            if each.is_floating_point():
                each.fill_(float("nan"))
        return result

    def replay(self):
        self.replaying = True
        with torch.no_grad():
            for again in self.tape:
                again()
        self.replaying = False
