"""What the stock attention of each layer gets and gives, noted while the stock model runs.

The model runs on its own attention function (sdpa or eager), registered once more under a name of ours so that calls
pass by here. Which calls belong to a check is told by the keys: a [`StockCache`] marks what it returns.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress_hf.compat import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedConfig,
)
from kvcompress_hf.patches.dry_run.made_up import make_up
from kvcompress_hf.patches.dry_run.trial import Trial
from kvcompress_hf.patches.holders import surely
from kvcompress_hf.patches.implementation import configs_of, set_implementation
from kvcompress_hf.patches.interface import BASES, eager_function

__all__ = ["Notes", "Observed", "Place", "StockCache", "behind_a_past", "observing"]

_PREFIX = "kvcompress-observed|"
#: Number of the pass, layer whose keys are attended to, and how many attended to them before in this pass.
Place = tuple[int, int, int]


@dataclass(frozen=True)
class Observed:
    """One call of stock attention.

    Args:
        name (`str`): The attention module, such as `"model.layers.0.self_attn"`.
        scaling (`float`, *optional*): What it multiplies logits with.
        inputs (`tuple[Tensor, Tensor, Tensor]`): Queries, and the keys and values of new tokens, `[rows, heads,
            tokens, head_dim]`.
        output (`Tensor`): What it returned, `[rows, tokens, q_heads, head_dim]`.
        made_up (`Tensor`): What it returns for made-up queries, keys and values, in float32.
    """

    name: str
    scaling: float | None
    inputs: tuple[Tensor, Tensor, Tensor]
    output: Tensor
    made_up: Tensor


@dataclass
class Notes:
    """Everything noted while the stock model went through a trial.

    Args:
        trial (`Trial`): The trial.
        names (`dict[int, str]`): Name of each module, by its id.
        calls (`dict[Place, Observed]`): The calls of attention.
        logits (`list[Tensor]`): Per pass, float32 `[rows, vocab]` on the host.
        shapes (`dict[int, Tensor]`): Keys of each layer, emptied of tokens: `[rows, kv_heads, 0, head_dim]`.
        step (`int`): The pass under way.
    """

    trial: Trial
    names: dict[int, str]
    calls: dict[Place, Observed] = field(default_factory=dict)
    logits: list[Tensor] = field(default_factory=list)
    shapes: dict[int, Tensor] = field(default_factory=dict)
    step: int = 0

    def add(self, mark: "_Mark", call: "_Call", output: Tensor) -> None:
        """Notes one call.

        Args:
            mark (`_Mark`): What its keys are marked with.
            call (`_Call`): Its arguments.
            output (`Tensor`): What came of it.
        """
        reader = sum(1 for step, layer, _ in self.calls if (step, layer) == (self.step, mark.layer))
        queries, keys = call.query.shape[2], call.key.shape[2]
        stop = self.trial.span(self.step)[1]
        made = make_up(call.query, call.key, self.trial.length, call.scaling, mark.layer, _working_dtype(call.key))
        with torch.autocast(call.query.device.type, enabled=False):
            truth = call.run(made.query[:, :, stop - queries : stop], *made.part(stop - keys, stop)[1:])
        self.calls[self.step, mark.layer, reader] = Observed(
            self.names.get(id(call.module), type(call.module).__name__),
            call.scaling,
            (call.query, call.key[:, :, keys - mark.tokens :].clone(), call.value[:, :, keys - mark.tokens :].clone()),
            output.clone(),
            truth.float(),
        )


def _working_dtype(key: Tensor) -> torch.dtype:
    """The dtype in which attention works on keys: under autocast another than theirs."""
    device = key.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else key.dtype


@dataclass(frozen=True)
class _Mark:
    """Rides on keys and values that a stock cache returned."""

    notes: Notes
    layer: int
    tokens: int  # how many of them are new


@dataclass(frozen=True)
class _Call:
    """One call of a stock attention function."""

    function: Callable[..., tuple[Tensor, Tensor | None]]
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float | None
    kwargs: dict[str, Any]

    def run(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same call with other queries, keys and values."""
        mask = self.mask
        if mask is not None and mask.is_floating_point():
            mask = mask.to(query.dtype)
        arguments = {"dropout": 0.0, "scaling": self.scaling, **self.kwargs}
        return self.function(self.module, query, key, value, mask, **arguments)[0]


class StockCache(DynamicCache):
    """The stock cache; what it returns is marked, so that attention is recognised.

    Args:
        config (`PreTrainedConfig`): The model's config.
        notes (`Notes`): Where to note what attention makes of it.
    """

    def __init__(self, config: PreTrainedConfig, notes: Notes) -> None:
        super().__init__(config=config)
        self._notes = notes

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As of any stock cache.

        Args:
            key_states (`Tensor`): `[batch, kv_heads, tokens, head_dim]`.
            value_states (`Tensor`): `[batch, kv_heads, tokens, head_dim]`.
            layer_idx (`int`): Index of the layer.
            args: Whatever else stock caches are given.
            kwargs: Whatever else stock caches are given.

        Returns:
            `tuple[Tensor, Tensor]`: All keys and values that the new tokens may see.
        """
        self._notes.shapes[layer_idx] = key_states[:, :, :0]
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        mark = _Mark(self._notes, layer_idx, key_states.shape[2])
        for states in (keys, values):
            states._kvc_mark = mark  # type: ignore[attr-defined]
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """As of any stock cache, on every rank of a pipeline.

        Args:
            layer_idx (`int`): Index of the layer.

        Returns:
            `int`: Tokens seen.
        """
        return super().get_seq_length(self._on_this_rank(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As of any stock cache, on every rank of a pipeline.

        Args:
            query_length (`int`): New tokens.
            layer_idx (`int`): Index of the layer.

        Returns:
            `tuple[int, int]`: Keys that the new tokens may see, and the position of the first of them.
        """
        return super().get_mask_sizes(query_length, self._on_this_rank(layer_idx))

    def _on_this_rank(self, layer_idx: int) -> int:
        """The layer, or one like it that holds tokens: models ask by their first, which may be on another rank."""
        if self._notes.step == 0 or layer_idx in self._notes.shapes or layer_idx >= len(self.layers):
            return layer_idx
        kind = _kind(self.layers[layer_idx])
        return next((i for i in self._notes.shapes if _kind(self.layers[i]) == kind), layer_idx)


def _kind(layer: Any) -> tuple[type, int | None]:
    """What layers of a stock cache have in common that hold the same number of tokens."""
    return type(layer), getattr(layer, "sliding_window", None)


class _PastCache(StockCache):
    """A stock cache in which every pass finds the same past of zeros.

    Layers of one kind share it, and what a pass adds is not kept, so it takes the memory of one layer or two however
    many the model has.
    """

    def __init__(self, config: PreTrainedConfig, notes: Notes, shapes: dict[int, Tensor]) -> None:
        super().__init__(config, notes)
        filled: dict[tuple[Any, ...], Any] = {}
        any_shape = next(iter(shapes.values()))
        for i, (layer, reads_another) in enumerate(zip(self.layers, self.is_dummy, strict=True)):
            if reads_another:
                continue
            empty = shapes.get(i, any_shape)[:1]
            kind = (*_kind(layer), empty.shape, empty.dtype, empty.device)
            if kind not in filled:
                zeros = empty.new_zeros((1, empty.shape[1], notes.trial.past, empty.shape[3]))
                layer.update(zeros, zeros)  # type: ignore[union-attr]
                filled[kind] = layer
            self.layers[i] = filled[kind]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See [`StockCache.update`]."""
        layer = self.layers[layer_idx]
        self.layers[layer_idx] = copy.copy(layer)
        try:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        finally:
            self.layers[layer_idx] = layer


def behind_a_past(config: PreTrainedConfig, notes: Notes, shapes: dict[int, Tensor]) -> StockCache:
    """A stock cache that holds `notes.trial.past` tokens, all zeros, at the start of every pass.

    Args:
        config (`PreTrainedConfig`): The model's config.
        notes (`Notes`): As for [`StockCache`].
        shapes (`dict[int, Tensor]`): As in [`Notes`], of an earlier trial.

    Returns:
        `StockCache`: A cache that holds the past.
    """
    return _PastCache(config, notes, shapes)


@contextlib.contextmanager
def observing(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, calls of the model's stock attention over a [`StockCache`] are noted.

    Args:
        model (`PreTrainedModel`): The unpatched model; it runs on sdpa or eager attention, whichever it is set to.

    Raises:
        UnsupportedModelError: If its attention implementation cannot be set.
    """
    for base in BASES:
        AttentionInterface.register(_PREFIX + base, functools.partial(_observe, base))
        AttentionMaskInterface.register(_PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])
    before = [(config, config._attn_implementation) for config in configs_of(model)]

    def put_back() -> None:
        for config, name in before:
            config._attn_implementation_internal = name

    try:
        try:
            set_implementation(model, _PREFIX.__add__)
            yield
        finally:
            surely(put_back)
    except BaseException:
        put_back()  # an interrupt may have come before the first time began
        raise


def _observe(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    function = ALL_ATTENTION_FUNCTIONS.get_interface(base, eager_function(module))
    output = function(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    mark = getattr(key, "_kvc_mark", None)
    # A model that makes something else of keys or values after the cache is refused by the routes themselves.
    if mark is not None and getattr(value, "_kvc_mark", None) is not None:
        mark.notes.add(mark, _Call(function, module, query, key, value, attention_mask, scaling, kwargs), output[0])
    return output
