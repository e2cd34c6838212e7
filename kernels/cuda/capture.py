"""Decode steps recorded into a CUDA graph, by PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["CudaCapturer"]

_Result = TypeVar("_Result")


class CudaCapturer:
    """Records what is started on a CUDA device into a graph, and starts it again with one call of the driver.

    Memory that is made while a graph is recorded stays its own. One graph after the other takes the same.

    Args:
        device: Where it runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, run: Callable[[], _Result]) -> _Result:
        """Records what `run` starts, which is not carried out; what was recorded before is forgotten.

        Args:
            run: Starts kernels on PyTorch's current stream, and asks the device for nothing.

        Returns:
            What `run` returned.

        Raises:
            Exception: What `run` raised. Where it asked the device, that is a `RuntimeError` of PyTorch.
        """
        graph = torch.cuda.CUDAGraph()
        pool = None if self._graph is None else self._graph.pool()  # which lives as long as a graph does
        stopped: list[Exception] = []
        try:
            # Other threads may go on: what they start is not recorded, and must not break the recording off.
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    result = run()
                except Exception as error:
                    stopped.append(error)
                    raise
        except Exception:
            if stopped:  # that the recording is void then is no news
                raise stopped[0] from None
            raise
        self._graph = graph
        return result

    def replay(self) -> None:
        """Starts what was recorded last, on PyTorch's current stream."""
        if self._graph is None:
            raise RuntimeError("nothing has been captured")
        self._graph.replay()
