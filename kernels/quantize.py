"""The quantiser's rule, in torch: the same codes as the native backends, bit for bit.

Per slot affine codes with an fp16 scale and offset, `x ~ code * scale + offset`; keys of tiers of at most 4 bits
are rotated by a blockwise Hadamard transform first, which spreads the outlier channels RoPE leaves behind
(QuaRot, arXiv 2404.00456; LeanKV's per-token groups, arXiv 2412.03131), and may be rounded one channel after the
other, see `quantize`. The 2-bit range is shrunk about its centre, which trades clipping for a finer step. The shrinkage
of least squared error, to 0.6, makes what comes back shorter than it was, and a model's predictions several times worse
than no shrinkage at all does. So the range is shrunk less, and values are looked up in one a little narrower than what
their codes stand for, so that they come back no shorter than they were (docs/real_models.md). These shares are
for values that come rotated: who stores 2-bit values rotates all, and attention's output back (`Backend.hadamard`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["affine_parameters", "dequantize", "hadamard", "pack_codes", "quantize", "unpack_codes"]

FP16_MAX = 65504.0
TWO_BIT_KEYS, TWO_BIT_VALUES = 0.85, 0.8  # of a slot's range, from what the lowest code stands for to the highest's
TWO_BIT_SEARCH = 0.9375  # of a step of values, from where one code is the nearest to where the next is


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


def affine_parameters(x: Tensor, bits: int, values: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and offset of each slot.

    Args:
        x: float32 `[..., dim]` without NaN (see `quantize`).
        bits: 8, 4 or 2.
        values: Whether these are values, not keys.

    Returns:
        `(scale, offset, overflow)`: fp16, fp16 and bool, each `[...]`. `overflow` marks slots whose range or
        scale does not fit fp16 and was clamped.
    """
    low, high = x.amin(-1), x.amax(-1)
    if bits == 2:
        centre, half = low * 0.5 + high * 0.5, high * 0.5 - low * 0.5
        shrunk = half * (TWO_BIT_VALUES if values else TWO_BIT_KEYS)
        low, high = centre - shrunk, centre + shrunk
    scale = (high - low) / (2**bits - 1)
    # Written so that a NaN (from infinite inputs) counts as overflow and becomes 0.
    overflow = ~((low.abs() <= FP16_MAX) & (high.abs() <= FP16_MAX) & (scale <= FP16_MAX))
    scale = scale.nan_to_num(nan=0.0).clamp(0.0, FP16_MAX)
    offset = low.nan_to_num(nan=0.0).clamp(-FP16_MAX, FP16_MAX) + 0.0  # no negative zero
    return scale.half(), offset.half(), overflow


def quantize(
    x: Tensor, bits: int, values: bool = False, feedback: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Affine codes of each slot, rounding half to even.

    Args:
        x: float32 `[..., dim]`. NaN is stored as 0 and counted as overflow.
        bits: 8, 4 or 2.
        values: Whether these are values, not keys.
        feedback: float32 `[..., 2, rank, dim]`: how the channels of a slot are rounded one after the other. Each adds
            `feedback[..., 1, :, d]` times its error to what is collected, and later ones are first lessened by
            `feedback[..., 0, :, d]` times that. `None` rounds each for itself.

    Returns:
        `(codes, scale, offset, overflow)`: uint8 `[..., dim]`, then as in `affine_parameters`.
    """
    nan = x.isnan()
    x = x.masked_fill(nan, 0.0)
    scale, offset, overflow = affine_parameters(x, bits, values)
    step, low = scale.float(), offset.float()
    if values and bits == 2:  # about the same centre, 1.5 steps from either end
        low, step = low + step * (1.5 * (1 - TWO_BIT_SEARCH)), step * TWO_BIT_SEARCH
    if feedback is None:
        codes = _codes(x, low.unsqueeze(-1), step.unsqueeze(-1), bits)
    else:
        codes = _codes_in_turn(x, low, step, bits, feedback)
    return codes.to(torch.uint8), scale, offset, overflow | nan.any(-1)


def _codes(x: Tensor, low: Tensor, step: Tensor, bits: int) -> Tensor:
    return torch.where(step > 0, ((x - low) / step).clamp(0.0, 2.0**bits - 1).round(), 0.0)


def _codes_in_turn(x: Tensor, low: Tensor, step: Tensor, bits: int, feedback: Tensor) -> Tensor:
    collected, codes = torch.zeros((), device=x.device), list[Tensor]()
    for of_channel, factors in zip(x.unbind(-1), feedback.unbind(-1), strict=True):
        made_good, collect = factors.unbind(-2)
        parts = (made_good * collected).unbind(-1)
        wanted = of_channel - sum(parts[1:], start=parts[0])  # in this order, as the native backends add
        codes.append(_codes(wanted, low, step, bits))
        error = codes[-1] * step + low - of_channel
        error = torch.where(error.abs() <= FP16_MAX, error, 0.0)  # of an infinity nothing can be made good
        collected = collected + collect * error.unsqueeze(-1)
    return torch.stack(codes, dim=-1)


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
