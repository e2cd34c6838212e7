"""What a decoding step asks of the host: nothing. Its launches can be recorded and replayed, as a CUDA graph does."""

from __future__ import annotations

import pytest
import torch

from kvcompress_hf.kernels import Logits
from kvcompress_hf.kernels.cuda import CudaBackend
from kvcompress_hf.kernels.host_shim import ShimLauncher


class Recorder(ShimLauncher):
    """While `recording`, keeps launches with their arguments instead of running them, like a captured stream."""

    def __init__(self, library, order):
        super().__init__(library, order)
        self.recording = False
        self.launches = []

    def capturing(self):
        return self.recording

    def launch(self, kernel, grid, block, arguments, device, cooperative=False):
        if self.recording:
            copies = tuple(type(a).from_buffer_copy(a) for a in arguments)
            self.launches.append((kernel, grid, block, copies, device, cooperative))
        else:
            super().launch(kernel, grid, block, arguments, device, cooperative)

    def replay(self):
        for launch in self.launches:
            super().launch(*launch)


@pytest.fixture(params=["ascending", "descending", "shuffled"])
def recorder(request, shim_library, monkeypatch):
    recorder, plain, pool = Recorder(shim_library, request.param), torch.empty, []

    def empty(*shape, **options):  # like a graph's own memory, what is made while recording stays
        tensor = plain(*shape, **options)
        if recorder.recording:
            pool.append(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty", empty)
    return recorder


@pytest.mark.parametrize("head_dim", [64, 80])
def test_a_captured_step_replays(make_twins, recorder, exact, close, head_dim):
    twins = make_twins(tiers=[(8, 4), (4, 2)], head_dim=head_dim, capacity=12)
    options = dict(logits=Logits(0.1, window=180), sum_field="sum", square_field="square", q_heads=8)
    plan = CudaBackend(recorder).plan_decode(twins.rows, twins.tail, **options)
    expected = exact.plan_decode(twins.expected_rows, twins.expected_tail, **options)
    static = [twins.randn(heads, 1).clone() for heads in (8, 2, 2)]

    def step(position, run):
        for x in static:
            x.copy_(torch.randn(x.shape, generator=twins.generator))
        close(run(), expected.run(*static, position), torch.float16)

    step(300, lambda: plan.run(*static, 300))
    recorder.recording = True
    out = plan.run(*static, 301)
    recorder.recording = False

    def replay():
        recorder.replay()
        return out

    for position in (301, 302, 303):
        step(position, replay)
    step(304, lambda: plan.run(*static, 304))  # and back to steps that are run
    step(305, replay)
    twins.assert_same_tail()
    for tier in range(2):
        for field in ("sum", "square"):
            got = CudaBackend(recorder).read_field(twins.rows, tier, field, 90)
            torch.testing.assert_close(
                got, exact.read_field(twins.expected_rows, tier, field, 90), rtol=2e-3, atol=1e-5
            )


def test_replays_beyond_the_tail_write_nothing(make_twins, recorder):
    twins = make_twins(capacity=8, tail_lengths=(5, 5))
    plan = CudaBackend(recorder).plan_decode(twins.rows, twins.tail, logits=Logits(0.1), q_heads=8)
    new = [twins.randn(heads, 1) for heads in (8, 2, 2)]
    plan.run(*new, 300)
    recorder.recording = True
    out = plan.run(*new, 301)  # kept: the replays write to it
    recorder.recording = False
    for _ in range(4):
        recorder.replay()
    assert twins.tail.lengths.tolist() == [8, 8] and torch.isfinite(out).all()
    with pytest.raises(ValueError, match="the tail is full"):
        plan.run(*new, 303)


def test_capturing_needs_a_step_before_it(make_twins, recorder):
    twins = make_twins()
    plan = CudaBackend(recorder).plan_decode(twins.rows, twins.tail, logits=Logits(0.1), q_heads=8)
    new = [twins.randn(heads, 1) for heads in (8, 2, 2)]
    recorder.recording = True
    with pytest.raises(RuntimeError, match="this one is at 300, the last known is 0: run a step first"):
        plan.run(*new, 300)
    recorder.recording = False
    plan.run(*new, 300)
    recorder.recording = True
    with pytest.raises(RuntimeError, match="this one is at 305"):
        plan.run(*new, 305)
    plan.run(*new, 301)
    with pytest.raises(RuntimeError, match="run a step first"):
        plan.run(*new, 302)


def test_a_plan_made_in_inference_mode_may_be_used_outside(make_twins, shim):
    twins = make_twins()
    with torch.inference_mode():
        plan = shim.plan_decode(twins.rows, twins.tail, logits=Logits(0.1), q_heads=8)
    new = [twins.randn(heads, 1) for heads in (8, 2, 2)]
    plan.run(*new, 300)
    plan.run(*new, 400)
    assert twins.tail.positions[:, :7].max() == 400
