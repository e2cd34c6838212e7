"""The cache of the patched model in a dry run: compares at every layer, and goes on with stock attention's output."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import PreTrainedConfig
from kvcompress_hf.layers import layer_sharing
from kvcompress_hf.patches.dry_run.compare import limit, of_vectors
from kvcompress_hf.patches.dry_run.made_up import MadeUp, make_up
from kvcompress_hf.patches.dry_run.stock import Notes, Observed, Place
from kvcompress_hf.patches.dry_run.trial import LONGEST_PAST
from kvcompress_hf.presets import get_preset
from kvcompress_hf.runtime.attention import PagedAttention

__all__ = ["ProbeCache"]

Inputs = tuple[Tensor, Tensor, Tensor]


class ProbeCache(CompressedPagedCache):
    """Passes on to lossless caches, but with made-up queries, keys and values in the place of the model's own.

    It does so twice: in the dtype of the model's keys, and in float32, where no fault can hide behind rounding. What
    the model gets back is the output of the stock layer.

    Args:
        config (`PreTrainedConfig`): The model's config.
        notes (`Notes`): Of the stock model.
    """

    def __init__(self, config: PreTrainedConfig, notes: Notes) -> None:
        super().__init__(config, get_preset("lossless"))
        self.step = 0
        #: What was found, in the order of the layers.
        self.faults: list[str] = []
        self._notes = notes
        self._places: set[Place] = set()
        self._asked = CompressedPagedCache(config, get_preset("lossless"))
        self._asked_exactly = CompressedPagedCache(config, get_preset("lossless"))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """See [`CompressedPagedCache.get_seq_length`]; a made-up past counts."""
        return self._notes.trial.past or self._asked.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """See [`CompressedPagedCache.get_mask_sizes`]; a made-up past counts."""
        if self._notes.trial.past:
            return query_length, self._notes.trial.past
        return self._asked.get_mask_sizes(query_length, layer_idx)

    def end_pass(self) -> None:
        """Finds the layers that attended in this pass of the stock model and did not ask this cache."""
        for place, stock in self._notes.calls.items():
            if place[0] == self.step and place not in self._places:
                tokens = stock.inputs[1].shape[2]
                self._fault(stock, f"never asks the compressed cache: of {tokens} new tokens it stored 0")

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
    ) -> Tensor:
        """As [`CompressedPagedCache.attend`], but returns what stock attention returned here."""
        self._pending[layer_idx] = 0
        return self._check(layer_idx, None, (query, key, value), attention_mask, how)

    def attend_shared(
        self,
        layer_idx: int,
        source_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **how: Any,
    ) -> Tensor:
        """As [`CompressedPagedCache.attend_shared`], but returns what stock attention returned here."""
        return self._check(source_idx, layer_idx, (query, key, value), attention_mask, how)

    def _check(
        self, layer: int, reader: int | None, inputs: Inputs, mask: Tensor | None, how: Mapping[str, Any]
    ) -> Tensor:
        place = (self.step, layer, sum((self.step, layer) == each[:2] for each in self._places))
        self._places.add(place)
        stock = self._notes.calls.get(place)
        if stock is None:
            self.faults.append(f"layer {layer} asks the compressed cache where the stock layer does not attend to it")
            output: Tensor = how["dense"]()
            return output
        shapes = [x.shape for x in inputs]
        self._compare_inputs(stock, inputs)
        if shapes == [x.shape for x in stock.inputs]:
            if self._notes.trial.span(self.step)[0] == 0:
                self._compare(stock, "attention over a first chunk", how["dense"](), stock.output)
            self._compare_window(stock, layer, how.get("sliding_window"))
            self._ask(stock, layer, reader, inputs, mask, how)
        return stock.output.clone()

    def _compare_inputs(self, stock: Observed, inputs: Inputs) -> None:
        for name, ours, theirs in zip(("queries", "keys", "values"), inputs, stock.inputs, strict=True):
            allowed = limit(ours.dtype, theirs.dtype)
            found = of_vectors(ours, theirs, self._real(ours.shape[2])[:, None])
            if found > allowed:
                self._fault(
                    stock,
                    f"hands other {name} to the compressed cache than the stock layer attends with (of another layer, "
                    "or turned by their positions twice or not at all?)",
                    found,
                    allowed,
                )

    def _compare_window(self, stock: Observed, layer: int, given: int | None) -> None:
        """Windows too long to be left in a dry run are at least told to the cache as the config has them."""
        window = self._attention.windows[layer]
        if window is not None and window > LONGEST_PAST and given != window:
            self._fault(stock, f"has a sliding window of {window} tokens, and the compressed cache was told {given}")

    def _ask(
        self,
        stock: Observed,
        layer: int,
        reader: int | None,
        inputs: Inputs,
        mask: Tensor | None,
        how: Mapping[str, Any],
    ) -> None:
        query, key, _ = inputs
        start, stop = self._notes.trial.span(self.step)
        made = make_up(query, key, self._notes.trial.length, stock.scaling, layer, key.dtype)
        new = (made.query[:, :, stop - query.shape[2] : stop], *made.part(stop - key.shape[2], stop)[1:])
        # Dense attention over a first chunk was compared already; later nobody may fall back on it.
        dense = stock.made_up if start == 0 else torch.full_like(stock.made_up, torch.nan)
        for cache in (self._asked, self._asked_exactly):
            dtype = key.dtype if cache is self._asked else torch.float32
            if cache is self._asked_exactly and dtype is key.dtype:
                continue
            call = _Call(mask, {**how, "dense": lambda dtype=dtype: dense.to(dtype)})
            with torch.autocast(key.device.type, enabled=False):
                if self._notes.trial.past:
                    past = _PastOfOneLayer(self._config, self._attention.windows[layer], layer, made, dtype)
                    output = past.ask(self._notes.trial.past, _cast(new, dtype), reader is not None, call)
                else:
                    output = call.put(cache, layer, reader, _cast(new, dtype))
            self._compare(stock, _what(start, stop), output, stock.made_up)

    def _compare(self, stock: Observed, what: str, ours: Tensor, theirs: Tensor) -> None:
        real = self._real(theirs.shape[1])[:, :, None]
        found, allowed = of_vectors(ours, theirs, real), limit(ours.dtype)
        if found > allowed:
            self._fault(stock, f"does not get the same from {what}", found, allowed)

    def _real(self, tokens: int) -> Tensor:
        return self._notes.trial.real_of(self.step)[:, -tokens:]

    def _fault(self, stock: Observed, what: str, found: float | None = None, allowed: float = 0.0) -> None:
        by = "" if found is None else f" (relative difference {found:.2g}, rounding explains {allowed:.2g})"
        self.faults.append(f"{stock.name} {what}{by}")


class _Call:
    """How a layer attends: its mask and the arguments that go with it."""

    def __init__(self, mask: Tensor | None, how: Mapping[str, Any]) -> None:
        self._mask, self._how = mask, how

    def put(self, cache: CompressedPagedCache, layer: int, reader: int | None, inputs: Inputs) -> Tensor:
        """The call on a cache, by the layer itself or by one that reads its keys and values."""
        if reader is None:
            return cache.attend(layer, *inputs, self._mask, **self._how)
        return cache.attend_shared(reader, layer, *inputs, self._mask, **self._how)

    def unmasked(self, dense: Callable[[], Tensor]) -> "_Call":
        """The same without a mask and with other dense attention."""
        return _Call(None, {**self._how, "dense": dense})


class _PastOfOneLayer:
    """A cache that holds the made-up past of one layer and goes after the call: a long past of all would be large."""

    def __init__(
        self, config: PreTrainedConfig, window: int | None, layer: int, made: MadeUp, dtype: torch.dtype
    ) -> None:
        shared = layer_sharing(config)[layer] == "store"
        attention = PagedAttention(
            [get_preset("lossless")], [window] * (1 + shared), sharing=["store", "reuse"] if shared else None
        )
        self._cache = CompressedPagedCache.__new__(CompressedPagedCache)
        self._cache.recipe = attention.recipe
        self._cache._take_over(attention, config)
        self._shared, self._made, self._dtype = shared, made, dtype

    def ask(self, past: int, new: Inputs, reads: bool, call: _Call) -> Tensor:
        """What new tokens get behind `past` others, `[rows, tokens, q_heads, head_dim]`."""
        first = _cast(self._made.part(0, past), self._dtype)
        unasked = call.unmasked(lambda: first[0].transpose(1, 2))
        unasked.put(self._cache, 0, None, first)
        if self._shared:  # the layer that reads ends a forward pass
            unasked.put(self._cache, 0, 1, first)
        if not reads:
            return call.put(self._cache, 0, None, new)
        tokens = new[1].shape[2]
        every = self._made.part(past, past + tokens)[0].to(self._dtype)
        unasked.put(self._cache, 0, None, (every, *new[1:]))
        return call.put(self._cache, 0, 1, new)


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    query, key, value = (x.to(dtype) for x in inputs)
    return query, key, value


def _what(start: int, stop: int) -> str:
    new = stop - start
    if start == 0:
        return "the compressed cache over a first chunk"
    tokens = "1 new token" if new == 1 else f"{new} new tokens"
    return f"the compressed cache for {tokens} behind {start} others: mask, window, soft cap, sinks or scaling"
