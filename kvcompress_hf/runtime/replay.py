"""Decode steps of one cache that are captured into a graph of the device once and replayed from then on.

A captured step knows nothing of the host: positions and lengths of tails are numbers on the device, which its kernels
move on, and everything else it reads stays where it was. What the host counts is counted beside it
([`PagedAttention.replay`]), and what is due after a step (packing, plans) happens outside of it, as ever. That moves
tables or slabs as a rule, so a new capture follows; between two packings there is one at most, unless forks are made.
"""

import contextlib
from collections.abc import Callable
from typing import Protocol, TypeVar

from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.kernels import DecodePlan
from kvcompress_hf.runtime.attention import PagedAttention
from kvcompress_hf.validation import MOST_TOKENS

__all__ = ["Capturer", "StepReplay"]

_Result = TypeVar("_Result")
_TRIES = 5  # to start a step before another thread moves what it reads


class Capturer(Protocol):
    """Records what is started on a device, and starts it again; for CUDA `kernels/cuda/capture.py`."""

    def capture(self, run: Callable[[], _Result]) -> _Result:
        """Records what `run` starts, which is not carried out; what was recorded before is forgotten.

        Args:
            run (`Callable`): Starts work on the device, and must not ask it for anything.

        Returns:
            What `run` returned; the tensors in it have their values after each [`Capturer.replay`].
        """

    def replay(self) -> None:
        """Starts what was recorded last."""


class StepReplay:
    """Captures and replays steps of one token per sequence.

    Args:
        attention (`PagedAttention`): The inside of the cache, of which one step has been run.
        capturer (`Capturer`): Records and replays.
    """

    def __init__(self, attention: PagedAttention, capturer: Capturer) -> None:
        self._attention, self._capturer = attention, capturer
        self._plans: list[DecodePlan] = []  # of the step that was captured last; they keep alive what it reads
        self._result: object = None

    def obstacle(self) -> str | None:
        """Why the next step cannot be captured.

        Returns:
            `str` or `None`: The reason as a part of a sentence; `None` if it can.
        """
        attention, layers = self._attention, self._attention.layers
        if attention.looks_at_steps:
            return f"{type(attention.recipe.observer).__name__} looks at every step on the host"
        if any(layer.sharing is not None for layer in layers):
            return "layers of this model share keys and values"
        if attention.recording:
            return "the cache holds tokens back that may be taken back (past recording)"
        if attention.awaits_second_reading or attention.counters.unfinished:
            return "the prompt is still being read"
        if any(layer.store is None or layer.logits is None or layer.seen != attention.seen for layer in layers):
            return "not all layers have stored the tokens so far"
        if len({arena.device for arena in attention.arenas}) > 1:
            return "the cache lies on several devices"
        if attention.seen >= MOST_TOKENS:
            return "the cache has seen as many tokens as positions of 32 bits count"
        backends = [store.backend for store in attention.stores]
        plans = [plan for store in attention.stores for plan in store.tensors.plans.values()]
        if not all(plan.replays for plan in plans):
            return f"the kernels {backends[0].name} cannot be replayed"
        return None

    def step(self, run: Callable[[], _Result]) -> _Result:
        """One step: captured if that is needed, and replayed.

        Args:
            run (`Callable`): A pass of the model over one token per sequence, out of tensors that stay the same.

        Returns:
            What `run` returned when it was captured; its tensors have the values of this step until the next one.

        Raises:
            UnsupportedFeatureError: If it could not be captured. The cache is as it was before.
            RuntimeError: If other threads did not let it: caches that share pages with this one move them.
        """
        attention = self._attention
        attention.settle()
        for _ in range(_TRIES):
            if attention.replay(self._start):
                return self._result  # type: ignore[return-value]
            self._capture(run)
        raise RuntimeError(
            f"Pages were moved by other threads while a step was captured, {_TRIES} times in a row. Repeat it, or pass "
            'kvcompress={"graph": False} where several threads go on with forks of one cache.'
        )

    def _start(self) -> bool:
        """Starts the captured step, if all that it reads is where it was; no other thread moves it meanwhile."""
        with contextlib.ExitStack() as held:
            for store in self._attention.stores:
                held.enter_context(store.reading)
            now = self._attention.plans()
            current = len(now) == len(self._plans) and all(a is b for a, b in zip(now, self._plans, strict=True))
            if current:
                self._capturer.replay()
            return current

    def _capture(self, run: Callable[[], _Result]) -> None:
        self._plans, plans = [], self._attention.ready_to_capture()
        try:
            with self._attention.capturing():
                self._result = self._capturer.capture(run)
        except Exception as error:
            raise UnsupportedFeatureError(
                f"A decode step of this model could not be captured into a graph ({type(error).__name__}: {error}). "
                "Something in it asks the device for an answer, or needs the host at every step. The cache is as it "
                'was before the step. Leave "graph" out of kvcompress=, or pass kvcompress={"graph": False}.'
            ) from error
        self._plans = plans
        self._attention.statistics.captures += 1
