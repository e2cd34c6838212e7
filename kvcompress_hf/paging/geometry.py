"""What the layers of one store have in common."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Geometry:
    """What layers must have in common to share a store.

    Args:
        device (`torch.device`): Where keys and values arrive.
        dtype (`torch.dtype`): Their dtype.
        kv_heads (`int`): KV heads in the tensors (the local ones under tensor parallelism).
        head_dim (`int`): Size of a head.
        windowed (`bool`): Whether the layers attend through a sliding window.
    """

    device: torch.device
    dtype: torch.dtype
    kv_heads: int
    head_dim: int
    windowed: bool
