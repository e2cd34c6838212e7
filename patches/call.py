"""What both routes check at every call of an attention layer that works on a compressed cache."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.utils import logging

from kvcompress_hf.errors import UnsupportedFeatureError

__all__ = ["check_call"]

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


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"<{type(value).__name__} of shape {tuple(shape)}>" if shape is not None else repr(value)
