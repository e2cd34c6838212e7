"""Made-up queries, keys and values on which every fault shows, whatever the model's weights are.

Real ones hide faults: where attention is nearly uniform a wrong scaling changes nothing, where it falls on one token
the edge of a window does not matter, and 16-bit weights leave little to tell rounding from a fault. Here half of the
queries look at all keys about alike (a window one off shows), the other half at few (scaling and soft cap show), and
all of it can be had in float32.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MadeUp", "make_up"]

#: Standard deviation of the logits of two kinds of queries.
_DIFFUSE, _SHARP = 1.0, 5.0


@dataclass(frozen=True)
class MadeUp:
    """Queries, keys and values of all tokens of a trial, in float32 but rounded to the model's dtype.

    Args:
        query (`Tensor`): `[rows, q_heads, tokens, head_dim]`.
        key (`Tensor`): `[rows, kv_heads, tokens, head_dim]`.
        value (`Tensor`): `[rows, kv_heads, tokens, head_dim]`.
    """

    query: Tensor
    key: Tensor
    value: Tensor

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Those of some tokens.

        Args:
            start (`int`): The first.
            stop (`int`): Behind the last.

        Returns:
            `tuple[Tensor, Tensor, Tensor]`: Queries, keys and values.
        """
        return self.query[:, :, start:stop], self.key[:, :, start:stop], self.value[:, :, start:stop]


def make_up(query: Tensor, key: Tensor, length: int, scaling: float | None, layer: int, dtype: torch.dtype) -> MadeUp:
    """Makes up queries, keys and values for one layer, always the same for the same arguments.

    Args:
        query (`Tensor`): Queries of the layer, for their shape `[rows, q_heads, tokens, head_dim]` and device.
        key (`Tensor`): Keys, `[rows, kv_heads, tokens, head_dim]`.
        length (`int`): Tokens to make up.
        scaling (`float`, *optional*): What the stock layer multiplies logits with; `None` stands for
            `head_dim ** -0.5`.
        layer (`int`): Its index: layers differ.
        dtype (`torch.dtype`): The dtype to round to.

    Returns:
        `MadeUp`: Queries, keys and values of `length` tokens.
    """
    rows, q_heads, _, head_dim = query.shape
    generator = torch.Generator().manual_seed(layer + 1)

    def normal(heads: int) -> Tensor:
        return torch.randn((rows, heads, length, head_dim), generator=generator)

    keys, values, queries = normal(key.shape[1]), normal(key.shape[1]), normal(q_heads)
    parity = torch.arange(q_heads)[:, None] + torch.arange(length)
    deviation = torch.where(parity % 2 == 0, _DIFFUSE, _SHARP)
    per_unit = abs(head_dim**-0.5 if scaling is None else scaling) * math.sqrt(head_dim)
    queries = queries * (deviation / (per_unit or 1.0))[:, :, None]
    return MadeUp(*(x.to(dtype).float().to(query.device) for x in (queries, keys, values)))
