"""What an observer looks at when a plan is due: everything that one layer holds, keys included."""

from dataclasses import dataclass

import torch

from kvcompress_hf.kernels import Logits
from kvcompress_hf.paging.key_turn import Rotation
from kvcompress_hf.paging.queries import Queries

__all__ = ["Look"]


@dataclass(frozen=True)
class Look:
    """The packed slots of one layer, to be read only.

    Args:
        keys (`torch.Tensor`): As the model made them, but for what their tier has lost: float32
            `[batch, kv_heads, slots, head_dim]`.
        positions (`torch.Tensor`): `int32` `[batch, kv_heads, slots]`.
        filled (`torch.Tensor`): `bool` `[batch, kv_heads, slots]`, false where there is no slot.
        queries (`Queries`): What is remembered of the layer's queries, as the observer asked for.
        logits (`Logits`, *optional*): How queries and keys make logits, as at the last call; `None` before the first
            one after a file has been read.
        rotation (`Rotation`, *optional*): How position turns the queries of this layer; `None` where that is not known.
    """

    keys: torch.Tensor
    positions: torch.Tensor
    filled: torch.Tensor
    queries: Queries
    logits: Logits | None
    rotation: Rotation | None

    def attention(self, logits: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        """Probabilities from products of queries and keys.

        Args:
            logits (`torch.Tensor`): Products, not scaled yet, `[batch, kv_heads, ..., slots]`.
            among (`torch.Tensor`): The slots that the softmax runs over, `bool`, of a shape that broadcasts to it.

        Returns:
            `torch.Tensor`: float32, of the same shape; 0 for all other slots.
        """
        scale = self.keys.shape[-1] ** -0.5 if self.logits is None else self.logits.scale
        logits = logits.float() * scale
        if self.logits is not None and self.logits.softcap is not None:
            logits = (logits / self.logits.softcap).tanh() * self.logits.softcap
        return logits.masked_fill(~among, -torch.inf).softmax(-1).nan_to_num(0.0)
