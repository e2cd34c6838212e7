"""Times on a GPU without the host's: calls captured into a CUDA graph, over caches that no cache of the GPU holds.

In a model every layer's keys and values come from memory: what was read last is long gone when its turn comes again.
Here so many caches take turns that together they are five times the L2 cache. A call from Python takes longer than many
of the kernels; its time is measured apart (`host_microseconds`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Form = Callable[[], object]
REPLAYS = 8  # of a graph in a row, so that what starting one costs is shared
CALLS = 200  # of which the host's time is taken


def l2_bytes(device: torch.device) -> int:
    """Bytes of the device's largest cache; on the CPU something small."""
    if device.type != "cuda":
        return 1 << 20
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20


def copies_for(size: int, device: torch.device) -> int:
    """How many caches of a size take turns: five times the L2 cache together, at least two, at most 64."""
    return max(2, min(64, -(-5 * l2_bytes(device) // max(size, 1))))


def clock(forms: dict[str, Form], device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of each form on the device; forms take turns, each starts with the queue empty."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 2):
        for name, form in forms.items():
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize(device)
                begin.record()
                form()
                end.record()
                end.synchronize()
                took = begin.elapsed_time(end)
            else:
                start = time.perf_counter()
                form()
                took = (time.perf_counter() - start) * 1e3
            if turn >= 2:
                times[name].append(took)
    return {name: statistics.median(t) for name, t in times.items()}


def graph_clock(forms: dict[str, Sequence[Form]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of a call, where all calls of a form follow each other in one CUDA graph.

    Args:
        forms (`dict[str, Sequence[Form]]`): The calls of each form: the same over one cache after the other.
        device (`torch.device`): On a CPU the calls are simply made.
        rounds (`int`): How often each form has its turn.

    Returns:
        `dict[str, float]`: By form.
    """
    whole = {name: _replays(calls) if device.type == "cuda" else _all(calls) for name, calls in forms.items()}
    each = REPLAYS if device.type == "cuda" else 1
    return {name: ms / each / len(forms[name]) for name, ms in clock(whole, device, rounds).items()}


def _all(calls: Sequence[Form]) -> Form:
    return lambda: [call() for call in calls]


def _replays(calls: Sequence[Form]) -> Form:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are loaded before anything is captured
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return lambda: [graph.replay() for _ in range(REPLAYS)]


def host_microseconds(call: Form, device: torch.device) -> float:
    """What a call costs the host, the device's work not waited for; median of a few runs of many calls."""
    runs, calls = [], CALLS if device.type == "cuda" else 2
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        runs.append((time.perf_counter() - start) / calls * 1e6)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return statistics.median(runs)


def gpu_milliseconds(step: Form, device: torch.device, steps: int = 3) -> dict[str, object]:
    """The device's own time of a step, and the kernels that take most of it; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
    kernels = {
        event.key[:60]: event.self_device_time_total / steps / 1e3
        for event in profiled.key_averages()
        if event.self_device_time_total
    }
    most = sorted(kernels.items(), key=lambda each: -each[1])[:6]
    return {"gpu_ms": sum(kernels.values()), "gpu_ms_of": dict(most)}
