"""Families whose attention modules are swapped: those of Llama's shape, one row of a table each.

All other families of the attention interface work without a row (`interface.py`); one pays where that route loses time.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from kvcompress_hf.patches.swap import PagedForward

__all__ = ["FAMILIES", "Family", "no_window", "paged_class", "swapped_classes", "window_of_config", "window_of_layer"]


def no_window(module: Any) -> None:
    """Full attention in every layer.

    Args:
        module (`nn.Module`): The attention module.

    Returns:
        `None`: There is no window.
    """


def window_of_config(module: Any) -> int | None:
    """One window for all layers, as in Mistral.

    Args:
        module (`nn.Module`): The attention module.

    Returns:
        `int` or `None`: The window in tokens.
    """
    return getattr(module.config, "sliding_window", None)


def window_of_layer(module: Any) -> int | None:
    """Each layer has a window or none, as in Qwen.

    Args:
        module (`nn.Module`): The attention module.

    Returns:
        `int` or `None`: The window in tokens.
    """
    window: int | None = module.sliding_window
    return window


@dataclass(frozen=True)
class Family:
    """Attention of Llama's shape: projections, rotary embedding, attention, projection.

    Args:
        module (`str`): Name of the family in `transformers.models`; its modeling file must have
            `apply_rotary_pos_emb` and `eager_attention_forward`.
        attention (`str`): Name of the attention class there.
        window (`Callable`): From an attention module to its sliding window in tokens, or `None` for full attention.
        norms (`tuple[str, str]`, *optional*): Modules that norm the heads of queries and keys.
    """

    module: str
    attention: str
    window: Callable[[Any], int | None] = no_window
    norms: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if not callable(self.window):
            raise TypeError(
                f"Family.window is {self.window!r}; it must be a function from an attention module to its window in "
                "tokens or None, such as window_of_config."
            )
        if self.norms is not None and (not isinstance(self.norms, tuple) or len(self.norms) != 2):
            raise TypeError(
                f"Family.norms is {self.norms!r}; it must name two modules, those of queries and keys, or be None."
            )


_NORMS = ("q_norm", "k_norm")

FAMILIES: tuple[Family, ...] = (
    Family("llama", "LlamaAttention"),
    Family("granite", "GraniteAttention"),
    Family("mistral", "MistralAttention", window=window_of_config),
    Family("mixtral", "MixtralAttention", window=window_of_config),
    Family("qwen2", "Qwen2Attention", window=window_of_layer),
    Family("qwen3", "Qwen3Attention", window=window_of_layer, norms=_NORMS),
    Family("qwen3_moe", "Qwen3MoeAttention", window=window_of_layer, norms=_NORMS),
)


@functools.cache
def paged_class(family: Family) -> tuple[type[nn.Module], type[nn.Module]]:
    """The classes of a family's attention.

    Args:
        family (`Family`): A row of the table.

    Returns:
        `tuple[type, type]`: The stock class, and the paged one derived from it.
    """
    modeling = importlib.import_module(f"transformers.models.{family.module}.modeling_{family.module}")
    stock: type[nn.Module] = getattr(modeling, family.attention)
    body = {
        "__doc__": f"`{family.attention}` over a [`CompressedPagedCache`].",
        "__module__": __name__,  # where pickle finds it by its name
        "rotate": staticmethod(modeling.apply_rotary_pos_emb),
        "eager": staticmethod(modeling.eager_attention_forward),
        "norms": family.norms,
        "window": family.window,
    }
    return stock, type(f"Paged{family.attention}", (PagedForward, stock), body)


def swapped_classes(families: tuple[Family, ...] = FAMILIES) -> dict[type[nn.Module], type[nn.Module]]:
    """What [`swap_modules`] replaces by what.

    Args:
        families (`tuple[Family, ...]`): Rows of the table; all when left out.

    Returns:
        `dict[type, type]`: Stock class to paged class.
    """
    return dict(paged_class(family) for family in families)


def __getattr__(name: str) -> type[nn.Module]:
    for family in FAMILIES:
        if name == f"Paged{family.attention}":
            return paged_class(family)[1]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
