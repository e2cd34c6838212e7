"""Every family of the attention interface: an attention function that finds its cache on the keys and values.

`CompressedPagedCache.update` returns only the new keys and values and hangs a handle (`_kvc`: cache and
layer) on both. The registered attention function takes it from there; without a handle the call belongs to
another cache, or to none, and goes to the stock function whose name is in ours: `kvcompress|sdpa`,
`kvcompress|eager`.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress_hf.compat import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionInterface,
    AttentionMaskInterface,
)
from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.patches.call import as_autocast, check_call

__all__ = ["BASES", "PREFIX", "base_implementation", "eager_function", "interface_name", "register"]

PREFIX = "kvcompress|"
BASES = ("sdpa", "eager")
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def interface_name(base: str) -> str:
    """The registered name that delegates to `base`.

    Args:
        base (`str`): `"sdpa"` or `"eager"`.

    Returns:
        `str`: The name for `model.set_attn_implementation`.
    """
    return PREFIX + base


def base_implementation(name: str | None) -> str | None:
    """The stock implementation behind a name.

    Args:
        name (`str`, *optional*): Any attention implementation name.

    Returns:
        `str` or `None`: `name` without our prefix.
    """
    return None if name is None else name.removeprefix(PREFIX)


def register() -> None:
    """Registers the attention and mask functions. Doing it again changes nothing."""
    for base, function in _FUNCTIONS.items():
        AttentionInterface.register(interface_name(base), function)
        AttentionMaskInterface.register(interface_name(base), ALL_MASK_ATTENTION_FUNCTIONS[base])


def _attention_function(base: str) -> AttentionFunction:
    def kvcompress_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        stock: AttentionFunction = ALL_ATTENTION_FUNCTIONS.get_interface(base, eager_function(module))
        if getattr(key, "_kvc", None) is None and getattr(value, "_kvc", None) is None:
            return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return _attend(stock, module, query, key, value, attention_mask, dropout, scaling, kwargs), None

    return kvcompress_attention


@torch.compiler.disable
def _attend(
    stock: AttentionFunction,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    handle, other = getattr(key, "_kvc", None), getattr(value, "_kvc", None)
    if handle is None or other is None or handle.cache is not other.cache or handle.layer_idx != other.layer_idx:
        raise UnsupportedFeatureError(
            f"{type(module).__name__} changes keys or values between the cache and its attention, so the compressed "
            "cache cannot tell what belongs together; this model is not supported."
        )
    # The three that the cache is told about; all others must be harmless.
    check_call(
        module,
        dropout,
        {name: kwargs[name] for name in kwargs.keys() - {"softcap", "s_aux", "sliding_window"}},
    )
    if getattr(module, "is_causal", True) is False:
        raise UnsupportedFeatureError(
            f"{type(module).__name__} attends in both directions; the compressed cache is for causal attention."
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Keys and values that come a second time are those that a later layer shares (Gemma 3n, Gemma 4).
    if handle.cache.is_awaited(handle.layer_idx):
        attend = functools.partial(handle.cache.attend, handle.layer_idx)
    else:
        attend = functools.partial(handle.cache.attend_shared, getattr(module, "layer_idx", -1), handle.layer_idx)
    return attend(
        *as_autocast(query, key, value),
        attention_mask,
        scaling=scaling,
        dense=lambda: stock(module, query, key, value, attention_mask, dropout=0.0, scaling=scaling, **kwargs)[0],
        softcap=kwargs.get("softcap"),
        sliding_window=_sliding_window(module, handle.layer_idx, kwargs),
        sinks=kwargs.get("s_aux"),
    )


def _sliding_window(module: nn.Module, layer_idx: int, kwargs: dict[str, Any]) -> int | None:
    """The layer's window; some families (PhiMoE) apply it only through their mask, then the config knows."""
    if "sliding_window" in kwargs:
        return kwargs["sliding_window"]
    config = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if window is None or (layer_types and layer_types[layer_idx] != "sliding_attention"):
        return None
    return window


def eager_function(module: nn.Module) -> AttentionFunction:
    """The eager attention function of a family.

    Args:
        module (`nn.Module`): One of its attention modules.

    Returns:
        `AttentionFunction`: `eager_attention_forward` of the file that its class, or the nearest parent class, is from.
    """
    for parent in type(module).__mro__:
        function = getattr(sys.modules.get(parent.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    # Only ever called if the model runs on eager attention, which then is not where all families have it.
    return _no_eager_function


def _no_eager_function(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    raise UnsupportedFeatureError(
        f"{type(module).__module__} has no eager_attention_forward to go on with; load the model with "
        'attn_implementation="sdpa" if it supports that.'
    )


_FUNCTIONS = {base: _attention_function(base) for base in BASES}
