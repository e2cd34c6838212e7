"""non_causal_scores of every instruction set against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from kvcompress_hf.kernels import CpuBackend, Logits, ReferenceBackend, Rotation, non_causal

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def states(tokens, heads=(6, 2), head_dim=64, dtype=F32, batch=1, seed=0):
    """Queries and keys as transformers makes them: transposed views, not contiguous."""
    g = torch.Generator().manual_seed(seed)
    parts = [torch.randn(batch, tokens, n, head_dim, generator=g) for n in heads]
    return [(1.5 * part).to(dtype).transpose(1, 2) for part in parts]


def rotation_of(width, start=0, interleaved=False):
    return Rotation(1 / 10000.0 ** (torch.arange(0, width, 2) / width), start, interleaved)


def check(backend, exact, q, k, rotation=None, valid=None, **made):
    rotation = rotation_of(q.shape[-1]) if rotation is None else rotation
    asked = dict(logits=Logits(q.shape[-1] ** -0.5, **made), rotation=rotation, valid=valid)
    found, expected = (each.non_causal_scores(q, k, **asked) for each in (backend, exact))
    assert found.dtype == F32 and found.shape == (q.shape[0], q.shape[1], q.shape[2])
    # A turned query is rounded to its dtype; where it lies between two numbers, the last bit of a cosine decides which.
    error = {F32: 2e-5, F16: 1e-4, BF16: 8e-4}[q.dtype]
    torch.testing.assert_close(found, expected, rtol=10 * error, atol=1e-8)
    assert (found - expected).norm() <= error * expected.norm()
    return found


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("group, head_dim", [(1, 32), (3, 64), (4, 128), (8, 256), (5, 48), (2, 16)])
def test_shapes(backend, exact, group, head_dim, dtype):
    check(backend, exact, *states(150, (2 * group, 2), head_dim, dtype))


@pytest.mark.parametrize("tokens", [1, 3, 5, 15, 16, 17, 32, 33, 48, 64, 100, 257])
def test_lengths(backend, exact, tokens):
    """Whatever of the sinks, the sample and the blocks there is."""
    found = check(backend, exact, *states(tokens))
    assert (found > 0).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "width, start, interleaved", [(64, 0, True), (12, 0, False), (40, 8, False), (24, 40, True), (0, 0, False)]
)
def test_rotations(backend, exact, width, start, interleaved, dtype):
    check(backend, exact, *states(120, dtype=dtype), rotation=rotation_of(width, start, interleaved))


def test_the_other_way_round_and_not_contiguous(backend, exact):
    inv_freq = torch.stack([-rotation_of(64).inv_freq, torch.zeros(32)], 1)[:, 0]
    check(backend, exact, *states(90), rotation=Rotation(inv_freq))


@pytest.mark.parametrize("made", [{"softcap": 3.0}, {"sinks": torch.linspace(-3, 4, 6)}, {"window": 20}])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_how_logits_are_made(backend, exact, made, dtype):
    check(backend, exact, *states(110, dtype=dtype), **made)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_padding(backend, exact, dtype):
    q, k = states(140, batch=5, dtype=dtype)
    valid = torch.ones(5, 140, dtype=torch.bool)
    valid[0, :37] = valid[1, 100:] = valid[2, :138] = valid[3] = False
    for x in (q, k):
        x.transpose(1, 2)[~valid] = torch.nan
    found = check(backend, exact, q, k, valid=valid)
    assert not found.transpose(1, 2)[~valid].any() and found.transpose(1, 2)[valid].all()
    for row, real in enumerate((slice(37, None), slice(0, 100))):
        alone = check(backend, exact, q[row : row + 1, :, real], k[row : row + 1, :, real])
        torch.testing.assert_close(
            found[row : row + 1, :, real], alone, rtol=2e-2 if dtype == BF16 else 1e-4, atol=1e-7
        )


def test_large_logits_stay_finite(backend, exact):
    q, k = states(80)
    found = check(backend, exact, 40 * q, 40 * k)
    assert found.max() <= 33 + 1e-3


def test_nan_shows(backend):
    q, k = states(96)
    q[0, 0, 40] = torch.nan
    found = backend.non_causal_scores(q, k, logits=Logits(0.125), rotation=rotation_of(64))
    near = (torch.arange(96) - 40).abs() <= 16
    assert found[0, 0, near].isnan().all() and found[0, 0, 64:].isfinite().all() and found[0, 1:].isfinite().all()


def test_threads_change_nothing(threads):
    q, k = states(700, dtype=BF16, batch=2)
    one = CpuBackend().non_causal_scores(q[:1], k[:1], logits=Logits(0.125), rotation=rotation_of(64))
    both = CpuBackend().non_causal_scores(q, k, logits=Logits(0.125), rotation=rotation_of(64))
    torch.set_num_threads(1)
    assert torch.equal(both[:1], one)
    assert torch.equal(both, CpuBackend().non_causal_scores(q, k, logits=Logits(0.125), rotation=rotation_of(64)))


@pytest.mark.parametrize("shape", [(0, 4, 5), (1, 4, 0)])
def test_nothing(backend, shape):
    batch, heads, tokens = shape
    q, k = torch.zeros(batch, heads, tokens, 32), torch.zeros(batch, 2, tokens, 32)
    assert backend.non_causal_scores(q, k, logits=Logits(1.0), rotation=rotation_of(32)).shape == shape


def test_the_reference_does_not_depend_on_how_much_is_worked_on_at_once(monkeypatch, exact):
    q, k = states(300)
    asked = dict(logits=Logits(0.125), rotation=rotation_of(64))
    whole = exact.non_causal_scores(q, k, **asked)
    monkeypatch.setattr(non_causal, "_NUMBERS", {"cpu": 1})
    torch.testing.assert_close(exact.non_causal_scores(q, k, **asked), whole)


@pytest.mark.parametrize("which", ["cpu", "reference"])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": torch.zeros(1, 4, 9, 32)}, "q must have shape"),
        ({"q": torch.zeros(1, 3, 8, 32)}, "q_heads must be a multiple"),
        ({"q": torch.zeros(1, 4, 8, 32, dtype=BF16)}, "q must be torch.float32"),
        ({"k_new": torch.zeros(1, 2, 8, 32, dtype=torch.float64)}, "k_new must be"),
        ({"q": torch.zeros(1, 4, 8, 24), "k_new": torch.zeros(1, 2, 8, 24)}, "head_dim must be a multiple of 16"),
        ({"rotation": rotation_of(34)}, "rotation must turn channels of 0 to 31"),
        ({"rotation": rotation_of(32, 2)}, "rotation must turn channels of 0 to 31"),
        ({"rotation": Rotation(torch.zeros(4, dtype=torch.float64))}, "inv_freq must be torch.float32"),
        ({"logits": Logits(1.0, softcap=-1.0)}, "softcap must be positive"),
        ({"logits": Logits(1.0, sinks=torch.zeros(3))}, "sinks must have shape"),
        ({"valid": torch.ones(1, 7, dtype=torch.bool)}, "valid must have shape"),
    ],
)
def test_mistakes_are_named(which, changes, message):
    backend = CpuBackend() if which == "cpu" else ReferenceBackend()
    right = dict(
        q=torch.zeros(1, 4, 8, 32), k_new=torch.zeros(1, 2, 8, 32), logits=Logits(1.0), rotation=rotation_of(32)
    )
    given = {**right, **changes}
    with pytest.raises(ValueError, match=message):
        backend.non_causal_scores(given.pop("q"), given.pop("k_new"), **given)
