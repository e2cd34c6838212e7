"""When two results are the same up to rounding."""

import torch
from torch import Tensor

__all__ = ["difference", "limit", "of_vectors"]

#: Least relative difference that counts, however fine the dtype: libraries add up in different orders.
_LEAST = 1e-3
#: Units of the last place that a dot product, a softmax and a sum may be off by together.
_UNITS = 8


def limit(*dtypes: torch.dtype) -> float:
    """The largest relative difference that rounding explains.

    Args:
        dtypes (`torch.dtype`): What was computed with; the coarsest counts.

    Returns:
        `float`: 0.001 for float32, 0.0078 for float16, 0.0625 for bfloat16.
    """
    return max(_LEAST, *(_UNITS * torch.finfo(dtype).eps for dtype in dtypes))


def of_vectors(ours: Tensor, stock: Tensor, real: Tensor | None = None) -> float:
    """The largest relative difference among vectors, such as those of single heads and tokens.

    Args:
        ours (`Tensor`): `[..., head_dim]`.
        stock (`Tensor`): The same shape.
        real (`Tensor`, *optional*): Which vectors count, `bool`, of a shape that broadcasts to theirs.

    Returns:
        `float`: Of the vector with the largest; infinite if shapes differ, or one has infinities or NaN where the
            other has numbers.
    """
    if ours.shape != stock.shape:
        return float("inf")
    ours, stock = ours.detach().float(), stock.detach().float()
    counted = torch.ones(ours.shape[:-1], dtype=torch.bool, device=ours.device)
    if real is not None:
        counted = counted & real.to(ours.device)
    ours, stock = ours[counted], stock[counted]
    # Models that overflow in float16 do so with any cache.
    finite = stock.isfinite()
    if not torch.equal(finite, ours.isfinite()):
        return float("inf")
    ours, stock = torch.where(finite, ours, 0), torch.where(finite, stock, 0)
    norms = torch.linalg.vector_norm(stock, dim=-1)
    # A vector that is nearly zero beside the others is not held to its own size.
    floor = 0.01 * norms.square().mean().sqrt() if norms.numel() else torch.tensor(0.0)
    error = torch.linalg.vector_norm(ours - stock, dim=-1) / norms.clamp(min=float(floor)).clamp(min=1e-30)
    return float(error.max()) if error.numel() else 0.0


def difference(ours: Tensor, stock: Tensor) -> float:
    """The largest difference between logits, relative to the largest of them.

    Args:
        ours (`Tensor`): `[rows, vocab]`.
        stock (`Tensor`): The same shape.

    Returns:
        `float`: Infinite if one has infinities or NaN where the other has numbers.
    """
    finite = stock.isfinite()
    if not torch.equal(finite, ours.isfinite()):
        return float("inf")
    ours, stock = torch.where(finite, ours, 0), torch.where(finite, stock, 0)
    return float((ours - stock).abs().max()) / max(1.0, float(stock.abs().max()))
