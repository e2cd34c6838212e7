"""What may be subtracted from every key of a row before it is stored: a steady part of its mean.

Softmax does not change when all logits of a query change by the same number, so one vector taken off all keys of a
row need never be added back. Without its mean a key has a smaller range, and its codes a finer step (LeanKV's per-token
groups, arXiv 2412.03131, are at their worst with offset channels; KIVI, arXiv 2402.02750, measures those).

Rotary embedding makes the mean of most channels turn with position, so the mean of a prompt may be wrong for what
follows. A channel is trusted only as far as the quarters of the prompt agree on its mean.
"""

import torch

_PARTS = 4
_LEAST_TOKENS = 16  # of a sequence; fewer say nothing about a mean
_BLOCK = 2048  # tokens converted to float32 at a time


def steady_mean(keys: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """The mean key of each sequence and head, each channel moved towards zero by the range of its quarters' means.

    Args:
        keys (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`.
        real (`torch.Tensor`, *optional*): `bool` `[batch, tokens]`, which tokens count; all when left out.

    Returns:
        `torch.Tensor`: `[batch, kv_heads, 1, head_dim]` in the dtype of `keys`, rounded to bfloat16 so that another
        order of additions rarely shows; zero for a sequence of fewer than 16 tokens.
    """
    batch, _, tokens, _ = keys.shape
    if real is None:
        real = torch.ones((batch, tokens), dtype=torch.bool, device=keys.device)
    count = real.sum(1)
    part = (real.cumsum(1) - 1) * _PARTS // count.clamp(min=1)[:, None]
    member = real[:, None] & (part[:, None] == torch.arange(_PARTS, device=keys.device)[:, None])
    weight = member.float()
    means = keys.new_zeros((*keys.shape[:2], _PARTS, keys.shape[3]), dtype=torch.float32)
    for start in range(0, tokens, _BLOCK):
        block = slice(start, start + _BLOCK)
        # What is not a token may hold anything, NaN too.
        clean = torch.where(real[:, None, block, None], keys[:, :, block], 0).float()
        means += weight[:, None, :, block] @ clean
    means /= weight.sum(2).clamp(min=1)[:, None, :, None]
    mean, spread = means.mean(2, keepdim=True), means.amax(2, keepdim=True) - means.amin(2, keepdim=True)
    steady = mean - mean.clamp(-spread, spread)
    steady = torch.where((count >= _LEAST_TOKENS)[:, None, None, None], steady, 0.0)
    return steady.bfloat16().to(keys.dtype)
