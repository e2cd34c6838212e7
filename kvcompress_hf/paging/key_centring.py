"""One vector per row that is taken off every key before it is stored; see `key_shift.py` for which."""

import torch

from kvcompress_hf.paging.key_shift import steady_mean, wanted_shift
from kvcompress_hf.paging.sequence_tensors import Declared, SequenceTensors

KEY_SHIFT = Declared(
    "key_shift",
    None,
    ("layers", "batch", "kv_heads", 1, "head_dim"),
    kind="metadata",
    changed_by="nothing",
    shared=True,
)


class KeyCentring:
    """The vector of each row that is taken off its keys, in pages and tail alike; none until it is settled.

    Args:
        tensors (`SequenceTensors`): The store's tensors, the shift among them.
    """

    def __init__(self, tensors: SequenceTensors) -> None:
        self.tensors = tensors

    @property
    def shift(self) -> torch.Tensor | None:
        """`torch.Tensor` or `None`: `[layers, batch, kv_heads, 1, head_dim]` in the dtype of keys."""
        return self.tensors.values.get("key_shift")

    def settle(
        self,
        layer: int,
        keys: torch.Tensor,
        real: torch.Tensor | None,
        query: torch.Tensor | None = None,
        bits: int = 8,
        sequences: torch.Tensor | None = None,
    ) -> None:
        """Decides what is taken off every key of a layer from now on; nothing of the layer may be stored yet.

        Args:
            layer (`int`): Index of the layer.
            keys (`torch.Tensor`): The first keys, `[batch, kv_heads, tokens, head_dim]`.
            real (`torch.Tensor`, *optional*): `bool` `[batch, tokens]`, false for padding.
            query (`torch.Tensor`, *optional*): Where given, a head is centred only if it gains, see [`wanted_shift`].
            bits (`int`): Bits of the keys' codes.
            sequences (`torch.Tensor`, *optional*): `bool` `[batch]`, those that have stored nothing yet; all when left
                out.
        """
        old = self.shift
        with torch.inference_mode(False):
            shift = self.tensors.zeros("key_shift") if old is None else old.clone()  # forks may share it
        mean = steady_mean(keys, real) if query is None else wanted_shift(keys, query, real, bits)
        shift[layer] = mean if sequences is None else torch.where(sequences[:, None, None, None], mean, shift[layer])
        self.tensors.values["key_shift"] = shift
        self.tensors.moved()

    def whole(self, layer: int | None, keys: torch.Tensor) -> torch.Tensor:
        """Adds the shift again, for whoever looks at keys without a softmax.

        Args:
            layer (`int`, *optional*): Index of the layer; all layers when left out.
            keys (`torch.Tensor`): Centred, `[batch, kv_heads, tokens, head_dim]`; with all layers, `batch` is
                `layers * batch`.

        Returns:
            `torch.Tensor`: The keys with the layer's shift, float32; the keys themselves while there is none.
        """
        shift = self.shift
        if shift is None:
            return keys
        part = slice(None) if layer is None else slice(layer, layer + 1)
        return keys.float() + shift[part].flatten(0, 1)
