"""The quantiser's rule, in torch: the same codes as the native backends, bit for bit.

Per slot affine codes with an fp16 scale and offset, `x ~ code * scale + offset`; keys of tiers of at most 4 bits
are rotated by a blockwise Hadamard transform first, which spreads the outlier channels RoPE leaves behind
(QuaRot, arXiv 2404.00456; LeanKV's per-token groups, arXiv 2412.03131). The 2-bit range is shrunk about its
centre, which trades clipping for a finer step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["affine_parameters", "dequantize", "hadamard", "pack_codes", "quantize", "unpack_codes"]

FP16_MAX = 65504.0
TWO_BIT_SHRINK = 0.6


def hadamard(x: Tensor, block: int) -> Tensor:
    """Orthonormal Walsh-Hadamard transform (Sylvester order) of consecutive blocks of the last dimension.

    It is its own inverse. The order of additions is that of the native backends.

    Args:
        x: Floating point tensor `[..., dim]`.
        block: Size of a block, a power of two dividing `dim`.

    Returns:
        The transformed tensor, same shape and dtype.
    """
    shape = x.shape
    half = 1
    while half < block:
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), dim=-2)
        half *= 2
    return x.reshape(shape) * torch.full((), 1 / math.sqrt(block), dtype=x.dtype, device=x.device)


def affine_parameters(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and offset of each slot.

    Args:
        x: float32 `[..., dim]` without NaN (see `quantize`).
        bits: 8, 4 or 2.

    Returns:
        `(scale, offset, overflow)`: fp16, fp16 and bool, each `[...]`. `overflow` marks slots whose range or
        scale does not fit fp16 and was clamped.
    """
    low, high = x.amin(-1), x.amax(-1)
    if bits == 2:
        centre, half = low * 0.5 + high * 0.5, high * 0.5 - low * 0.5
        shrunk = half * TWO_BIT_SHRINK
        low, high = centre - shrunk, centre + shrunk
    scale = (high - low) / (2**bits - 1)
    # Written so that a NaN (from infinite inputs) counts as overflow and becomes 0.
    overflow = ~((low.abs() <= FP16_MAX) & (high.abs() <= FP16_MAX) & (scale <= FP16_MAX))
    scale = scale.nan_to_num(nan=0.0).clamp(0.0, FP16_MAX)
    offset = low.nan_to_num(nan=0.0).clamp(-FP16_MAX, FP16_MAX) + 0.0  # no negative zero
    return scale.half(), offset.half(), overflow


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Affine codes of each slot, rounding half to even.

    Args:
        x: float32 `[..., dim]`. NaN is stored as 0 and counted as overflow.
        bits: 8, 4 or 2.

    Returns:
        `(codes, scale, offset, overflow)`: uint8 `[..., dim]`, then as in `affine_parameters`.
    """
    nan = x.isnan()
    x = x.masked_fill(nan, 0.0)
    scale, offset, overflow = affine_parameters(x, bits)
    step = scale.float().unsqueeze(-1)
    codes = ((x - offset.float().unsqueeze(-1)) / step).clamp(0.0, 2.0**bits - 1).round()
    codes = torch.where(step > 0, codes, 0.0).to(torch.uint8)
    return codes, scale, offset, overflow | nan.any(-1)


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """`code * scale + offset` in float32.

    Args:
        codes: uint8 `[..., dim]`.
        scale: fp16 `[...]`.
        offset: fp16 `[...]`.

    Returns:
        The values that codes stand for, float32 `[..., dim]`.
    """
    return codes.float() * scale.float().unsqueeze(-1) + offset.float().unsqueeze(-1)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs codes into bytes in canonical order: the first code of a byte in its lowest bits.

    Args:
        codes: uint8 `[..., dim]`.
        bits: 8, 4 or 2.

    Returns:
        Codes side by side in bytes, uint8 `[..., dim * bits / 8]`.
    """
    per_byte = 8 // bits
    parts = codes.unflatten(-1, (-1, per_byte))
    packed = parts[..., 0]
    for i in range(1, per_byte):
        packed = packed | (parts[..., i] << (i * bits))
    return packed


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_codes`.

    Args:
        packed: uint8 `[..., n]`.
        bits: 8, 4 or 2.

    Returns:
        One code per element, uint8 `[..., n * 8 / bits]`.
    """
    mask = 2**bits - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1).flatten(-2)
