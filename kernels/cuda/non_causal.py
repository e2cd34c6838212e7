"""Starts the kernels of `non_causal.cu`: what they take, and how they are told how position turns queries."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from .. import abi
from ..arguments import fill_strides, pointer
from ..rotation import Rotation
from ..types import Logits
from .chunk import aligned
from .launch import Launcher
from .nvrtc import CHUNK_ROWS

__all__ = ["KvcTurns", "launch_non_causal", "takes_non_causal"]

TOKENS = 16  # of a warp
WARPS = 4  # of a thread block, at most
PLANES = 3  # what each sixteen of tokens adds to the next and the one before is kept apart
SHARED_DIMENSIONS = 256  # of the tokens of a thread block, all together
MOST_TOKENS = 2**31 // 192 - 64  # places of the sample are found in 32 bits
MOST_PAIRS = 128  # of channels
TURNED_AT_ONCE = 2**24  # numbers, where queries are turned before


class KvcTurns(ctypes.Structure):
    """Mirror of `KvcTurns` in `parameters.h`."""

    _fields_ = [("step", ctypes.c_int64 * MOST_PAIRS)]

    @classmethod
    def of(cls, inv_freq: Tensor) -> KvcTurns:
        """Radians per position, float32 `[pairs]` on the host, in 2^-64 of a turn."""
        turns = inv_freq.double() / (2 * math.pi)
        steps = ((turns - turns.round()) * 2.0**64).long().tolist()
        return cls((ctypes.c_int64 * MOST_PAIRS)(*steps))


def takes_non_causal(k: Tensor, logits: Logits) -> bool:
    """Whether the kernels take keys `[batch, kv_heads, n, head_dim]`."""
    return (
        k.shape[3] in CHUNK_ROWS
        and k.dtype in (torch.float16, torch.bfloat16)
        and k.shape[2] <= MOST_TOKENS
        and logits.scale > 0
    )


def _turned(q: Tensor, rotation: Rotation, places: Tensor | None) -> Tensor | None:
    """Queries turned to the position behind the chunk, contiguous; `None` where the kernels turn them.

    They do where position turns every channel, in pairs half of them apart, or none.
    """
    n, head_dim = q.shape[2:]
    if not rotation.width or (rotation.width == head_dim and not rotation.interleaved):
        return None
    end = places.sum(1, keepdim=True) if places is not None else n
    by = (end - torch.arange(n, device=q.device)).view(-1, 1, n)
    turned = torch.empty_like(q, memory_format=torch.contiguous_format)
    step = max(1, TURNED_AT_ONCE // q[:, :, 0].numel())
    for part in (slice(at, at + step) for at in range(0, n, step)):
        turned[:, :, part] = rotation.turn(q[:, :, part], by[:, :, part])
    return turned


def launch_non_causal(
    launcher: Launcher, q: Tensor, k: Tensor, logits: Logits, rotation: Rotation, valid: Tensor | None
) -> Tensor:
    """`Backend.non_causal_scores` of checked arguments that `takes_non_causal`.

    Args:
        launcher: Where kernels run.
        q: `[batch, q_heads, n, head_dim]`.
        k: `[batch, kv_heads, n, head_dim]`.
        logits: How logits are made.
        rotation: How position turns queries.
        valid: bool `[batch, n]`, or `None`.

    Returns:
        float32 `[batch, q_heads, n]`.

    Raises:
        NvrtcError: Device code has to be compiled, and cannot be.
    """
    batch, kv_heads, n, head_dim = k.shape
    group = q.shape[1] // kv_heads
    planes = torch.zeros(PLANES, batch, q.shape[1], n, device=k.device)
    if not planes.numel():
        return planes[0]
    q, k = aligned(q), aligned(k)
    places = None
    if valid is not None:  # padding is on one side
        places = torch.stack((valid.to(torch.uint8).argmax(1), valid.sum(1)), 1).int()
    turned = _turned(q, rotation, places)
    c = abi.KvcNonCausal(
        scale=logits.scale,
        softcap=logits.softcap or 0.0,
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        n=n,
    )
    c.q, c.k, c.sinks, c.scores = q.data_ptr(), k.data_ptr(), pointer(logits.sinks), planes.data_ptr()
    fill_strides(c, "q", q)
    fill_strides(c, "k", k)
    sixteens = SHARED_DIMENSIONS // head_dim
    blocks = batch * kv_heads * -(-n // (TOKENS * sixteens))
    threads = 32 * sixteens * min(group, WARPS // sixteens)
    kernel = f"kvc_non_causal_{head_dim}_{'f16' if k.dtype is torch.float16 else 'bf16'}"
    pointers = (ctypes.c_void_p(pointer(each)) for each in (places, turned))
    launcher.launch(kernel, blocks, threads, (c, KvcTurns.of(rotation.inv_freq), *pointers), k.device)
    return planes.sum(0)
