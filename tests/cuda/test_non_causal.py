"""The second look as one CUDA kernel: every shape against the reference in float64, and what other shapes get."""

from __future__ import annotations

import math
import re

import pytest
import torch

from kvcompress_hf.kernels import Logits, Rotation
from kvcompress_hf.kernels.backend import Backend
from kvcompress_hf.kernels.cuda import CudaBackend, NvrtcError
from kvcompress_hf.kernels.cuda.non_causal import KvcTurns
from kvcompress_hf.kernels.host_shim import ORDERS, ShimLauncher, shim_backend

F16, BF16 = torch.float16, torch.bfloat16
#: Of all scores together. An element of a turned query halfway between two 16-bit numbers may be rounded to the other.
ERROR = 2e-4


def rotation(head_dim: int, base: float = 10000.0) -> Rotation:
    return Rotation(base ** -(torch.arange(0, head_dim, 2) / head_dim))


def states(head_dim, dtype, n, group=1, *, kv_heads=2, batch=2, spread=1.0):
    """Queries and keys as transformers makes them: transposed views, not contiguous."""
    g = torch.Generator().manual_seed(n)
    q, k = (torch.randn(batch, n, heads, head_dim, generator=g) for heads in (kv_heads * group, kv_heads))
    return (spread * q).to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2)


def compare(backend, exact, q, k, turns, valid=None, **logits):
    asked = dict(logits=Logits(q.shape[-1] ** -0.5, **logits), rotation=turns, valid=valid)
    found, expected = (each.non_causal_scores(q, k, **asked) for each in (backend, exact))
    assert found.dtype == torch.float32 and found.shape == q.shape[:3]
    assert (found - expected).norm() <= ERROR * expected.norm()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-6)
    assert torch.equal(found == 0, expected == 0)
    return found


@pytest.fixture
def no_torch(monkeypatch):
    """The plain torch form, which must not be needed."""
    monkeypatch.setattr(Backend, "non_causal_scores", None)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group, n", [(1, 1), (2, 3), (3, 17), (1, 64), (4, 33), (5, 129), (8, 50)])
def test_shapes(backend, exact, no_torch, group, n, head_dim, dtype):
    q, k = states(head_dim, dtype, n, group, kv_heads=1 + n % 2)
    compare(backend, exact, q, k, rotation(head_dim))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_longer_prompt_of_which_a_sample_stands_for_most(shim, exact, no_torch, head_dim):
    q, k = states(head_dim, F16, 1203, batch=1, spread=3.0)
    compare(shim, exact, q, k, rotation(head_dim, 1e6))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sums_do_not_depend_on_the_order_of_threads(shim_library, no_torch, head_dim):
    q, k = states(head_dim, F16, 90, 3)
    asked = dict(logits=Logits(0.1), rotation=rotation(head_dim))
    first, *others = (shim_backend(shim_library, order).non_causal_scores(q, k, **asked) for order in ORDERS)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"softcap": 30.0}, {"sinks": torch.linspace(-3, 9, 6)}], ids=str)
@pytest.mark.parametrize("head_dim, dtype", [(64, BF16), (128, F16), (256, BF16)])
def test_how_logits_are_made(shim, exact, no_torch, head_dim, dtype, options):
    q, k = states(head_dim, dtype, 140, 3, spread=4.0)
    compare(shim, exact, q, k, rotation(head_dim), **options)


@pytest.mark.parametrize("padding", [(0, 0), (61, 0), (0, 61), (117, 0), (0, 113)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_padding_changes_nothing(shim, exact, no_torch, head_dim, padding):
    q, k = states(head_dim, F16, 120, 2)
    before, behind = padding
    real = slice(before, 120 - behind)
    valid = torch.ones(2, 120, dtype=torch.bool)
    valid[1, :before] = valid[1, 120 - behind :] = False
    for x in (q, k):
        x[1].masked_fill_(~valid[1, :, None], torch.nan)
    found = compare(shim, exact, q, k, rotation(head_dim), valid)
    alone = shim.non_causal_scores(
        q[1:, :, real], k[1:, :, real], logits=Logits(head_dim**-0.5), rotation=rotation(head_dim)
    )
    torch.testing.assert_close(found[1:, :, real], alone, rtol=1e-4, atol=1e-6)


TURNED_BEFORE = {
    "a part of the channels": lambda d: Rotation(100.0 ** -(torch.arange(0, 24, 2) / 24), start=8),
    "neighbours": lambda d: Rotation(rotation(d).inv_freq, interleaved=True),
    "the other way": lambda d: Rotation(-rotation(d).inv_freq[: d // 4], start=d // 2),
}


@pytest.mark.parametrize("head_dim, dtype", [(64, F16), (128, BF16), (256, F16)])
@pytest.mark.parametrize("kind", TURNED_BEFORE)
def test_other_rotations_are_turned_before(shim, exact, no_torch, monkeypatch, kind, head_dim, dtype):
    monkeypatch.setattr("kvcompress_hf.kernels.cuda.non_causal.TURNED_AT_ONCE", 40 * 12 * head_dim)  # three parts
    q, k = states(head_dim, dtype, 100, 3)
    valid = torch.ones(2, 100, dtype=torch.bool)
    valid[0, :37] = False
    for mask in (None, valid):
        compare(shim, exact, q, k, TURNED_BEFORE[kind](head_dim), mask)


def test_position_may_turn_nothing(shim, exact, no_torch):
    q, k = states(128, F16, 100, 2)
    compare(shim, exact, q, k, Rotation(torch.zeros(0)))


def test_states_may_lie_anywhere(shim, exact, no_torch):
    q, k = states(64, F16, 50, 2)
    ragged = torch.randn(2, 4, 50, 65).half()[..., 1:]
    compare(shim, exact, ragged, k, rotation(64))
    compare(shim, exact, q[:1].expand(2, -1, -1, -1), k[:1].expand(2, -1, -1, -1), rotation(64))


def test_there_may_be_nothing_to_look_at(shim):
    q, k = states(64, F16, 5)
    for part in ((slice(0), slice(None)), (slice(None), slice(None), slice(0))):
        found = shim.non_causal_scores(q[part], k[part], logits=Logits(0.1), rotation=rotation(64))
        assert found.shape == q[part].shape[:3] and found.dtype == torch.float32
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    assert not shim.non_causal_scores(q, k, logits=Logits(0.1), rotation=rotation(64), valid=hidden).any()


def test_turns_are_exact_at_any_position():
    inv_freq = torch.cat([rotation(128, 5e5).inv_freq, -rotation(64).inv_freq])
    steps = KvcTurns.of(inv_freq).step[:96]
    for by in (1, 4095, 1_000_003, 11_000_000):
        for step, frequency in zip(steps, inv_freq.double().tolist(), strict=True):
            turn = (step * by % 2**64) / 2**64 * 2 * math.pi
            assert abs(math.remainder(turn - by * frequency, 2 * math.pi)) < 1e-8


@pytest.mark.parametrize(
    "dtype, head_dim, scale, error",
    [(torch.float32, 64, 0.1, 1e-5), (F16, 80, 0.1, 3e-3), (BF16, 32, 0.2, 2e-2), (F16, 64, -0.1, 3e-3)],
)
def test_other_shapes_are_torch_in_the_dtype_of_the_queries(shim, exact, monkeypatch, dtype, head_dim, scale, error):
    monkeypatch.setattr(ShimLauncher, "launch", None)
    q, k = states(head_dim, dtype, 150, 3)
    valid = torch.ones(2, 150, dtype=torch.bool)
    valid[1, :60] = False
    asked = dict(logits=Logits(scale), rotation=rotation(head_dim), valid=valid)
    found, expected = (each.non_causal_scores(q, k, **asked) for each in (shim, exact))
    assert found.dtype == torch.float32 and not found[1, :, :60].any()
    assert (found - expected).norm() <= error * expected.norm()
    with pytest.raises(ValueError, match="head_dim must be a multiple of 16"):
        shim.non_causal_scores(q[..., :24], k[..., :24], **asked)


def test_without_device_code_torch_does_it(shim_library, exact):
    class Refused(ShimLauncher):
        def launch(self, kernel, grid, block, arguments, device, cooperative=False):
            raise NvrtcError("NVRTC was not found")

    q, k = states(64, F16, 70)
    asked = dict(logits=Logits(0.1), rotation=rotation(64))
    with pytest.warns(UserWarning, match=re.escape("in plain torch, which is slow; NVRTC was not found")):
        found = CudaBackend(Refused(shim_library)).non_causal_scores(q, k, **asked)
    expected = exact.non_causal_scores(q, k, **asked)
    assert (found - expected).norm() <= 3e-3 * expected.norm()
