"""The transform of values and of attention's output: the bits of the reference in every backend."""

from __future__ import annotations

import pytest
import torch

from kvcompress_hf.kernels.quantize import hadamard

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 96, 128, 256])
def test_the_reference_bit_for_bit(backend, head_dim, dtype):
    block = head_dim & -head_dim
    x = torch.randn(2, 5, 3, head_dim, generator=torch.Generator().manual_seed(head_dim)).to(dtype).transpose(1, 2)
    x[0, 0, 0, ::3] = 300.0
    got = backend.hadamard(x, block)
    assert torch.equal(got, hadamard(x.float(), block).to(dtype)) and got.is_contiguous()
    signs = torch.tensor([[1 - 2 * ((i & j).bit_count() % 2) for j in range(block)] for i in range(block)])
    exact = x.double().unflatten(-1, (-1, block)) @ signs.double() / block**0.5
    torch.testing.assert_close(got.double(), exact.flatten(-2), atol=1e-3, rtol=4 * torch.finfo(dtype).eps)
    assert backend.hadamard(x[:0], block).shape == (0, 3, 5, head_dim)
    many = x.repeat(1, 1, 40, 1)  # more than one thread's worth
    assert torch.equal(backend.hadamard(many, block), got.repeat(1, 1, 40, 1))


def test_infinity_and_nan_stay_in_their_block(backend):
    x = torch.ones(1, 1, 2, 48)
    x[0, 0, 0, 3], x[0, 0, 1, 17] = float("inf"), float("nan")
    got = backend.hadamard(x, 16)[0, 0].view(2, 3, 16)
    assert not got[0, 0].isfinite().any() and got[1, 1].isnan().all()
    assert got[0, 1:].isfinite().all() and got[1, ::2].isfinite().all()


@pytest.mark.parametrize(
    ("x", "block", "message"),
    [
        (
            torch.zeros(1, 1, 1, 48),
            32,
            "block must be a power of two of at least 16 that divides head_dim.*got 32 for 48",
        ),
        (torch.zeros(1, 1, 1, 48), 24, "got 24 for 48"),
        (torch.zeros(1, 1, 1, 64), 8, "got 8 for 64"),
        (torch.zeros(1, 1, 1, 512), 512, "got 512 for 512"),
        (torch.zeros(1, 1, 64), 64, "x must have shape"),
        (torch.zeros(1, 1, 64, 16).transpose(2, 3), 64, "contiguous in its last dimension"),
        (torch.zeros(1, 1, 1, 64, dtype=torch.float64), 64, "x must be one of"),
    ],
)
def test_mistakes_are_named(backend, x, block, message):
    with pytest.raises(ValueError, match=message):
        backend.hadamard(x, block)
