"""The dense model: every key and value that a cache was ever given, and attention in plain torch over some of them."""

import torch
from shapes import HEAD_DIM, KV_HEADS, Q_HEADS

SCALE = HEAD_DIM**-0.5


class History:
    """All tokens of one cache.

    Attributes:
        keys, values: Per layer with keys of its own float32 `[batch, kv_heads, tokens, head_dim]`, else `None`.
        real: bool `[batch, tokens]`, false for padding.
        top: The most tokens the cache ever had seen, those that were taken back included.
    """

    def __init__(self, sources, batch):
        empty = torch.zeros(batch, KV_HEADS, 0, HEAD_DIM)
        own = [source == layer for layer, source in enumerate(sources)]
        self.keys = [empty if mine else None for mine in own]
        self.values = [empty if mine else None for mine in own]
        self.real = torch.zeros(batch, 0, dtype=torch.bool)
        self.top = 0

    @property
    def seen(self):
        return self.real.shape[1]

    @property
    def batch(self):
        return self.real.shape[0]

    def copy(self):
        other = object.__new__(History)
        other.keys, other.values, other.real, other.top = list(self.keys), list(self.values), self.real, self.top
        return other

    def append(self, keys, values, real):
        self.keys = [
            None if old is None else torch.cat([old, new], 2) for old, new in zip(self.keys, keys, strict=True)
        ]
        self.values = [
            None if old is None else torch.cat([old, new], 2) for old, new in zip(self.values, values, strict=True)
        ]
        self.real = torch.cat([self.real, real], 1)
        self.top = max(self.top, self.seen)

    def crop(self, count):
        keep = max(0, self.seen - count)
        self.keys = [None if old is None else old[:, :, :keep] for old in self.keys]
        self.values = [None if old is None else old[:, :, :keep] for old in self.values]
        self.real = self.real[:, :keep]

    def select(self, index):
        self.keys = [None if old is None else old[index] for old in self.keys]
        self.values = [None if old is None else old[index] for old in self.values]
        self.real = self.real[index]


def attention(query, keys, values, held, real, window):
    """Attention of the newest tokens over those that are held and over themselves.

    Args:
        query: `[batch, q_heads, new, head_dim]`.
        keys, values: `[batch, kv_heads, tokens, head_dim]`, the new ones last.
        held: bool `[batch, kv_heads, tokens - new]`, what is held of the past.
        real: bool `[batch, tokens]`.
        window: Tokens, or `None`.

    Returns:
        `[batch, new, q_heads, head_dim]`; zero where a query sees nothing.
    """
    batch, _, new, dim = query.shape
    tokens = keys.shape[2]
    past = tokens - new
    group = Q_HEADS // KV_HEADS
    at = torch.arange(past, tokens)[:, None]
    behind = at - torch.arange(tokens)
    sees = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    there = torch.cat([held, real[:, None, past:].expand(-1, KV_HEADS, -1)], 2)
    sees = sees & there[:, :, None, None, :]  # [batch, kv_heads, 1, new, tokens]
    scores = query.view(batch, KV_HEADS, group, new, dim) @ keys[:, :, None].transpose(-1, -2) * SCALE
    weights = scores.masked_fill(~sees, float("-inf")).softmax(-1).nan_to_num(0.0)
    return (weights @ values[:, :, None]).view(batch, Q_HEADS, new, dim).transpose(1, 2)
