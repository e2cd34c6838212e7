"""`CompressedPagedCache`: the transformers Cache contract over paged, compressed storage."""

import contextlib
import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvcompress_hf.compat import Cache, PreTrainedConfig
from kvcompress_hf.errors import CacheFormatError, CacheMemoryError, UnsupportedFeatureError
from kvcompress_hf.gradients import GradientGuard
from kvcompress_hf.io import (
    UnreadPages,
    differing_weights,
    layer_devices,
    load_cache,
    model_identity,
    save_cache,
    weights_fingerprint,
)
from kvcompress_hf.layers import KVHandle, LayerFace, layer_sharing, layer_windows
from kvcompress_hf.paging.key_turn import Rotation
from kvcompress_hf.presets import resolve_rows
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.reports import CacheParts, MemoryReport, RowReport, RunReport, measure_memory, measure_rows
from kvcompress_hf.rotary import key_frequencies
from kvcompress_hf.runtime.attention import PagedAttention
from kvcompress_hf.runtime.call import AttentionCall
from kvcompress_hf.runtime.replay import Capturer, StepReplay
from kvcompress_hf.sequence_indices import as_integer, as_sequences
from kvcompress_hf.validation import MOST_TOKENS, require_bytes, require_int, shown

__all__ = ["CompressedPagedCache", "KVHandle"]


class CompressedPagedCache(Cache):
    """A KV cache of pages, with per-head budgets and keys and values at different precision.

    Made by a patched model at each `generate` call, or by hand and given as `kvcompress=cache`. It only works with
    models prepared by [`patch`]: `update` returns the new tokens alone, and attention reads the pages.

    Args:
        config (`PreTrainedConfig`): The model's config; number of layers and sliding windows are read from it.
        recipe (`str`, `dict`, `Recipe` or a list of these, *optional*): How to compress; the default preset when left
            out. A list has one entry per row of the batch; they may differ in budget, plan and protect.
        prompt_tokens (`int`, *optional*): Length of the prompt when known beforehand; with a prompt that is read in
            chunks, a fraction budget is a fraction of this length from the first chunk on.
        max_bytes (`int` or `str`, *optional*): Most bytes of pages per device, such as `"2GiB"`.

    Raises:
        UnsupportedModelError: If some layers are not plain or sliding-window attention.
        UnsupportedFeatureError: If positions are to be re-indexed and the model's rotary embedding does not allow it.
        ValueError: If the recipe, `prompt_tokens` or `max_bytes` is not valid.
        TypeError: If one of them is of another type.

    Example:

    ```python
    >>> from kvcompress_hf import CompressedPagedCache
    >>> from transformers import LlamaConfig
    >>> cache = CompressedPagedCache(LlamaConfig(num_hidden_layers=2), "k8v4")
    >>> cache.get_seq_length(), cache.memory().total
    (0, 0)

    ```
    """

    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        config: PreTrainedConfig,
        recipe: str | Mapping[str, Any] | Recipe | Sequence[Any] | None = None,
        *,
        prompt_tokens: int | None = None,
        max_bytes: int | str | None = None,
    ) -> None:
        recipes = resolve_rows(recipe)
        self.recipe = recipes[0]
        windows = layer_windows(config)
        limit = None if max_bytes is None else require_bytes("max_bytes", max_bytes)
        if prompt_tokens is not None:
            prompt_tokens = require_int("", "prompt_tokens", prompt_tokens, 1)
        inv_freq = key_frequencies(config, recipes[0], windows)
        attention = PagedAttention(recipes, windows, prompt_tokens, limit, layer_sharing(config), inv_freq)
        self._take_over(attention, config)

    def _take_over(self, attention: PagedAttention, config: PreTrainedConfig) -> None:
        self._attention, self._config = attention, config
        self._model: weakref.ref[nn.Module] | None = None
        self._weights: tuple[int, ...] = ()  # fingerprint of the model's, once it is known
        self._unread: UnreadPages | None = None  # pages of a file that nobody has read yet
        self._recorded_from = attention.seen  # while recording: tokens that are there to stay
        self._pending = [0] * attention.num_layers  # new tokens handed out by update() that attention has not taken
        self._patch: weakref.ref[Any] | None = None  # of the model that began the pass under way
        self._factors: tuple[bool, ...] | None = None  # of the rotary embedding that stored keys were turned with
        self._gradients = GradientGuard(attention.num_layers, filled=attention.seen > 0)
        self.run_report = RunReport(self.recipe, attention)
        layers: list[Any] = [LayerFace(self, i, window is not None) for i, window in enumerate(attention.windows)]
        super().__init__(layers=layers)

    # -- storing and attending -------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands the new keys and values on to attention, tagged with the way back to this cache.

        Nothing is stored yet: that happens in [`CompressedPagedCache.attend`], where the queries are known.

        Args:
            key_states (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`.
            value_states (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`.
            layer_idx (`int`): Index of the layer.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Views of the new keys and values, never of the past.

        Raises:
            UnsupportedFeatureError: If what the last call handed out was never attended to, or the model was unpatched
                during the pass.
        """
        if any(self._pending):
            raise self._never_attended()
        self._pending[layer_idx] = key_states.shape[2]  # before the patch is asked: who takes it off waits for these
        patch = None if self._patch is None else self._patch()  # weak: a cache keeps no model alive
        if self._patch is not None and (patch is None or not patch.installed):
            raise self._never_attended()
        keys, values = key_states.view_as(key_states), value_states.view_as(value_states)
        keys._kvc = values._kvc = KVHandle(self, layer_idx)  # type: ignore[attr-defined]
        return keys, values

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float,
        dense: Callable[[], torch.Tensor],
        softcap: float | None = None,
        sliding_window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Stores new tokens and attends to everything stored.

        Args:
            layer_idx (`int`): Index of the layer.
            query (`torch.Tensor`): `[batch, q_heads, tokens, head_dim]`.
            key (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`, new tokens only.
            value (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`, new tokens only.
            attention_mask (`torch.Tensor`, *optional*): bool or additive, `[batch, 1, tokens, tokens]`; who of the new
                tokens sees whom. A token that may not see itself is padding.
            scaling (`float`): Factor on the logits.
            dense (`Callable`): The stock attention over the new tokens, `[batch, tokens, q_heads, head_dim]`.
            softcap (`float`, *optional*): Soft cap on the logits.
            sliding_window (`int`, *optional*): Window in tokens.
            sinks (`torch.Tensor`, *optional*): Extra logit per query head, `[q_heads]`.

        Returns:
            `torch.Tensor`: `[batch, tokens, q_heads, head_dim]`.

        Raises:
            UnsupportedFeatureError: If the mask is not over the new tokens only.
            CacheMemoryError: If the cache would grow beyond its `max_bytes`.
            CacheFormatError: If the cache comes from a file whose pages are damaged.
            ValueError: If the batch size, heads, head_dim, dtype or device are not those of the stored tokens.
            RuntimeError: If an earlier forward pass stopped half way; its tokens are taken back. Or if the cache had to
                be closed.
        """
        self._pending[layer_idx] = 0
        if self._unread is not None:
            self._check_unread()
        logits = self._attention.layers[layer_idx].logits_of(scaling, softcap, sliding_window, sinks)
        output = self._attention.attend(layer_idx, AttentionCall(query, key, value, logits), attention_mask, dense)
        return self._gradients.after(layer_idx, output, (query, key, value))

    def attend_shared(
        self,
        layer_idx: int,
        source_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float,
        dense: Callable[[], torch.Tensor],
        softcap: float | None = None,
        sliding_window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends to what an earlier layer has stored, and stores nothing.

        Args:
            layer_idx (`int`): Index of the layer that reads.
            source_idx (`int`): Index of the layer whose keys and values it reads.
            query (`torch.Tensor`): `[batch, q_heads, queries, head_dim]`.
            key (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`, the new tokens of the source layer.
            value (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`.
            attention_mask (`torch.Tensor`, *optional*): bool or additive, `[batch, 1, queries, tokens]`.
            scaling (`float`): Factor on the logits.
            dense (`Callable`): The stock attention over the new tokens, `[batch, queries, q_heads, head_dim]`.
            softcap (`float`, *optional*): Soft cap on the logits.
            sliding_window (`int`, *optional*): Window in tokens.
            sinks (`torch.Tensor`, *optional*): Extra logit per query head, `[q_heads]`.

        Returns:
            `torch.Tensor`: `[batch, queries, q_heads, head_dim]`.

        Raises:
            UnsupportedFeatureError: If the config does not say that the source layer is shared.
        """
        logits = self._attention.layers[layer_idx].logits_of(scaling, softcap, sliding_window, sinks)
        new = AttentionCall(query, key, value, logits)
        output = self._attention.attend_shared(layer_idx, source_idx, new, attention_mask, dense)
        return self._gradients.after_shared(source_idx, output, (query, key, value))

    def is_awaited(self, layer_idx: int | None = None) -> bool:
        """Whether keys and values that `update` handed out for a layer have not been attended to yet.

        Args:
            layer_idx (`int`, *optional*): Index of the layer; any of them when left out.

        Returns:
            `bool`: False once [`CompressedPagedCache.attend`] has taken them; who comes then only reads.
        """
        return any(self._pending) if layer_idx is None else self._pending[layer_idx] > 0

    def begin_pass(self, patch: Any, factors: tuple[bool, ...], rotations: Sequence[Rotation | None] = ()) -> None:
        """Called by a patched model before each forward pass.

        Args:
            patch (`PatchRecord`): Of that model; a pass stops when it is taken off meanwhile.
            factors (`tuple[bool, ...]`): Per long rope, whether new tokens are turned with its long factors.
            rotations (`Sequence[Rotation | None]`): How position turns each layer's queries, for observers that ask.

        Raises:
            UnsupportedFeatureError: If stored keys were turned with other factors.
        """
        if self._patch is None and any(self._pending):  # handed out to a model that was not patched
            raise self._never_attended()
        self._pending = none = [0] * len(self._pending)  # some may be of a pass that stopped half way
        self._patch, self._attention.rotations = weakref.ref(patch), rotations
        if not self.get_seq_length():
            self._factors, self._gradients = factors, GradientGuard(len(none), filled=False)
        elif factors != (self._factors or ()):
            raise UnsupportedFeatureError(
                f"The long rope of this model changes its factors between the {self.get_seq_length()} tokens that the "
                "cache holds and the new ones, so the stored keys would be asked with queries of another kind. Read "
                "the whole text again in one chunk, with an empty cache; generate() does it by itself when it is "
                "given the whole text."
            )

    def check_attended(self) -> None:
        """Called by a patched model after each forward pass that came to its end.

        Raises:
            UnsupportedFeatureError: If keys that `update` handed out in it were never attended to: they are not stored,
                and whatever the model said came about without them.
        """
        if any(self._pending):
            raise self._never_attended()

    def _never_attended(self) -> UnsupportedFeatureError:
        """Forgets keys that wait and takes the rest of their pass back; the error is for the caller to raise."""
        left_out = [i for i, tokens in enumerate(self._pending) if tokens]
        self._pending = [0] * len(self._pending)
        self._attention.give_up_pass(left_out)
        return UnsupportedFeatureError(
            f"Keys of layer {next(iter(left_out), 0)} went to a CompressedPagedCache but never to its attention: the "
            "model is not patched, its attention was changed after patching (call kvcompress_hf.patch(model)), or it "
            "makes something else of the keys before it attends. Or the last forward pass stopped half way there: "
            "then repeat it."
        )

    def read_with(self, borders: tuple[int, ...]) -> tuple[bool, ...]:
        """Per long rope of a model, whether the stored keys were turned with its long factors.

        Args:
            borders (`tuple[int, ...]`): Lengths in tokens beyond which these are used.

        Returns:
            `tuple[bool, ...]`: As noted when they were stored; of a cache from a file, by its length.
        """
        if self._factors is None:
            self._factors = tuple(self.get_seq_length() > border for border in borders)
        return self._factors

    # -- lengths and masks -----------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding and evicted ones included; one number for all layers, heads and sequences.

        Args:
            layer_idx (`int`): Ignored: under pipeline parallelism layer 0 may live elsewhere.

        Returns:
            `int`: Logical length in tokens.
        """
        return self._attention.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Lets transformers build masks over the new tokens only.

        Args:
            query_length (`int`): New tokens.
            layer_idx (`int`): Index of the layer.

        Returns:
            `tuple[int, int]`: `(query_length, tokens seen)`: length and offset of the keys under the mask.
        """
        return query_length, self._attention.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The cache has no maximum length.

        Args:
            layer_idx (`int`, *optional*): Ignored.

        Returns:
            `int`: -1, which says so to transformers.
        """
        return -1

    @property
    def is_initialized(self) -> bool:
        """`bool`: Whether any token has arrived."""
        return self._attention.seen > 0

    @property
    def dtypes(self) -> set[torch.dtype]:
        """`set[torch.dtype]`: Dtypes in which keys and values arrived."""
        return {store.geometry.dtype for store in self._attention.stores}

    @property
    def batch_size(self) -> int:
        """`int`: Sequences held, -1 while empty."""
        return self._attention.batch or -1

    # -- the past as a whole ---------------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        """Holds new tokens back in the tail until [`CompressedPagedCache.crop`] says which of them stay."""
        self._set_recording(True)

    def stop_past_recording(self) -> None:
        """Commits what was held back; new tokens are no longer held back."""
        self._set_recording(False)

    @property
    def awaits_second_reading(self) -> bool:
        """`bool`: Whether the prompt is to be read again before it is compressed (`ReconstructionScores`)."""
        return self._attention.awaits_second_reading

    def second_reading(self) -> AbstractContextManager[None]:
        """While it lasts, tokens that the model is given are looked at and not stored; then the prompt is compressed.

        Returns:
            `AbstractContextManager`: For a `with` block around forward passes over tokens of the prompt.
        """
        return self._attention.second_reading()

    def tokens_until_packing(self) -> int:
        """How many more tokens fit into the tail before it is packed.

        Returns:
            `int`: Number of tokens, at least 0.
        """
        return self._attention.tokens_until_packing()

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether new tokens are held back.

        Args:
            layer_idx (`int`): Ignored: all layers record alike.

        Returns:
            `bool`: True between `activate_past_recording` and its end.
        """
        return self._attention.recording

    def _set_recording(self, value: bool) -> None:
        if self._attention.recording and not value:
            self._attention.crop(0)
        if value and not self._attention.recording:
            self._recorded_from = self._attention.seen
        self._attention.recording = value

    def withdraw_recorded(self) -> None:
        """Stops recording and forgets all tokens since the last `crop`, as nobody will say which of them stay."""
        with contextlib.suppress(RuntimeError):  # a pass that stopped half way is taken back; the interrupt says why
            self._attention.settle()
        if self._attention.recording and self._attention.rollback.closed is None:
            self._attention.crop(max(0, self._attention.seen - self._recorded_from))
        self._attention.recording = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest tokens, exactly; with 0 what was recorded is committed.

        Args:
            tokens_to_remove (`int`): 0 or negative: minus the number of tokens to forget.

        Raises:
            ValueError: If the number is positive, or not an integer.
            UnsupportedFeatureError: If some of these tokens have been compressed with eviction already.
            CacheMemoryError: If what was recorded does not fit. All tokens are there still, and recording goes on; some
                may have been committed.
        """
        tokens_to_remove = as_integer("tokens_to_remove", tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes minus the number of tokens to forget, got {tokens_to_remove}; write crop(-n)."
            )
        try:
            self._attention.crop(-tokens_to_remove)
        except CacheMemoryError:
            self._recorded_from = self._attention.seen  # some may have been committed
            raise
        self._recorded_from = self._attention.seen

    def reset(self) -> None:
        """Forgets everything and gives all memory back; nothing is recorded any more."""
        self._attention.reset()
        self._attention.recording, self._recorded_from = False, 0
        self._pending = [0] * len(self._pending)
        self._factors, self._gradients = None, GradientGuard(len(self._pending), filled=False)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Makes sequence `i` what sequence `beam_idx[i]` was; pages are shared, not copied.

        Args:
            beam_idx (`torch.Tensor`): `int64` `[batch]`.

        Raises:
            ValueError: If they are not indices of sequences held; nothing has changed then.
        """
        self._attention.select(as_sequences("beam_idx", beam_idx, self._attention.batch))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the named sequences, in the given order.

        Args:
            indices (`torch.Tensor`): `int64` `[new batch]`, negative ones counting from the last sequence; or `bool`
                `[batch]`.

        Raises:
            ValueError: If they are not indices of sequences held, or none; nothing has changed then.
        """
        self._attention.select(as_sequences("indices", indices, self._attention.batch))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence in place; pages are shared, not copied.

        Args:
            repeats (`int`): Copies of each sequence, at least 1.

        Raises:
            ValueError: If it is no such number; nothing has changed then.
        """
        repeats = as_integer("repeats", repeats)
        if repeats < 1 or repeats * max(1, self._attention.batch) > MOST_TOKENS:
            raise ValueError(f"repeats is {shown(repeats)}; it must be an integer of at least 1.")
        self._attention.select(torch.arange(self._attention.batch).repeat_interleave(repeats))

    def fork(self) -> "CompressedPagedCache":
        """A second cache with the same past; whoever writes first copies what it writes to.

        Returns:
            `CompressedPagedCache`: The copy; forks of forks work alike.
        """
        other = CompressedPagedCache.__new__(type(self))
        other.recipe = self.recipe
        other._take_over(self._attention.fork(), self._config)
        other._model, other._weights, other._unread = self._model, self._weights, self._unread
        other._factors, other._recorded_from = self._factors, self._recorded_from
        other._gradients = self._gradients.copy()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompressedPagedCache":
        return self.fork()

    def __copy__(self) -> "CompressedPagedCache":
        # Two objects over one inside would each give the same pages back.
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "A CompressedPagedCache is not pickled: its pages lie in memory of their own, which copies share. Write it "
            "to a file with cache.save(path) and read it with CompressedPagedCache.load(path, model), in another "
            "process too. Of what generate() returned, pickle the other parts, such as output.sequences, by themselves."
        )

    def __del__(self) -> None:
        attention = getattr(self, "_attention", None)
        if attention is None or sys.is_finalizing():
            return
        try:
            if "run_report" in self.__dict__:  # not yet in a fork that was stopped while it was made
                self.run_report.freeze(waiting=False)
        finally:
            attention.abandon()  # forks share an arena, so a cache that goes must hand its pages back

    # -- to a file and back ----------------------------------------------------------------------------------------

    def belongs_to(self, model: nn.Module) -> None:
        """Notes whose keys and values these are, so that the cache and its files are not used with another model.

        `generate` and `prefill` call it.

        Args:
            model (`nn.Module`): The model; held weakly.

        Raises:
            ValueError: If what the cache holds was made with other weights. A sample of a few weights is compared.
        """
        weights = weights_fingerprint(model)
        if self._attention.seen and self._weights and differing_weights(self._weights, weights):
            raise ValueError(
                f"This cache holds {self._attention.seen} tokens that were read with other weights than those of the "
                f"{type(model).__name__} given now (another checkpoint, a fine-tuned or merged one, an adapter?), so "
                "its keys and values mean nothing to it. Use a fresh cache, or prefill again with this model."
            )
        self._model, self._weights = weakref.ref(model), weights

    def step_replay(self, capturer: Capturer) -> StepReplay:
        """Lets steps of one token be captured and replayed; for `generate(..., kvcompress={"graph": True})`.

        Args:
            capturer (`Capturer`): Records and replays what a step starts on the device.

        Returns:
            `StepReplay`: The steps of this cache.
        """
        return StepReplay(self._attention, capturer)

    def is_of(self, model: nn.Module) -> bool:
        """Whether [`CompressedPagedCache.belongs_to`] was last called with this very model.

        Args:
            model (`nn.Module`): The model.

        Returns:
            `bool`: False also where nothing is known of the cache's model.
        """
        return self._model is not None and self._model() is model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache to one safetensors file: packed pages as they are, tail, tables, recipe, model.

        The cache can be used on afterwards. What is not needed to go on (the prompt's tokens) is not written. The file
        appears under its name when it is whole, on disk and has been checked; until then a file that was there stays.
        Its permissions are kept. A symbolic link is followed: what it points to is replaced.

        Args:
            path (`str` or `os.PathLike`): Where.

        Raises:
            IsADirectoryError: If there is a folder of that name.
            FileExistsError: If there is a device, pipe or socket of that name.
            OSError: If the file cannot be written; nothing is left behind then.
            RuntimeError: If called in the middle of a forward pass, while recorded tokens wait for `crop`, or if the
                file could not be loaded again.

        Example:

        ```python
        >>> cache = kvc.prefill(model, ids, "k8v4")  # doctest: +SKIP
        >>> cache.save("document.kvc.safetensors")  # doctest: +SKIP
        >>> cache = kvc.CompressedPagedCache.load("document.kvc.safetensors", model)  # doctest: +SKIP

        ```
        """
        self._check_unread()
        model = None if self._model is None else self._model()
        save_cache(self._attention, model_identity(self._config, model), path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        *,
        max_bytes: int | str | None = None,
    ) -> "CompressedPagedCache":
        """Reads a cache from a file of [`CompressedPagedCache.save`]; generation goes on with the very same tokens.

        Header, tables and lengths are read and checked at once. On the CPU the pages stay in the file, mapped into
        memory: they are read, and their checksum is compared, when attention first needs them. What is written to them
        later stays in memory. Do not change or shorten the file in place while the cache is in use; to save over it
        is safe.

        Args:
            path (`str` or `os.PathLike`): The file. It need not be trusted.
            model (`PreTrainedModel`): The model that goes on; patched or not yet.
            max_bytes (`int` or `str`, *optional*): Most bytes of pages per device, such as `"2GiB"`.

        Returns:
            `CompressedPagedCache`: A cache that holds what was saved.

        Raises:
            CacheFormatError: If the file is damaged, of another format version, or was made with another model; the
                message says what differs.
            CacheMemoryError: If it holds more than `max_bytes`.
            TypeError: If `model` is not a transformers model, or `max_bytes` neither a number of bytes nor a size.
            ValueError: If `max_bytes` is not positive or not a size.
        """
        if not isinstance(model, PreTrainedModel):
            inner = " (give the inner one: model.get_base_model())" if hasattr(model, "get_base_model") else ""
            raise TypeError(f"load() takes the model that goes on with the cache, got {type(model).__name__}{inner}.")
        windows = layer_windows(model.config)
        loaded = load_cache(
            path,
            model_identity(model.config, model),
            windows,
            layer_devices(model, len(windows)),
            None if max_bytes is None else require_bytes("max_bytes", max_bytes),
            layer_sharing(model.config),
        )
        try:
            loaded.attention.inv_freq = key_frequencies(model.config, loaded.attention.recipe, windows)
        except UnsupportedFeatureError as error:
            raise CacheFormatError(f"{os.fspath(path)} cannot be used with this model: {error}") from error
        cache = cls.__new__(cls)
        cache.recipe = loaded.attention.recipe
        cache._take_over(loaded.attention, model.config)
        cache._unread = loaded.unread
        cache.belongs_to(model)
        return cache

    def _check_unread(self) -> None:
        if self._unread is not None:
            self._unread.check()
            self._unread = None

    # -- looking inside --------------------------------------------------------------------------------------------

    def memory(self) -> MemoryReport:
        """What the cache has allocated, by kind.

        Returns:
            `MemoryReport`: Bytes by kind; prints as a table.
        """
        return measure_memory(self._attention)

    def slots(self) -> list[torch.Tensor]:
        """Slots kept by each head, packed or in the tail; what [`plot_slots`] draws.

        Returns:
            `list[torch.Tensor]`: Per layer `int64` `[batch, kv_heads]`; no heads for a layer that never ran.
        """
        return self._attention.slots_per_head()

    def rows(self) -> list[RowReport]:
        """Every row of the cache, one per layer, sequence and KV head, in this order.

        Returns:
            `list[RowReport]`: Slots per tier, tail, pages, bytes, and where they are stored positions.

        Raises:
            CacheFormatError: If the cache comes from a file whose pages are damaged.
        """
        self._check_unread()
        return measure_rows(self._attention)

    def inspect(self) -> CacheParts:
        """The parts that the cache is made of, for tests, tools and the curious; nothing of them may be changed.

        Returns:
            `CacheParts`: Stores, arenas, statistics and the like, as they are now.

        Example:

        ```python
        >>> cache = kvc.prefill(model, ids, "k8v4")  # doctest: +SKIP
        >>> [tier.key_bits for tier in cache.inspect().stores[0].layout.tiers]  # doctest: +SKIP
        [8]

        ```
        """
        return CacheParts.of(self._attention)

    def __repr__(self) -> str:
        # Cheap, since transformers puts it into warnings at every call: nothing on a device is read for it.
        return (
            f"CompressedPagedCache(recipe={self.recipe.name!r}, layers={len(self)}, batch={self._attention.batch}, "
            f"tokens={self.get_seq_length()})"
        )
