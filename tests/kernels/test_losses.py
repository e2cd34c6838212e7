"""What native code finds quantising to lose, and what it takes off keys, against the same in torch."""

import pytest
import torch

from kvcompress_hf.kernels import CpuBackend
from kvcompress_hf.kernels.cpu.backend import instruction_sets
from kvcompress_hf.paging.key_shift import gains, steady_mean
from kvcompress_hf.plans.distortion import in_torch

TIERS = [(0, 0), (8, 4), (4, 4), (4, 2)]


@pytest.fixture(params=instruction_sets())
def native(request):
    return CpuBackend(request.param).plans


def states(batch, heads, tokens, dim, dtype, seed, laid_out="apart"):
    """Random vectors; `beside`: as models make them, the heads of a token beside each other."""
    g = torch.Generator().manual_seed(seed)
    if laid_out == "beside":
        return torch.randn(batch, tokens, heads, dim, generator=g).to(dtype).transpose(1, 2)
    return torch.randn(batch, heads, tokens, dim, generator=g).to(dtype)


@pytest.mark.parametrize(
    ("tokens", "dim", "group", "bits", "dtype"),
    [
        (300, 64, 3, 4, torch.bfloat16),
        (2100, 32, 2, 4, torch.bfloat16),
        (1025, 48, 1, 8, torch.float16),
        (97, 128, 4, 4, torch.float32),
        (40, 16, 5, 2, torch.float32),
        (16, 256, 2, 8, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_the_shift_is_that_of_torch(native, tokens, dim, group, bits, dtype, padded):
    heads = 4
    keys = states(2, heads, tokens, dim, torch.float32, tokens, "beside")
    keys[:, 1:, :, 3] += torch.tensor([5.0, 30.0, 120.0])[:, None]  # the first head has little to gain
    keys[:, 3, :, 5] -= 60.0
    query = (states(2, heads * group, min(40, tokens), dim, dtype, 1) / 4).to(dtype)
    real = torch.ones(2, tokens, dtype=torch.bool)
    if padded:
        real[0, : tokens // 3] = False
        keys.transpose(1, 2)[~real] = torch.nan
    keys = keys.to(dtype)
    mean = steady_mean(keys, real)
    gain = gains(keys, mean, query, real, bits)
    if tokens > 16:
        assert gain.any() and not gain.all()
    found = native.key_shift(keys, query, real if padded else None, bits, 0.9 if bits <= 4 else 0.25)
    assert found.dtype is dtype and torch.equal(found.any(-1, keepdim=True), gain & mean.any(-1, keepdim=True))
    torch.testing.assert_close(found, torch.where(gain, mean, 0.0), rtol=2**-7, atol=1e-3)  # the order of additions


def test_no_token_and_few_tokens_are_not_centred(native):
    keys, query = states(2, 1, 20, 32, torch.float32, 0) + 50, states(2, 2, 20, 32, torch.float32, 1)
    real = torch.zeros(2, 20, dtype=torch.bool)
    real[1, -15:] = True
    assert not native.key_shift(keys, query, real, 4, 0.9).any()
    real[1, -16:] = True
    assert native.key_shift(keys, query, real, 4, 0.9)[1].any()


@pytest.mark.parametrize("tokens", [1, 5, 100, 300])
@pytest.mark.parametrize(
    ("dim", "group", "dtype"), [(64, 3, torch.bfloat16), (128, 1, torch.float16), (48, 6, torch.float32)]
)
def test_losses_are_those_of_torch(native, tokens, dim, group, dtype):
    keys, values = (states(3, 2, tokens, dim, dtype, seed, "beside") for seed in (0, 1))
    query = states(3, 2 * group, tokens, dim, dtype, 2, "beside")
    padding = torch.tensor([0, tokens // 2, tokens])
    expected = in_torch(query, keys, values, dim**-0.5, TIERS, padding)
    found = native.tier_losses(query, keys, values, dim**-0.5, TIERS, padding)
    assert found[2].isnan().all() and not found[:2].isnan().any() and (found[:2, :, 0] == 0).all()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6, equal_nan=True)
    whole = native.tier_losses(query, keys, values, dim**-0.5, TIERS)
    torch.testing.assert_close(whole[:1], found[:1], rtol=0, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_leaves_its_range_is_as_bad_as_evicting(native, bad):
    keys, values, query = (states(1, 2, 50, 32, torch.float32, seed) for seed in range(3))
    keys[0, 1, -1, 3] = bad
    found = native.tier_losses(query, keys, values, 1.0, TIERS)
    assert (found[0, 1, 1:] == 1).all() and (found[0, 0] < 1).all()


def test_wrong_arguments_are_named(native):
    keys, values, query = (states(1, 2, 50, 32, torch.float32, seed) for seed in range(3))
    with pytest.raises(ValueError, match="query"):
        native.tier_losses(query[:, :, :9], keys, values, 1.0, TIERS)
    with pytest.raises(ValueError, match="head_dim"):
        native.key_shift(keys[..., :24], query[..., :24], None, 4, 0.9)
    with pytest.raises(ValueError, match="no more queries"):
        native.key_shift(keys[:, :, :9], query, None, 4, 0.9)
    with pytest.raises(ValueError, match="bits"):
        native.key_shift(keys, query, None, 3, 0.9)
    with pytest.raises(ValueError, match="valid"):
        native.key_shift(keys, query, torch.ones(1, 9, dtype=torch.bool), 4, 0.9)
