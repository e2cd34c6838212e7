"""What is asked of PyTorch for a CUDA graph, with stand-ins for its parts that need a GPU."""

from __future__ import annotations

import contextlib

import pytest
import torch

from kvcompress_hf.kernels.cuda.capture import CudaCapturer


class Graph:
    made: list[Graph]

    def __init__(self):
        self.replays, self.void = 0, False
        Graph.made.append(self)

    def pool(self):
        return (self, "pool")

    def replay(self):
        self.replays += 1


@pytest.fixture
def captures(monkeypatch):
    """What `torch.cuda.graph` was called with."""
    Graph.made, calls = [], []

    @contextlib.contextmanager
    def capture(graph, **options):
        calls.append(options)
        try:
            yield
        finally:
            if graph.void:
                raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream on {device}")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return calls


def test_graphs_follow_each_other_in_the_same_memory(captures):
    capturer = CudaCapturer(torch.device("cuda", 1))
    with pytest.raises(RuntimeError, match="nothing has been captured"):
        capturer.replay()
    assert capturer.capture(lambda: 1) == 1
    capturer.replay()
    assert capturer.capture(lambda: 2) == 2
    capturer.replay()
    capturer.replay()
    first, second = Graph.made
    assert (first.replays, second.replays) == (1, 2)
    assert [each["pool"] for each in captures] == [None, (first, "pool")]
    assert {each["stream"] for each in captures} == {"stream on cuda:1"}
    assert {each["capture_error_mode"] for each in captures} == {"thread_local"}


def test_the_error_is_that_of_what_stopped_it(captures):
    capturer = CudaCapturer(torch.device("cuda", 0))
    capturer.capture(lambda: None)

    def asks():
        Graph.made[-1].void = True
        raise ValueError("asked the device")

    with pytest.raises(ValueError, match="asked the device"):
        capturer.capture(asks)

    def spoils():
        Graph.made[-1].void = True

    with pytest.raises(RuntimeError, match="previous error during capture"):
        capturer.capture(spoils)
    capturer.replay()
    assert [graph.replays for graph in Graph.made] == [1, 0, 0]  # what there was can still be replayed
