"""What one layer does with its new tokens: attend to the past, be observed, be stored."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from kvcompress_hf.kernels import DecodePlan, Logits
from kvcompress_hf.observers import checked
from kvcompress_hf.observers.base import Chunk, Observer
from kvcompress_hf.paging.store import PagedStore
from kvcompress_hf.paging.waiting import on_host
from kvcompress_hf.recipe import TIERS
from kvcompress_hf.runtime import packing
from kvcompress_hf.runtime.call import AttentionCall
from kvcompress_hf.runtime.padding import aligned, put_back
from kvcompress_hf.runtime.past import Past
from kvcompress_hf.runtime.state import LayerState


class LayerWork(Past):
    """Attention of a single layer over what is stored, without the beginning and end of a forward pass.

    Arguments are those of [`CacheState`].
    """

    _reading_again = False  # tokens are looked at once more, and not stored
    _capturing = False  # a pass is captured, and not run

    def _decode(self, layer: LayerState, store: PagedStore, new: AttentionCall, centred: bool) -> torch.Tensor:
        """Appends one token to the tail and attends to everything; its key is centred on the way if it is not yet."""
        if layer.plan_key[0] != store.tensors.version or layer.tail_used >= layer.plan_room:
            self._keep_tail_room(layer, store)
        observer = self._observer
        fields: dict[str, torch.Tensor] | None = None
        if observer is not None and self._counts_steps:
            if self.recording:
                layer.held.append(new.detached())  # without the tag, which leads back to this cache
            else:
                fields = self._before_counting(observer, layer, store, new)
        before = store.tail_lengths[layer.index].clone() if fields else None
        valid = new.valid
        with store.reading:  # pages and tables stay where they are
            plan = self._plan_of(layer, store, new.logits, centred)
            output = plan.run(new.query, new.key, new.value, layer.seen, None if valid is None else valid[:, 0])
        if before is not None and fields is not None:
            packing.write_tail_fields(store, layer, before, valid, fields)
        layer.grows(1, valid)
        return output

    def _keep_tail_room(self, layer: LayerState, store: PagedStore) -> None:
        """Makes the tail private and large enough for a token more."""
        if layer.tail_used >= store.tail_capacity or store.tail_is_shared:
            room = layer.tail_used + 1
            store.reserve_tail(max(self.every, 2 * room if self.recording else room))
            self.note_peak()

    def _plan_of(self, layer: LayerState, store: PagedStore, logits: Logits, centred: bool) -> DecodePlan:
        """The decode plan of a layer, made anew where something it reads has moved; who asks holds `store.reading`."""
        tensors = store.tensors
        sum_field, square_field = (None, None) if self.recording else (self._sum_field, self._square_field)
        plan_key = (tensors.version, layer.group, logits, sum_field, square_field, centred)
        plan = tensors.plans.get(layer.index)
        if plan is None or layer.plan_key != plan_key:
            plan = tensors.plans[layer.index] = store.backend.plan_decode(
                store.rows(layer.index),
                replace(store.tail(layer.index), used=layer.tail_used),
                logits=logits,
                q_heads=layer.group * store.geometry.kv_heads,
                sum_field=sum_field,
                square_field=square_field,
                key_shift=None if centred else store.key_shift_of(layer.index),
                rotates_values=store.rotates_values,
            )
            layer.plan_key, layer.plan_room = plan_key, store.tail_capacity
            if layer.index == store.layers - 1:
                self.note_peak()
        return plan

    def _before_counting(
        self, observer: Observer, layer: LayerState, store: PagedStore, new: AttentionCall
    ) -> dict[str, torch.Tensor]:
        """Makes ready for statistics of a decode step; returns the new token's fields, if it has any beforehand."""
        if self._sum_field or self._square_field:
            if store.arena.shared:
                store.own_all()
            self.rollback.counts(layer, new)
            # Before a pass that has been captured this is done for all layers at once.
            if observer.last_only and layer.tail_used + 1 >= self.every and not self._capturing:
                store.clear_field(str(self._sum_field), layer.index)
        if self._remembers:
            self._remember(observer, layer, store, new)
        # This may copy pages, so it comes before the decode plan is made.
        return self._observe(observer, layer, store, new.detached()) if self._observes_steps else {}

    def _observe(
        self, observer: Observer, layer: LayerState, store: PagedStore, new: AttentionCall
    ) -> dict[str, torch.Tensor]:
        """Lets the observer look at new tokens; returns their fields, `[batch, kv_heads, tokens]`.

        Tokens that are read again have none: what they look at goes to the fields of what is stored.
        """
        started = time.perf_counter()
        store.reserve_tail(layer.tail_used)
        if store.arena.shared:
            store.own_all()  # observers write into the fields of what is stored
        chunk = Chunk(store=store, layer=layer.index, new=new, rotation=self.rotation_of(layer))
        fields: dict[str, torch.Tensor] = {}
        with store.reading:
            if self._reading_again:
                checked.observe_again(observer, chunk)
            else:
                fields = checked.observe(observer, chunk)
        self.statistics.seconds_planning += time.perf_counter() - started
        return fields

    def _remember(self, observer: Observer, layer: LayerState, store: PagedStore, new: AttentionCall) -> None:
        """Remembers new queries, for when the observer looks at stored keys."""
        store.queries.add(
            layer.index,
            new.query.detach(),
            new.valid,
            self.rotation_of(layer),
            centres=observer.learns_centres,
            newest=observer.newest_queries,
        )

    def _chunk(
        self,
        layer: LayerState,
        store: PagedStore,
        new: AttentionCall,
        dense: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Attends to what is stored and to several new tokens, and stores them."""
        position = new.position
        if position == 0:
            output = dense()
        else:
            store.reserve_tail(layer.tail_used)
            output = new.attend(store, layer.index, store.tail(layer.index), position=position)
        fields: dict[str, torch.Tensor] = {}
        if self.recording and position:
            if self._holds:
                layer.held.extend(new.singly())
        elif self._observer is not None:
            seen, order = aligned(new, self._new_valid)
            if self._remembers:
                self._remember(self._observer, layer, store, seen)
            fields = put_back(self._observe(self._observer, layer, store, seen), order)
            if self.compression.needs_distortion:
                number = next(i for i, each in enumerate(self.layers) if each is layer)
                self.compression.measure(number, layer, seen, self._new_valid)
        if layer.sharing == "store" and new.tokens > 1:
            # The layers that read it must see what was there before and the new tokens apart, as this one did.
            self._waiting.append(partial(self._store, layer, store, new, fields))
            self.counters.unfinished = not self.recording
        else:
            self._store(layer, store, new, fields)
        return output

    def _store(self, layer: LayerState, store: PagedStore, new: AttentionCall, fields: dict[str, torch.Tensor]) -> None:
        started = time.perf_counter()
        if self.recording or new.tokens == 1:
            packing.append(self, layer, store, new, fields)
        else:
            packing.pack_chunk(self, layer, store, new, fields, self._new_valid)
            self.counters.unfinished = True
        self.statistics.seconds_packing += time.perf_counter() - started

    def _read_again(self, layer: LayerState, store: PagedStore, new: AttentionCall) -> torch.Tensor:
        """Attention of tokens that are read a second time, as if they came next; they are observed and not stored."""
        store.reserve_tail(layer.tail_used)
        output = new.attend(store, layer.index, store.tail(layer.index), position=layer.seen)
        if self._observer is not None:
            seen, _ = aligned(new, None if new.valid is None else on_host(new.valid))
            self._observe(self._observer, layer, store, seen)
        return output

    def _verifies(self, layer: LayerState, new: AttentionCall) -> bool:
        """Whether recorded tokens are to attend one by one, as decoded ones do.

        Decoding rounds attention over quantised pages in its own way, so a draft that is verified in one block could
        differ from the tokens of plain decoding where two of them are nearly equal.
        """
        if not self.recording or not layer.seen or new.tokens > self.every or layer.sharing is not None:
            return False
        if all(TIERS[name] == (0, 0) for name in self.recipe.tiers):
            return False
        mask, valid = new.mask, new.valid
        if mask is None or valid is None:
            return True
        allowed, bias = mask.parts()
        causal = torch.ones((new.tokens, new.tokens), dtype=torch.bool, device=valid.device).tril() & valid[:, None]
        same = bool(((allowed == causal) | ~valid[:, :, None]).all())
        return same and bias is None
