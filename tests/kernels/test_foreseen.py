"""What native code foresees, against the same in torch."""

import pytest
import torch

from kvcompress_hf.kernels import CpuBackend, Rotation
from kvcompress_hf.kernels.cpu.backend import instruction_sets
from kvcompress_hf.observers.foreseen import Maps, mapped, maps_in_torch

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


def check_maps(native, query, key, rotation=None):
    rotation = rotation_of(key.shape[-1]) if rotation is None else rotation
    step = -(-(key.shape[2] - 1) // 512)
    found = Maps(*native.fit_maps(query, key, rotation, step, apart=4, ridge=0.1, gain=2.0))
    for each, wanted in zip(found, maps_in_torch(query, key, rotation, step), strict=True):
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


def test_maps_are_tried_on_pairs_left_out(native):
    query, key = states(601, (2, 1), 16)
    place = torch.arange(600)
    mapping = torch.randn(16, 16, generator=torch.Generator().manual_seed(2))
    wanted = rotation_of(16).turn(key[:, 0, 1:], -place - 1) @ mapping
    query[:, :, :600] = rotation_of(16).turn(wanted, place)[:, None]
    query[:, 1, 7:600:8] *= -1  # the pairs that are left out
    given = {"apart": 8, "ridge": 1e-4, "gain": 2.0}
    _, _, explained = native.fit_maps(query, key, rotation_of(16), 1, **given)
    torch.testing.assert_close(explained, torch.tensor([[1.0, -3.0]]), rtol=0.05, atol=0.0)  # twice as far off as long
    assert bool((native.fit_maps(query, key, rotation_of(16), 100, **given)[2] == 0).all())  # none is left out


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
    check_maps(native, query, key, rotation_of(width, start, interleaved))


def test_places_far_on_and_turns_the_other_way(native):
    query, key = states(3000, (1, 1), 16)
    check_foresee(native, query, key, Rotation(-rotation_of(16).inv_freq))
    check_maps(native, query, key, Rotation(-rotation_of(16).inv_freq))


def test_keys_in_any_layout(native):
    query, key = states(50, dtype=BF16)
    spread = torch.stack((key, key.flip(2)), 2).flatten(2, 3)[:, :, ::2].narrow(2, 0, 50)
    check_foresee(native, query.contiguous(), spread)
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


def test_wrong_arguments_of_maps_are_named(native):
    query, key = states(9)
    for name, given in {
        "query": (query[:, :, :8], key, rotation_of(64), 1, 8),
        "rotation": (query, key, rotation_of(32, 34), 1, 8),
        "two tokens": (query[:, :, :1], key[:, :, :1], rotation_of(64), 1, 8),
        "a step of one": (query, key, rotation_of(64), 0, 8),
        "one pair of two": (query, key, rotation_of(64), 1, 1),
    }.items():
        *first, apart = given
        with pytest.raises(ValueError, match=name):
            native.fit_maps(*first, apart=apart, ridge=0.1, gain=2.0)
