"""What native code foresees, against the same in torch."""

import pytest
import torch

from kvcompress_hf.kernels import CpuBackend, Logits, Rotation
from kvcompress_hf.kernels.cpu.backend import instruction_sets
from kvcompress_hf.observers.foreseen import mapped, maps_in_torch, pair_weights_in_torch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(params=instruction_sets())
def native(request):
    return CpuBackend(request.param).plans


def rotation_of(width, start=0, interleaved=False):
    return Rotation(1 / 10000.0 ** (torch.arange(0, width, 2) / max(width, 1)), start, interleaved)


def states(tokens, heads=(6, 2), dim=64, dtype=F32, batch=1):
    """Queries and keys as models make them: the heads of a token beside each other."""
    g = torch.Generator().manual_seed(tokens + dim)
    return [torch.randn(batch, tokens, n, dim, generator=g).to(dtype).transpose(1, 2) for n in heads]


def check_foresee(native, query, key, rotation=None):
    batch, q_heads, _, dim = query.shape
    rotation = rotation_of(dim) if rotation is None else rotation
    g = torch.Generator().manual_seed(0)
    mapping = torch.randn(batch, q_heads, dim, dim, generator=g) / dim**0.5
    offset = torch.randn(batch, q_heads, dim, generator=g)
    found = native.foresee(query, key, mapping, offset, rotation)
    assert found.dtype is query.dtype and found.shape == query.shape and torch.equal(found[:, :, -1], query[:, :, -1])
    exact = mapped(query.float(), key.float(), mapping, offset, rotation)
    error = (found.float() - exact).abs()
    # 16-bit results are rounded, and with bfloat16 keys and maps may be.
    tolerance = {F32: 1e-5, F16: 1e-3, BF16: 1.5e-2}[query.dtype]
    assert bool((error <= tolerance * (1 + exact.abs())).all())
    in_torch = (mapped(query, key, mapping, offset, rotation).float() - exact).abs().mean()
    assert error.mean() <= 1.05 * in_torch + 1e-6  # no worse than torch in the same dtype


def check_weights(native, query, key, rotation=None, softcap=None):
    rotation = rotation_of(key.shape[-1]) if rotation is None else rotation
    logits = Logits(key.shape[-1] ** -0.5, softcap)
    step, stride = -(-(key.shape[2] - 1) // 512), -(-key.shape[2] // 64)
    found = native.pair_weights(query, key, logits, rotation, step, stride)
    expected = pair_weights_in_torch(query, key, logits=logits, rotation=rotation).flatten(1, 2)
    # With bfloat16, turned queries may be rounded, a 500th, which is what that adds to logits of a few units.
    torch.testing.assert_close(found, expected, rtol=2e-2 if query.dtype is BF16 else 2e-4, atol=1e-9)


def check_maps(native, query, key, rotation=None):
    (batch, q_heads, tokens, dim), kv_heads = query.shape, key.shape[1]
    rotation = rotation_of(dim) if rotation is None else rotation
    step = -(-(tokens - 1) // 512)
    weight = (
        torch.rand(batch, q_heads, len(range(0, tokens - 1, step)), generator=torch.Generator().manual_seed(1)) ** 4
    )
    weight = weight / weight.sum(-1, keepdim=True)
    found = native.fit_maps(query, key, weight, rotation, step, 0.01)
    expected = maps_in_torch(query, key, weight.unflatten(1, (kv_heads, -1)), rotation)
    for each, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(each, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().amax()))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(
    ("tokens", "heads", "dim"),
    [(2, (2, 1), 16), (3, (2, 2), 16), (65, (6, 2), 64), (600, (3, 1), 80), (1100, (4, 4), 128), (40, (2, 1), 256)],
)
def test_maps_are_those_of_torch(native, dtype, tokens, heads, dim):
    query, key = states(tokens, heads, dim, dtype, batch=2)
    check_maps(native, query, key)
    key[:, -1, :, 5] += 100  # as the biases of some models do
    check_maps(native, query, key)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("tokens", "heads", "dim"),
    [(2, (2, 1), 16), (3, (2, 2), 16), (65, (6, 2), 64), (600, (3, 1), 80), (1100, (4, 4), 128), (40, (5, 1), 256)],
)
def test_weights_are_those_of_torch(native, dtype, softcap, tokens, heads, dim):
    check_weights(native, *states(tokens, heads, dim, dtype, batch=2), softcap=softcap)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(
    ("tokens", "heads", "dim"),
    [(1, (2, 1), 16), (2, (2, 2), 16), (33, (6, 2), 64), (100, (3, 1), 80), (66, (4, 4), 128), (40, (5, 1), 256)],
)
def test_foreseen_queries_are_those_of_torch(native, dtype, tokens, heads, dim):
    check_foresee(native, *states(tokens, heads, dim, dtype, batch=2))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "start"), [(64, 0), (32, 0), (20, 7), (36, 28), (0, 0)])
def test_rotations(native, dtype, interleaved, width, start):
    query, key = states(70, dtype=dtype)
    check_foresee(native, query, key, rotation_of(width, start, interleaved))
    check_weights(native, query, key, rotation_of(width, start, interleaved))
    check_maps(native, query, key, rotation_of(width, start, interleaved))


def test_places_far_on_and_turns_the_other_way(native):
    query, key = states(3000, (1, 1), 16)
    check_foresee(native, query, key, Rotation(-rotation_of(16).inv_freq))
    check_weights(native, query, key, Rotation(-rotation_of(16).inv_freq))
    check_maps(native, query, key, Rotation(-rotation_of(16).inv_freq))


def test_keys_in_any_layout(native):
    query, key = states(50, dtype=BF16)
    spread = torch.stack((key, key.flip(2)), 2).flatten(2, 3)[:, :, ::2].narrow(2, 0, 50)
    check_foresee(native, query.contiguous(), spread)
    check_weights(native, query.contiguous(), spread)
    check_maps(native, query.contiguous(), spread)


def test_wrong_arguments_of_foresee_are_named(native):
    query, key = states(9)
    mapping, offset = torch.zeros(1, 6, 64, 64), torch.zeros(1, 6, 64)
    for name, given in {
        "query": (query[:, :, :8], key, mapping, offset, rotation_of(64)),
        "mapping": (query, key, mapping[:, :5], offset, rotation_of(64)),
        "offset": (query, key, mapping, offset.double(), rotation_of(64)),
        "rotation": (query, key, mapping, offset, rotation_of(32, 34)),
        "a token": (query[:, :, :0], key[:, :, :0], mapping, offset, rotation_of(64)),
    }.items():
        with pytest.raises(ValueError, match=name):
            native.foresee(*given)


def test_wrong_arguments_of_weights_are_named(native):
    query, key = states(9)
    for name, given in {
        "query": (query[:, :, :8], key, Logits(1.0), rotation_of(64), 1, 1),
        "rotation": (query, key, Logits(1.0), rotation_of(32, 34), 1, 1),
        "two tokens": (query[:, :, :1], key[:, :, :1], Logits(1.0), rotation_of(64), 1, 1),
        "steps": (query, key, Logits(1.0), rotation_of(64), 1, 0),
    }.items():
        with pytest.raises(ValueError, match=name):
            native.pair_weights(*given)


def test_wrong_arguments_of_maps_are_named(native):
    query, key = states(9)
    weight = torch.ones(1, 6, 8) / 8
    for name, given in {
        "query": (query[:, :, :8], key, weight, rotation_of(64), 1, 0.01),
        "weight": (query, key, weight, rotation_of(64), 2, 0.01),
        "rotation": (query, key, weight, rotation_of(32, 34), 1, 0.01),
        "two tokens": (query[:, :, :1], key[:, :, :1], weight, rotation_of(64), 1, 0.01),
    }.items():
        with pytest.raises(ValueError, match=name):
            native.fit_maps(*given)
