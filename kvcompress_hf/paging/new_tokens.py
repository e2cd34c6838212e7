"""The new tokens of one layer on their way into a store: what attention, observers and packing are given."""

from dataclasses import dataclass

import torch

from kvcompress_hf.kernels import Logits


@dataclass(slots=True)
class NewTokens:
    """Queries, keys and values of new tokens of one layer, and how they attend.

    Args:
        query (`torch.Tensor`): `[batch, q_heads, tokens, head_dim]`.
        key (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`. From the moment they are centred, as they will be
            stored: less the store's `key_shift`, if there is one. Softmax does not notice;
            `store.whole(layer, new.key)` gives whole keys back.
        value (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`.
        logits (`Logits`): How queries and keys make logits: scale, soft cap, sliding window, sinks.
        position (`int`): Logical position of the first token.
        valid (`torch.Tensor`, *optional*): `bool` `[batch, tokens]`, false for padding.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    logits: Logits
    position: int = 0
    valid: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """`int`: How many new tokens there are, padding included."""
        return self.key.shape[2]
