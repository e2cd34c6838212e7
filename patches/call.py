"""What both routes check at every call of an attention layer that works on a compressed cache."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress_hf.compat import logging
from kvcompress_hf.errors import UnsupportedFeatureError

__all__ = ["as_autocast", "check_call"]

logger = logging.get_logger(__name__)

# Arguments that reach attention layers on their way and do not change what they compute. `kwargs` itself is
# what the pipeline-parallel wrapper calls the rest. Everything else that is not None is refused: an argument
# ignored is a wrong answer without an error.
_HARMLESS = frozenset(
    {
        "kwargs",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


def check_call(module: nn.Module, dropout: float, kwargs: Mapping[str, Any]) -> None:
    """Refuses whatever the compressed cache would have to ignore.

    Args:
        module (`nn.Module`): The attention layer.
        dropout (`float`): Its attention dropout in this call.
        kwargs (`Mapping[str, Any]`): Arguments of the call that the cache is not told about.

    Raises:
        UnsupportedFeatureError: If an argument has a meaning for attention, or dropout is on.
    """
    for name, value in kwargs.items():
        if value is None or name in _HARMLESS:
            continue
        if name == "is_causal" and value is True:
            continue
        raise UnsupportedFeatureError(
            f"{type(module).__name__} was called with {name}={_short(value)}, which changes attention in a way the "
            "compressed cache does not know; leave it out, or unpatch the model for this call."
        )
    if dropout:
        raise UnsupportedFeatureError(
            f"{type(module).__name__} applies attention dropout ({dropout}), which a compressed cache does not; call "
            "model.eval() first, or train without a compressed cache."
        )
    if kwargs.get("output_attentions"):
        logger.warning_once(
            "output_attentions=True has no effect with a compressed cache: heads keep different numbers of tokens, so "
            "there is no rectangular attention matrix to return."
        )


def as_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast makes of queries, keys and values before stock attention; the cache's kernels are not known to it.

    Args:
        query (`Tensor`): `[batch, q_heads, tokens, head_dim]`.
        key (`Tensor`): `[batch, kv_heads, tokens, head_dim]`.
        value (`Tensor`): `[batch, kv_heads, tokens, head_dim]`.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: `query`, `key` and `value`, in the dtype of autocast where it is on.
    """
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"<{type(value).__name__} of shape {tuple(shape)}>" if shape is not None else repr(value)
