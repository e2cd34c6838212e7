"""Running means of the keys and values of every row, for observers that compare a slot with them."""

import torch

from kvcompress_hf.paging.sequence_tensors import Declared, SequenceTensors

MEANS = (
    Declared("sums", torch.float32, (2, "layers", "batch", "kv_heads", "head_dim"), changed_by="packing"),
    Declared("summed", torch.float32, ("layers", "batch"), changed_by="packing"),
)


class Means:
    """Sums of keys and values, and of how many tokens; made when they are first needed.

    Args:
        tensors (`SequenceTensors`): The store's tensors, the sums among them.
    """

    def __init__(self, tensors: SequenceTensors) -> None:
        self.tensors = tensors

    def add(self, part: slice, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor) -> list[torch.Tensor]:
        """Adds new tokens to the sums.

        Args:
            part (`slice`): The layers they belong to.
            keys (`torch.Tensor`): Whole keys, `[batch, kv_heads, tokens, head_dim]`, where `batch` is `layers * batch`.
            values (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`.
            real (`torch.Tensor`): `bool` `[batch, tokens]`, which tokens count.

        Returns:
            `list[torch.Tensor]`: The means of keys and of values so far, float32 `[batch, kv_heads, 1, head_dim]`.
        """
        if "sums" not in self.tensors.values:
            self.tensors.make("sums")
            self.tensors.make("summed")
        both, summed = self.tensors.values["sums"], self.tensors.values["summed"]
        for sums, states in zip(both, (keys, values), strict=True):
            clean = torch.where(real[:, None, :, None], states.float(), 0.0)
            sums[part] += clean.sum(2).view_as(sums[part])
        summed[part] += real.float().sum(1).view_as(summed[part])
        count = summed[part].flatten().clamp(min=1)[:, None, None, None]
        return [sums[part].flatten(0, 1)[:, :, None] / count for sums in both]
