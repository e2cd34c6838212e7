"""What is taken off the keys of a head: steady offsets, and nothing that turns, is noise, or comes from padding."""

import pytest
import torch

from kvcompress_hf.kernels.quantize import dequantize, hadamard, quantize
from kvcompress_hf.paging.key_shift import gains, steady_mean


def noise(tokens, batch=2, heads=3, dim=8, seed=0):
    return torch.randn(batch, heads, tokens, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [64, 1000, 5000])
def test_a_steady_offset_is_found_up_to_its_uncertainty(dtype, tokens):
    keys = noise(tokens)
    keys[..., 3] += 12
    keys[..., 5] -= 7
    shift = steady_mean(keys.to(dtype))
    assert shift.shape == (2, 3, 1, 8) and shift.dtype == dtype
    slack = 6 / (tokens / 4) ** 0.5 + 0.1  # three standard errors of a quarter's mean, to either side, and rounding
    assert ((shift[..., 3].float() - 12).abs() < slack).all() and ((shift[..., 5].float() + 7).abs() < slack).all()
    rest = shift[..., [0, 1, 2, 4, 6, 7]].float().abs()
    assert rest.max() < 0.2  # the mean of noise is less certain than it is large
    assert (rest == 0).float().mean() > 0.8


def test_an_offset_that_turns_is_left_alone():
    angle = torch.arange(1000) / 1000 * 2 * torch.pi
    keys = 0.1 * noise(1000)
    keys[..., 0] += 10 * angle.cos()
    keys[..., 4] += 10 * angle.sin() + 2  # its mean is 2, but its quarters do not agree
    assert steady_mean(keys)[..., [0, 4]].abs().max() == 0


def test_padding_counts_for_nothing():
    short, long = noise(100, batch=1) + 3, noise(260, batch=1, seed=1) - 5
    both = torch.cat([torch.nn.functional.pad(short, (0, 0, 160, 0), value=torch.nan), long])
    real = torch.ones(2, 260, dtype=torch.bool)
    real[0, :160] = False
    shift = steady_mean(both, real)
    assert torch.equal(shift[:1], steady_mean(short)) and torch.equal(shift[1:], steady_mean(long))
    assert shift[0].max() > 1 and shift[1].min() < -3


@pytest.mark.parametrize(("tokens", "decided"), [(1, False), (15, False), (16, True)])
def test_few_tokens_say_nothing(tokens, decided):
    assert bool((steady_mean(noise(tokens) + 50) != 0).any()) is decided


def gains_by_hand(keys, shift, query, real, bits):
    """Of one head, in float64: the squared error of the logits with the shift taken off, over that without."""
    block = keys.shape[-1] & -keys.shape[-1]
    probability = (query @ keys[real].T).softmax(-1)
    errors = []
    for states in (keys[real] - shift, keys[real]):
        turned = hadamard(states, block) if bits <= 4 else states
        codes, scale, offset, _ = quantize(turned.float(), bits)
        stored = dequantize(codes, scale, offset).double()
        off = query @ ((hadamard(stored, block) if bits <= 4 else stored) - states).T
        off = off - (off * probability).sum(-1, keepdim=True)
        errors.append((off.square() * probability).sum())
    return errors[0] / errors[1]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("padding", [0, 70])
def test_heads_are_centred_where_the_last_queries_gain(bits, padding):
    heads, group, dim = 4, 2, 32
    keys = noise(300, heads=heads, dim=dim)
    keys[:, 1:, :, 3] += torch.tensor([5.0, 30.0, 120.0])[:, None]  # the first head has nothing to gain
    query = noise(40, heads=heads * group, dim=dim, seed=1) / 4
    shift = steady_mean(keys)
    shift[0] = 9.0  # a wrong one gains nothing
    real = torch.ones(2, 300, dtype=torch.bool)
    real[1, :padding] = False
    keys[~real[:, None].expand(2, heads, 300)] = torch.nan
    found = gains(keys, shift, query, real if padding else None, bits)
    assert found.shape == (2, heads, 1, 1)
    most = 0.9 if bits <= 4 else 0.25
    seen = set()
    for b in range(2):
        for head in range(heads):
            own = query[b, head * group : (head + 1) * group, -32:].reshape(-1, dim).double()
            ratio = gains_by_hand(keys[b, head].double(), shift[b, head].double(), own, real[b], bits)
            assert not 0.97 < ratio / most < 1.03, "too close to tell"
            assert bool(found[b, head]) is bool(ratio < most)
            seen.add(bool(found[b, head]))
    assert seen == {True, False}
