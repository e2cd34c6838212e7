"""Attention of one cache: `attend()` and `attend_shared()`, and the forward pass that they are parts of.

Three cases (`docs/how_it_works.md`): a first chunk with nothing stored uses the model's own dense attention; a later
chunk reads the packed past, the tail and the new block in one kernel; a single token is appended to the tail and
attends to everything in one native call. When the last layer of a forward pass is through, the tail is packed, the
recipe's plan is made over all layers at once, and pages that came free go back.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from kvcompress_hf.errors import CacheMemoryError, UnsupportedFeatureError
from kvcompress_hf.kernels import DecodePlan
from kvcompress_hf.paging.store import PagedStore
from kvcompress_hf.paging.waiting import known_as, on_host
from kvcompress_hf.recipe import TIERS
from kvcompress_hf.runtime.call import AttentionCall, centred
from kvcompress_hf.runtime.layer_work import LayerWork
from kvcompress_hf.runtime.padding import aligned
from kvcompress_hf.runtime.state import AttentionState, Counters, LayerState, RunStatistics, layout_for

__all__ = ["AttentionState", "PagedAttention", "RunStatistics", "layout_for"]


class PagedAttention(LayerWork):
    """Runs attention over one cache; after the last layer of a forward pass it packs, plans and evicts.

    Arguments are those of [`CacheState`].
    """

    # -- one layer -------------------------------------------------------------------------------------------------

    def attend(
        self, layer_idx: int, new: AttentionCall, mask: torch.Tensor | None, dense: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Attends from new tokens to everything stored and to themselves, and stores them.

        What [`CompressedPagedCache.attend`] says of shapes and errors holds here too.

        Args:
            layer_idx (`int`): Index of the layer.
            new (`AttentionCall`): The new tokens, keys as the model made them. Position, padding and mask are found
                here and noted in it.
            mask (`torch.Tensor`, *optional*): The model's mask. A token that may not see itself is padding.
            dense (`Callable[[], torch.Tensor]`): The model's own attention, for the first chunk.

        Returns:
            `torch.Tensor`: Output of attention, `[batch, tokens, q_heads, head_dim]`.
        """
        last = layer_idx == len(self.layers) - 1 and not self._reading_again and not self._capturing
        try:
            output = self._attend(layer_idx, new, mask, dense)
            if last:
                self._end_forward()
                self.rollback.note = None  # an interrupt before this takes the pass back, a later one finds it ended
                self._beginning = None
        except BaseException as error:
            self._stop(error)
            raise
        return output

    def _attend(
        self, layer_idx: int, new: AttentionCall, mask: torch.Tensor | None, dense: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        layer, counters, key = self.layers[layer_idx], self.counters, new.key
        batch, heads, tokens, _ = key.shape
        _, q_heads, queries, _ = new.query.shape
        position = new.position = layer.seen
        if self._capturing:
            _check_says_nothing(mask)
            mask = None
        elif position >= counters.seen and not self._reading_again:
            self._begin_forward(tokens, mask, key)
            counters = self.counters
        store = layer.store
        if store is None:
            store = self._first_keys(layer_idx, key)
        geometry = store.geometry
        if heads != geometry.kv_heads or batch != counters.batch or key.dtype is not geometry.dtype:
            raise ValueError(
                f"Layer {layer_idx} holds {self.batch} sequences x {geometry.kv_heads} KV heads in "
                f"{geometry.dtype}, but keys of shape {tuple(key.shape)} in {key.dtype} arrived; use a fresh "
                "cache."
            )
        if mask is not None:
            read = self._read_mask(mask)
            new.valid = read.real_tokens(queries, tokens, batch)
            if self._new_valid is not None and not self._reading_again:
                known_as(new.valid, self._new_valid)
            if tokens > 1 or not position or read.biased:  # a decoded token sees all there is
                new.mask = None if read.says_nothing(new.logits.window) else read
        layer.group = q_heads // heads
        looked_at = self.recording or self._observes_steps or self._reading_again
        if tokens == 1 and position and new.mask is None and not looked_at:  # nobody else needs the key centred
            output = self._decode(layer, store, new, centred=False)
            layer.seen = position + 1
            if position == counters.seen:
                counters.seen = position + 1
            return output
        if (self.recipe.centres_keys or self.recipe.feeds_back) and (not position or tokens > 1):
            self._settle_keys(layer, store, new)
        new.key = centred(key, store.key_shift_of(layer.index))
        if self._reading_again:
            return self._read_again(layer, store, new.detached())
        if tokens == 1 and position and new.mask is None:
            output = self._decode(layer, store, new, centred=True)
        elif self._verifies(layer, new):
            outputs = []
            for token in new.singly():
                outputs.append(self._decode(layer, store, token, centred=True))
                layer.seen += 1
            output = torch.cat(outputs, dim=1)
        else:
            if not position and _in_one_kernel(store, new):
                dense = partial(new.detached().attend, store, layer.index, None, position=0)
            output = self._chunk(layer, store, new.detached(), dense)
        layer.seen = position + tokens
        counters.seen = max(counters.seen, layer.seen)
        return output

    def _first_keys(self, layer_idx: int, key: torch.Tensor) -> PagedStore:
        """Finds or makes the store of a layer whose first keys have arrived."""
        note = self.rollback.note
        if note is not None and note.counters.seen:
            missed = note.counters.seen
            self._waiting.clear()
            self.rollback.commit()
            self.reset()
            raise RuntimeError(
                f"A forward pass stopped half way, so layer {layer_idx} has not seen the first {missed} tokens. "
                "The cache has been emptied: begin again with the first token."
            )
        return self.place(layer_idx, key)

    def _settle_keys(self, layer: LayerState, store: PagedStore, new: AttentionCall) -> None:
        """Decides how keys are stored, for the sequences whose first tokens these are: padding is no token."""
        first = None
        if new.position:
            note = self.rollback.note
            padding = None if note is None or self._reading_again else note.counters.padding
            if padding is None or not bool((on_host(padding) == new.position).any()):
                return
            first = padding == new.position
        real = self._new_valid  # known already while a prompt is read
        if real is None and new.valid is not None:
            real = on_host(new.valid)
        seen, _ = aligned(new, real)
        if self.recipe.feeds_back:
            store.settle_key_feedback(layer.index, seen.query.detach(), seen.valid, first)
        # Neither a soft cap nor a sink's logit is moved along with the keys' logits, so keys stay whole.
        if not self.recipe.centres_keys or new.logits.softcap is not None or new.logits.sinks is not None:
            return
        looks = None if self.recipe.centre_keys else seen.query.detach()[:, :, -32:] * new.logits.scale
        bits = min((TIERS[name][0] for name in self.recipe.tiers if TIERS[name][0]), default=8)
        store.settle_key_shift(layer.index, seen.key.detach(), seen.valid, looks, bits, first)

    def attend_shared(
        self,
        layer_idx: int,
        source_idx: int,
        new: AttentionCall,
        mask: torch.Tensor | None,
        dense: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Attends with the queries of one layer to the keys and values of an earlier one; stores and scores nothing.

        What [`CompressedPagedCache.attend_shared`] says of shapes and errors holds here too.

        Args:
            layer_idx (`int`): Index of the layer that reads.
            source_idx (`int`): Index of the layer whose keys and values it reads.
            new (`AttentionCall`): Queries of the layer that reads, new keys and values of the other.
            mask (`torch.Tensor`, *optional*): The model's mask.
            dense (`Callable[[], torch.Tensor]`): The model's own attention, for the first chunk.

        Returns:
            `torch.Tensor`: Output of attention, `[batch, queries, q_heads, head_dim]`.
        """
        last = layer_idx == len(self.layers) - 1
        try:
            if mask is not None:
                read = self._read_mask(mask)
                new.mask = None if read.says_nothing(new.logits.window) else read
            output = self._attend_shared(layer_idx, source_idx, new, dense)
            if last:
                self._end_forward()
                self.rollback.note = None
                self._beginning = None
        except BaseException as error:
            self._stop(error)
            raise
        return output

    def _attend_shared(
        self, layer_idx: int, source_idx: int, new: AttentionCall, dense: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        source, tokens, queries = self.layers[source_idx], new.tokens, new.query.shape[2]
        mask = None if new.mask is None else new.mask.tensor
        if source.sharing != "store" or source.store is None:
            raise UnsupportedFeatureError(
                f"Layer {layer_idx} attends to the keys and values of layer {source_idx}, but the model's config does "
                "not say that layer is shared (kv_sharing_modes), so they have not been kept for it."
            )
        if mask is not None and (mask.dim() != 4 or mask.shape[-2:] != (queries, tokens)):
            raise UnsupportedFeatureError(
                f"Got an attention mask of shape {tuple(mask.shape)} for {queries} queries and {tokens} new "
                "tokens; a compressed cache needs one over the new tokens only."
            )
        position = source.seen - tokens
        store = source.store
        # Stock attention without a mask takes the first query for the first token, which it is not if there are fewer.
        if position == 0 and (mask is not None or queries in (1, tokens)):
            if queries == tokens and _in_one_kernel(store, new):
                return new.detached().attend(store, source.index, None, position=0)
            return dense()
        new.key, new.position = centred(new.key, store.key_shift_of(source.index)), position
        store.reserve_tail(source.tail_used)
        tail = store.tail(source.index)
        if tokens == 1:
            # The token is in the tail already; it comes as a new key, as in a chunk that is not stored yet.
            newest = 1 if new.mask is None else new.mask.real_tokens(1, 1, self.batch)[:, 0].to(torch.int32)
            tail = replace(tail, lengths=tail.lengths - newest)
        at = source.seen - queries
        return new.detached().attend(store, source.index, tail, position=at, key_position=position)

    @contextlib.contextmanager
    def second_reading(self) -> Iterator[None]:
        """While it lasts, tokens are attended to and observed, but not stored; then what was put off is planned."""
        self.settle()
        if any(layer.sharing is not None for layer in self.layers):
            raise UnsupportedFeatureError(
                f"The recipe {self.recipe.name!r} reads the prompt a second time, which is not available for models "
                "whose layers share keys and values; take a recipe with another observer, such as 'auto'."
            )
        with self.rollback.whole(statistics=True):
            self._reading_again = True
            try:
                yield
            finally:
                self._reading_again = False
            self.counters.awaits_second_reading = False
            if self.recipe.evicts and self.recipe.when.prefill:
                started = time.perf_counter()
                self.counters.unfinished = True  # the plan of a prompt
                self.compression.plan()
                self.counters.unfinished = False
                self.compression.drop_feedback()
                self.give_back()
                self.statistics.seconds_planning += time.perf_counter() - started
                self.note_peak()

    # -- passes that are captured and replayed ---------------------------------------------------------------------

    def ready_to_capture(self) -> list[DecodePlan]:
        """Prepares a pass of one token per sequence to be captured; from here on nothing it reads moves by itself.

        Returns:
            `list[DecodePlan]`: The plan of each layer. A pass that is captured now is right as long as
            [`PagedAttention.plans`] gives these very plans.

        Raises:
            RuntimeError: If some layer has not run yet.
        """
        ready = [(layer, layer.store, layer.logits) for layer in self.layers if layer.store and layer.logits]
        if len(ready) < len(self.layers):
            raise RuntimeError("A step can be captured once all layers have run one.")
        for layer, store, _ in ready:
            self._keep_tail_room(layer, store)
            if self._adds_up and store.arena.shared:
                store.own_all()
        plans = []
        for layer, store, logits in ready:
            with store.reading:
                plan = self._plan_of(layer, store, logits, centred=False)
                plan.set_clock(layer.seen)
                plans.append(plan)
        return plans

    def plans(self) -> list[DecodePlan | None]:
        """The decode plans as they are; who asks holds `reading` of all stores.

        Returns:
            `list[DecodePlan | None]`: One per layer, `None` where a new one is needed.
        """
        found: list[DecodePlan | None] = []
        for layer in self.layers:
            store, plan = layer.store, None
            if store is not None and layer.plan_key[0] == store.version and layer.tail_used < layer.plan_room:
                plan = store.tensors.plans.get(layer.index)
            found.append(plan)
        return found

    @property
    def looks_at_steps(self) -> bool:
        """`bool`: Whether the observer is asked at every decode step, on the host."""
        return self._observes_steps or self._remembers

    @property
    def _adds_up(self) -> bool:
        """Whether decode steps add to statistics of stored slots."""
        return bool(self._sum_field or self._square_field)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """While it lasts, one pass of one token is captured. Nothing of it happens, so what it counts is forgotten."""
        counted = [(layer.seen, layer.tail_used, layer.uneven, layer.tails) for layer in self.layers]
        seen = self.counters.seen
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False
            self.counters.seen = seen
            for layer, before in zip(self.layers, counted, strict=True):
                layer.seen, layer.tail_used, layer.uneven, layer.tails = before
                self._tell_plan(layer)

    def replay(self, start: Callable[[], bool]) -> bool:
        """A pass of one token per sequence that has been captured: counted as if it had been run, and packed after.

        The device moves clocks and lengths of tails on; the host does so here with its own, and asks for nothing.

        Args:
            start (`Callable[[], bool]`): Starts the captured pass, or returns False if it must be captured anew.

        Returns:
            `bool`: What `start` returned; if that is False, nothing has happened.
        """
        every = self.every
        packs = any(layer.tail_used + 1 >= every for layer in self.layers)
        try:
            self.rollback.begin(packs=packs, statistics=packs and self._adds_up)
            if packs and self._adds_up and self._observer is not None and self._observer.last_only:
                for layer in self.layers:
                    if layer.store is not None:
                        layer.store.clear_field(str(self._sum_field), layer.index)
            if self._adds_up and not packs:  # the queries that would be needed to take it back are not kept
                self.rollback.overwrites("A replayed step")
            if not start():
                self.rollback.commit()
                return False
            for layer in self.layers:
                layer.seen += 1
                layer.grows(1, None)
                self._tell_plan(layer)
            self.counters.seen += 1
            self.statistics.replays += 1
            self._end_forward()
            self.rollback.note = None
        except BaseException as error:
            self._stop(error)
            raise
        return True

    def _tell_plan(self, layer: LayerState) -> None:
        plan = None if layer.store is None else layer.store.tensors.plans.get(layer.index)
        if plan is not None:
            plan.note_steps(layer.seen, layer.tail_used)

    # -- taking tokens back ----------------------------------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        """Forgets the newest tokens.

        Args:
            tokens (`int`): How many, at least 0. With 0, what was recorded is committed.

        Raises:
            UnsupportedFeatureError: If some of them have been compressed already.
            CacheMemoryError: If what was recorded does not fit. The first of these tokens may have been committed and
                compressed then; the others are held back still, and all are there.
        """
        self.settle()
        target = max(0, self.seen - tokens)
        removed = self.seen - target
        self._check_crop(removed)
        held, counters = [list(layer.held) for layer in self.layers], self.counters.copy()
        with self.rollback.whole(statistics=self._counts_steps and self.recording, held=True, tail=self.recording):
            if removed:
                for owned in self.owned.values():
                    self._crop_store(owned, removed, target)
                for layer in self.layers:
                    layer.seen = min(layer.seen, target)
                    del layer.held[max(0, len(layer.held) - removed) :]
                self.counters.seen = target
                self.counters.uncount_padding(target)
            if self.recording:
                try:
                    self._commit()
                except CacheMemoryError:
                    if self.rollback.note is not None and self.rollback.note.renewed:
                        self._hold_again(held, counters)
                    raise

    def _check_crop(self, removed: int) -> None:
        for owned in self.owned.values():
            in_tail = self.tail_used(owned)
            if removed > in_tail and owned.store.evicted:
                raise UnsupportedFeatureError(
                    f"crop would remove {removed} tokens, but only the newest {in_tail} are still in the tail and the "
                    "others have been compressed with eviction; call activate_past_recording() before generating what "
                    "may have to be taken back, or fork() the cache."
                )

    def _commit(self) -> None:
        """Does what past recording held back, now that nothing of it can be taken back any more.

        The queries of the tokens that stayed are counted one by one, as if each had been decoded by itself; so
        importance, packing and plans are those of plain decoding.
        """
        held = [list(layer.held) for layer in self.layers]
        count, note = max((len(tokens) for tokens in held), default=0), self.rollback.note
        self.recording = False
        try:
            if count:
                self._rewind(self.seen - count)
            if note is not None:
                note.piecewise = count > 0
            for token in range(count):
                for layer, tokens in zip(self.layers, held, strict=True):
                    if layer.store is not None and tokens:
                        self._decode(layer, layer.store, tokens[token], centred=True)
                        layer.seen += 1
                self.counters.seen += 1
                self._end_forward()
                if self.rollback.note is not None and self.rollback.note.overwriting is not None:
                    self.rollback.renew()  # what was evicted cannot come back
            if not count:
                self._end_forward()
        finally:
            self.recording = True

    def _hold_again(self, held: list[list[AttentionCall]], counters: Counters) -> None:
        """Puts recorded tokens back into the tail behind those that have been committed.

        Args:
            held (`list[list[AttentionCall]]`): All recorded tokens, by layer.
            counters (`Counters`): What was counted before any of them was taken back or committed.
        """
        self.rollback.restore()
        self.recording = True
        for token in range(self.seen - counters.seen, 0):
            for layer, tokens in zip(self.layers, held, strict=True):
                if layer.store is not None and tokens:
                    self._decode(layer, layer.store, tokens[token], centred=True)
                    layer.seen += 1
            self.counters.seen += 1
        self.counters.padding, self.counters.gaps = counters.padding, counters.gaps
        self.rollback.commit()  # until here, whatever stops this closes the cache

    def _rewind(self, target: int) -> None:
        """Takes recorded tokens out of the tail, which holds all of them."""
        removed = self.seen - target
        for owned in self.owned.values():
            owned.store.crop_tail(target)
            for index in owned.layers:
                layer = self.layers[index]
                layer.seen, layer.tail_used, layer.tails = target, layer.tail_used - removed, None
                layer.held.clear()
        self.counters.seen = target


def _check_says_nothing(mask: torch.Tensor | None) -> None:
    """Refuses a mask over one new token that sees itself if it may add something to its logit."""
    if mask is not None and mask.is_floating_point():
        raise UnsupportedFeatureError(
            "The model made an additive mask for a single token, of which only the device knows whether it says "
            "anything, so its steps cannot be captured; load it with attn_implementation='sdpa'."
        )


def _in_one_kernel(store: PagedStore, new: AttentionCall) -> bool:
    """Whether the cache's own kernel reads the first tokens: where it is faster, and no gradient is asked for."""
    inputs = (new.query, new.key, new.value)
    wanted = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
    return not wanted and store.backend.reads_prompts(new.key.dtype, new.tokens)
