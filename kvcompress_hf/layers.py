"""Layers as transformers sees them: what it asks of one layer of a cache, and what a config says of each."""

import weakref
from typing import Any

import torch

from kvcompress_hf.compat import CacheLayerMixin, PreTrainedConfig, get_layer_types_and_kwargs
from kvcompress_hf.errors import UnsupportedModelError

__all__ = ["KVHandle", "LayerFace", "layer_sharing", "layer_windows"]

_LAYER_TYPES = ("full_attention", "sliding_attention")


class KVHandle:
    """Tag on the keys and values that `update` returns; it tells attention which cache and layer they belong to.

    Args:
        cache (`CompressedPagedCache`): The cache.
        layer_idx (`int`): Index of the layer.
    """

    __slots__ = ("cache", "layer_idx")

    def __init__(self, cache: Any, layer_idx: int) -> None:
        self.cache = cache
        self.layer_idx = layer_idx


class LayerFace(CacheLayerMixin):
    """What transformers asks of a single layer; everything else goes through the cache."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: Any, layer_idx: int, is_sliding: bool) -> None:
        super().__init__()
        # A proxy: a cycle would keep a dropped cache's memory until the next garbage collection.
        self._cache, self._layer_idx, self.is_sliding = weakref.proxy(cache), layer_idx, is_sliding

    @property
    def record_past(self) -> bool:
        """`bool`: Whether new tokens are held back in the tail; transformers sets it on layers."""
        return self._cache.is_recording_past(self._layer_idx)

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._cache._set_recording(value)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Does nothing: storage is made when keys arrive."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`CompressedPagedCache.update`]."""
        return self._cache.update(key_states, value_states, self._layer_idx)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See [`CompressedPagedCache.get_mask_sizes`]."""
        return self._cache.get_mask_sizes(query_length, self._layer_idx)

    def get_seq_length(self) -> int:
        """See [`CompressedPagedCache.get_seq_length`]."""
        return self._cache.get_seq_length()

    def get_max_length(self) -> int:
        """`-1`: the cache has no maximum length."""
        return -1


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """The sliding window of each layer of a model.

    Args:
        config (`PreTrainedConfig`): The model's config; of a composite model the text decoder's part counts.

    Returns:
        `list[int | None]`: Window in tokens per layer, `None` for full attention.

    Raises:
        TypeError: If it is no config.
        UnsupportedModelError: If a layer is neither full nor sliding-window attention.
    """
    if not hasattr(config, "get_text_config"):
        raise TypeError(
            f"CompressedPagedCache() takes a model's config, got {type(config).__name__}; write "
            "CompressedPagedCache(model.config, recipe)."
        )
    text = config.get_text_config(decoder=True)
    layer_types, kwargs = get_layer_types_and_kwargs(text)
    # With early exit a model has fewer layers for a while than its config lists types of.
    for i, (layer_type, sharing) in enumerate(zip(layer_types, layer_sharing(config), strict=False)):
        if layer_type not in _LAYER_TYPES and sharing != "reuse":
            raise UnsupportedModelError(
                f"Layer {i} of this {text.model_type} model is of type {layer_type!r}; a CompressedPagedCache holds "
                f"{' and '.join(_LAYER_TYPES)} layers only. Use the stock cache for this model."
            )
    return [layer.get("sliding_window") for layer in kwargs]


def layer_sharing(config: PreTrainedConfig) -> list[str | None]:
    """Which layers read the keys and values of an earlier one instead of having their own (Gemma 3n, Gemma 4).

    Args:
        config (`PreTrainedConfig`): The model's config.

    Returns:
        `list[str | None]`: Per layer `"reuse"` for those, `"store"` for the ones they read, else `None`.
    """
    text = config.get_text_config(decoder=True)
    return list(getattr(text, "kv_sharing_modes", None) or [None] * text.num_hidden_layers)
