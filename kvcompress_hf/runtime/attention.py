"""`attend()`: the one door through which all attention goes, and the events that follow a forward pass.

Three cases (`docs/how_it_works.md`): a first chunk with nothing stored uses the model's own dense attention; a later
chunk reads the packed past, the tail and the new block in one kernel; a single token is appended to the tail and
attends to everything in one native call. When the last layer of a forward pass is through, the tail is packed, the
recipe's plan is made over all layers at once, and pages that came free go back.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from kvcompress_hf import kernels
from kvcompress_hf.errors import CacheMemoryError, UnsupportedFeatureError
from kvcompress_hf.observers.base import Chunk, Observer
from kvcompress_hf.paging.arena import Arena
from kvcompress_hf.paging.slots import StorePart, apply_targets, gather_slots
from kvcompress_hf.paging.store import Describe, Geometry, PagedStore, Snapshot
from kvcompress_hf.paging.waiting import ask, known, known_as, on_host, pick, to_device
from kvcompress_hf.plans.base import Plan
from kvcompress_hf.plans.decide import Ruling, decide
from kvcompress_hf.plans.distortion import measure_distortion
from kvcompress_hf.plans.pressure import under_pressure
from kvcompress_hf.plans.run import Limits, bytes_held, make_limits, make_view, prompt_on_top
from kvcompress_hf.recipe import TIERS, Recipe
from kvcompress_hf.runtime.new_tokens import NewTokens, real_tokens, split_mask

_BEST = 0  # new slots enter the first tier


@dataclass
class RunStatistics:
    """What happened to one cache so far.

    Args:
        packings (`int`): Times the tail or a chunk was packed, over all layers.
        plans (`int`): Times a plan was made.
        evicted_slots (`int`): Slots dropped by plans.
        seconds_packing (`float`): Wall time spent packing, in seconds.
        seconds_planning (`float`): Wall time spent observing, planning and evicting, in seconds.
        peak_bytes (`int`): Most bytes the cache ever held.
    """

    packings: int = 0
    plans: int = 0
    evicted_slots: int = 0
    seconds_packing: float = 0.0
    seconds_planning: float = 0.0
    peak_bytes: int = 0


@dataclass
class _Layer:
    """What belongs to one layer of the model."""

    window: int | None
    sharing: str | None = None  # "store": later layers read it too; "reuse": it reads an earlier one and stores nothing
    store: PagedStore | None = None
    index: int = 0  # place among the store's layers
    group: int = 1  # query heads per KV head
    seen: int = 0  # logical tokens, padding and evicted ones included
    tail_used: int = 0  # most slots any sequence has in the tail
    uneven: bool = False  # whether sequences may have fewer, because of padding
    tails: torch.Tensor | None = None  # int32 [batch] on the host: how many they have, if uneven and known
    plan: kernels.DecodePlan | None = None
    plan_key: tuple[object, ...] = ()
    held: list[NewTokens] = field(default_factory=list)  # the newest tokens, oldest first

    def grows(self, tokens: int, valid: torch.Tensor | None) -> None:
        """Notes new tokens in the tail; where `valid` is given, some may be padding."""
        self.tail_used += tokens
        self.uneven, self.tails = self.uneven or valid is not None, None

    def emptied(self) -> None:
        """Notes that the tail is empty."""
        self.tail_used, self.uneven, self.tails = 0, False, None


@dataclass
class _StoreLayers:
    """A store and the layers of the model whose rows it holds, in the order of arrival."""

    store: PagedStore
    layers: list[int] = field(default_factory=list)


@dataclass
class _Before:
    """How things stood before a forward pass, should it not reach its end."""

    seen: int = 0
    tail_used: list[int] = field(default_factory=list)
    held: int = 0
    padding: torch.Tensor | None = None
    distortion: dict[int, torch.Tensor] = field(default_factory=dict)
    stores: dict[Geometry, Snapshot] | None = None


@dataclass(frozen=True)
class AttentionState:
    """What [`PagedAttention`] knows besides its stores.

    Args:
        seen (`int`): Logical tokens.
        batch (`int`): Sequences.
        prompt (`int`): Tokens of `seen` up to the end of the last chunk.
        prompt_tokens (`int`, *optional*): Length of the prompt, where it was known beforehand.
        planned (`int`): Tokens seen at the last plan.
        faded (`int`): Tokens seen when statistics last faded.
        recording (`bool`): Whether new tokens are held back in the tail.
        unfinished (`bool`): Whether a plan is still to be made.
        groups (`list[int]`): Query heads per KV head of each layer.
        tail_used (`list[int]`): Most slots any sequence has in the tail, per layer.
        padding (`torch.Tensor`, *optional*): `int64` `[batch]`.
        distortion (`torch.Tensor`, *optional*): Measured losses, float32 `[batch, heads of all layers, tiers]`, NaN for
            sequences that had only padding so far.
    """

    seen: int = 0
    batch: int = 0
    prompt: int = 0
    prompt_tokens: int | None = None
    planned: int = 0
    faded: int = 0
    recording: bool = False
    unfinished: bool = False
    groups: list[int] = field(default_factory=list)
    tail_used: list[int] = field(default_factory=list)
    padding: torch.Tensor | None = None
    distortion: torch.Tensor | None = None


class PagedAttention:
    """Everything below the transformers contract of one cache.

    Args:
        recipes (`Sequence[Recipe]`): How to compress: one recipe for all sequences, or one per sequence of the batch,
            which differ in budget, plan and protection only.
        windows (`Sequence[int | None]`): Sliding window of each layer, `None` for full attention.
        prompt_tokens (`int`, *optional*): Length of the prompt in tokens when it is known beforehand; a fraction
            budget is then a fraction of the whole prompt from its first chunk on.
        max_bytes (`int`, *optional*): Most bytes of pages per device.
        sharing (`Sequence[str | None]`, *optional*): Per layer `"store"` where later layers read its keys and values as
            well, `"reuse"` where it reads those of an earlier layer and has none itself, else `None`.
        inv_freq (`torch.Tensor`, *optional*): Radians per position of each pair of rotary channels, float32 `[pairs]`;
            recipes with `positions="reindexed"` need it, and some observers look further with it.
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        windows: Sequence[int | None],
        prompt_tokens: int | None = None,
        max_bytes: int | None = None,
        sharing: Sequence[str | None] | None = None,
        inv_freq: torch.Tensor | None = None,
    ) -> None:
        self.inv_freq = inv_freq
        self.recipe = recipes[0]  # what sequences share: observer, tiers, when
        self._recipes = tuple(recipes)
        self._observer: Observer | None = self.recipe.observer
        plans: list[Plan | None] = [recipe.plan for recipe in recipes]
        self._needs_distortion = any(plan is not None and plan.needs_distortion for plan in plans)
        self._distortion: dict[int, torch.Tensor] = {}  # by measured layer, float32 [batch, kv_heads, tiers]
        self._prompt = 0  # tokens that came in chunks; what follows was decoded one by one
        self._planned = 0  # tokens seen at the last plan
        self._faded = 0  # tokens seen when statistics last faded
        self.prompt_tokens = prompt_tokens
        self.max_bytes = max_bytes
        self.recording = False
        self.statistics = RunStatistics()
        self.seen = 0
        self.batch = 0
        shares = [None] * len(windows) if sharing is None else sharing
        self._layers = [_Layer(window, mode) for window, mode in zip(windows, shares, strict=True)]
        self._stores: dict[Geometry, _StoreLayers] = {}
        self._arenas: dict[tuple[torch.device, int], Arena] = {}
        self._padding: torch.Tensor | None = None  # int64 [batch]: padding tokens seen per sequence
        self._new_valid: torch.Tensor | None = None  # bool [batch, tokens] on the host: real tokens of this chunk
        self._before = _Before()
        self._unfinished = False  # a multi-token forward has been stored but its plan has not run yet
        self._waiting: list[Callable[[], None]] = []  # chunks that later layers read before they are stored
        self._reading_again = False
        self.awaits_second_reading = False  # the prompt is stored, and planned for once it has been read again
        self._room: int | None = None  # bytes of pages that the budget still allows, as of the last event

    # -- the door --------------------------------------------------------------------------------------------------

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scaling: float,
        dense: Callable[[], torch.Tensor],
        softcap: float | None = None,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of new queries over everything stored and the new keys, which are stored on the way.

        Args:
            layer_idx (`int`): Index of the layer.
            query (`torch.Tensor`): `[batch, q_heads, tokens, head_dim]`, after rotary embedding.
            key (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`, new tokens only.
            value (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`, new tokens only.
            mask (`torch.Tensor`, *optional*): bool or additive, `[batch, 1, tokens, tokens]`; who of the new tokens
                sees whom. A token that may not see itself is padding.
            scaling (`float`): Factor on the logits.
            dense (`Callable[[], torch.Tensor]`): The model's own attention over the new tokens,
                `[batch, tokens, q_heads, head_dim]`; used while nothing is stored.
            softcap (`float`, *optional*): Logits become `softcap * tanh(logits / softcap)`.
            window (`int`, *optional*): Sliding window in tokens.
            sinks (`torch.Tensor`, *optional*): Extra logit per query head, `[q_heads]`.

        Returns:
            `torch.Tensor`: `[batch, tokens, q_heads, head_dim]`.

        Raises:
            UnsupportedFeatureError: If the mask is not over the new tokens only.
            CacheMemoryError: If the cache would grow beyond its `max_bytes`.
            ValueError: If the batch size, heads, head_dim, dtype or device are not those of the stored tokens.
            RuntimeError: If an earlier forward pass stopped half way; its tokens are taken back.
        """
        layer = self._layers[layer_idx]
        tokens = key.shape[2]
        position = layer.seen
        if position == self.seen and not self._reading_again:
            self._begin_forward(tokens, mask, key)
        store = layer.store
        if store is None:
            if missed := self._before.seen:
                self.reset()
                raise RuntimeError(
                    f"A forward pass stopped half way, so layer {layer_idx} has not seen the first {missed} tokens. "
                    "The cache has been emptied: begin again with the first token."
                )
            store = self._place(layer, layer_idx, key)
        elif (
            key.dtype is not store.geometry.dtype
            or key.shape[1] != store.geometry.kv_heads
            or key.shape[0] != self.batch
        ):
            raise ValueError(
                f"Layer {layer_idx} holds {self.batch} sequences x {store.geometry.kv_heads} KV heads in "
                f"{store.geometry.dtype}, but keys of shape {tuple(key.shape)} in {key.dtype} arrived; use a fresh "
                "cache."
            )
        valid = None if mask is None else real_tokens(mask, query.shape[2], tokens, key.shape[0])
        layer.group = query.shape[1] // key.shape[1]
        # A soft cap or a sink's logit is not moved along with the keys' logits, so there keys stay whole.
        if position == 0 and self.recipe.centres_keys and softcap is None and sinks is None:
            store.settle_key_shift(layer.index, key.detach(), valid)
        new = NewTokens(query, store.centre(layer.index, key), value, valid, scaling, softcap, window, sinks)
        if self._reading_again:
            return self._read_again(layer, store, new.detached(), mask)
        if tokens == 1 and position:
            output = self._decode(layer, store, new)
        elif self._verifies(layer, mask, valid, tokens):
            outputs = []
            for token in new.singly():
                outputs.append(self._decode(layer, store, token))
                layer.seen += 1
            output = torch.cat(outputs, dim=1)
        else:
            try:
                output = self._chunk(layer, store, new.detached(), mask, dense)
            except CacheMemoryError:
                self._undo_forward()
                raise
        layer.seen = position + tokens
        self.seen = max(self.seen, layer.seen)
        self._end_layer(layer_idx)
        return output

    def attend_shared(
        self,
        layer_idx: int,
        source_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scaling: float,
        dense: Callable[[], torch.Tensor],
        softcap: float | None = None,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of a layer that reads the keys and values of an earlier one; nothing is stored or scored.

        Args:
            layer_idx (`int`): Index of the layer that reads.
            source_idx (`int`): Index of the layer whose keys and values they are; its own [`attend`] came before.
            query (`torch.Tensor`): `[batch, q_heads, queries, head_dim]`; the newest tokens, possibly fewer than keys.
            key (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`, the same new tokens as there.
            value (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`.
            mask (`torch.Tensor`, *optional*): bool or additive, `[batch, 1, queries, tokens]`.
            scaling (`float`): As in [`attend`].
            dense (`Callable[[], torch.Tensor]`): As in [`attend`].
            softcap (`float`, *optional*): As in [`attend`].
            window (`int`, *optional*): As in [`attend`].
            sinks (`torch.Tensor`, *optional*): As in [`attend`].

        Returns:
            `torch.Tensor`: `[batch, queries, q_heads, head_dim]`.

        Raises:
            UnsupportedFeatureError: If that layer is not known to be read by others, or the mask has another width.
        """
        source, tokens = self._layers[source_idx], key.shape[2]
        if source.sharing != "store" or source.store is None:
            raise UnsupportedFeatureError(
                f"Layer {layer_idx} attends to the keys and values of layer {source_idx}, but the model's config does "
                "not say that layer is shared (kv_sharing_modes), so they have not been kept for it."
            )
        if mask is not None and (mask.dim() != 4 or mask.shape[-2:] != (query.shape[2], tokens)):
            raise UnsupportedFeatureError(
                f"Got an attention mask of shape {tuple(mask.shape)} for {query.shape[2]} queries and {tokens} new "
                "tokens; a compressed cache needs one over the new tokens only."
            )
        position = source.seen - tokens
        # Stock attention without a mask takes the first query for the first token, which it is not if there are fewer.
        if position == 0 and (mask is not None or query.shape[2] in (1, tokens)):
            output = dense()
        else:
            store = source.store
            new = NewTokens(query, store.centre(source.index, key), value, None, scaling, softcap, window, sinks)
            store.reserve_tail(source.tail_used)
            tail = store.tail(source.index)
            if tokens == 1:
                # The token is in the tail already; it comes as a new key, as in a chunk that is not stored yet.
                newest = 1 if mask is None else real_tokens(mask, 1, 1, self.batch)[:, 0].to(torch.int32)
                tail = replace(tail, lengths=tail.lengths - newest)
            at = source.seen - query.shape[2]
            output = new.detached().attend(store, source.index, tail, mask, position=at, key_position=position)
        self._end_layer(layer_idx)
        return output

    def _end_layer(self, layer_idx: int) -> None:
        if layer_idx == len(self._layers) - 1:
            if not self._make_room():
                self._undo_forward()
                raise self._no_room()
            self._end_forward()

    def _decode(self, layer: _Layer, store: PagedStore, new: NewTokens) -> torch.Tensor:
        if layer.tail_used >= store.tail_capacity or store.tail_is_shared:
            room = layer.tail_used + 1
            store.reserve_tail(max(self.recipe.when.every, 2 * room if self.recording else room))
            self._note_peak()
        observer = self._observer
        sum_field = None if observer is None else observer.sum_field
        square_field = None if observer is None else observer.square_field
        if self._holds:
            layer.held.append(new)
            sum_field = square_field = None
        if sum_field or square_field:
            if store.arena.shared:
                store.own_all()
            if observer is not None and observer.last_only and layer.tail_used + 1 >= self.recipe.when.every:
                store.clear_field(str(sum_field), layer.index)
        fields: dict[str, torch.Tensor] = {}
        if observer is not None and observer.observes_steps and not self._holds:
            fields = self._observe(observer, layer, store, new.detached())  # may copy pages, so before the plan is made
        before = store.tail_lengths[layer.index].clone() if fields else None
        valid = new.valid
        with store.reading:  # pages and tables stay where they are
            plan_key = (
                store.version,
                new.query.shape[1],
                new.scaling,
                new.softcap,
                new.window,
                None if new.sinks is None else new.sinks.data_ptr(),
                sum_field,
                square_field,
            )
            if layer.plan is None or layer.plan_key != plan_key:
                layer.plan = store.backend.plan_decode(
                    store.rows(layer.index),
                    replace(store.tail(layer.index), used=layer.tail_used),
                    scale=new.scaling,
                    softcap=new.softcap,
                    window=new.window,
                    sinks=new.sink_logits(),
                    sum_field=sum_field,
                    square_field=square_field,
                    q_heads=new.query.shape[1],
                )
                layer.plan_key = plan_key
            output = layer.plan.run(new.query, new.key, new.value, layer.seen, None if valid is None else valid[:, 0])
        if before is not None:
            self._write_fields(store, layer, before, valid, fields)
        layer.grows(1, valid)
        return output

    def _observe(self, observer: Observer, layer: _Layer, store: PagedStore, new: NewTokens) -> dict[str, torch.Tensor]:
        """Lets the observer look at new tokens; returns their fields, `[batch, kv_heads, tokens]`.

        Tokens that are read again have none: what they look at goes to the fields of what is stored.
        """
        started = time.perf_counter()
        store.reserve_tail(layer.tail_used)
        if store.arena.shared:
            store.own_all()  # observers write into the fields of what is stored
        chunk = Chunk(
            store=store,
            layer=layer.index,
            query=new.query,
            keys=new.key,
            values=new.value,
            position=layer.seen,
            scale=new.scaling,
            softcap=new.softcap,
            window=new.window,
            sinks=new.sink_logits(),
            valid=new.valid,
            inv_freq=self.inv_freq,
        )
        fields: dict[str, torch.Tensor] = {}
        with store.reading:
            if self._reading_again:
                observer.observe_again(chunk)
            else:
                fields = observer.observe(chunk)
        self.statistics.seconds_planning += time.perf_counter() - started
        return fields

    def _measure(self, layer: _Layer, new: NewTokens) -> None:
        """Measures what tiers lose on the first tokens of every sequence."""
        number = next(i for i, each in enumerate(self._layers) if each is layer)
        measured_before = self._distortion.get(number)
        padded = self._before.padding
        if measured_before is not None and (padded is None or bool((on_host(padded) < layer.seen).all())):
            return  # every sequence had tokens before
        padding = None if self._new_valid is None else (~self._new_valid).sum(1)
        tiers = [TIERS[name] for name in self.recipe.tiers]
        measured = measure_distortion(new.query, new.key, new.value, new.scaling, tiers, padding)
        if measured_before is not None:
            measured_before = to_device(measured_before, measured.device)
            measured = torch.where(measured_before.isnan(), measured, measured_before)
        self._distortion[number] = measured

    def _losses(self) -> list[torch.Tensor]:
        """What was measured, on the host: all that is not there yet comes at once."""
        bits = ask([losses.view(torch.int32) for losses in self._distortion.values()])
        here = [each.to(torch.int32).view(torch.float32) for each in bits]
        self._distortion = dict(zip(self._distortion, here, strict=True))
        return here

    def _read_again(self, layer: _Layer, store: PagedStore, new: NewTokens, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention of tokens that are read a second time, as if they came next; they are observed and not stored."""
        store.reserve_tail(layer.tail_used)
        output = new.attend(store, layer.index, store.tail(layer.index), mask, position=layer.seen)
        if self._observer is not None:
            self._observe(self._observer, layer, store, new)
        return output

    @contextlib.contextmanager
    def second_reading(self) -> Iterator[None]:
        """While it lasts, tokens are attended to and observed, but not stored; then what was put off is planned."""
        if any(layer.sharing is not None for layer in self._layers):
            raise UnsupportedFeatureError(
                f"The recipe {self.recipe.name!r} reads the prompt a second time, which is not available for models "
                "whose layers share keys and values; take a recipe with another observer, such as 'auto'."
            )
        self._reading_again = True
        try:
            yield
        finally:
            self._reading_again = False
        self.awaits_second_reading = False
        if self.recipe.evicts and self.recipe.when.prefill:
            started = time.perf_counter()
            self._unfinished = True  # the plan of a prompt
            self._plan()
            self._unfinished = False
            self._give_back()
            self.statistics.seconds_planning += time.perf_counter() - started
            self._note_peak()

    @staticmethod
    def _write_fields(
        store: PagedStore,
        layer: _Layer,
        before: torch.Tensor,
        valid: torch.Tensor | None,
        fields: dict[str, torch.Tensor],
    ) -> None:
        """Puts the fields of new tokens where they were appended: behind the tail's lengths `before`, `[batch]`."""
        tail = store.tail(layer.index)
        if tail.fields is None:
            return
        batch, heads, tokens = next(iter(fields.values())).shape
        rank = torch.arange(tail.capacity, device=before.device) - before[:, None]  # [batch, capacity]
        token = rank.clamp(0, tokens - 1)
        new = (rank >= 0) & (rank < tokens)
        if valid is not None:  # a stable sort brings the real tokens to the front in their order
            token = (~valid).to(torch.uint8).argsort(dim=1, stable=True).gather(1, token)
            new = new & (rank < valid.sum(1, keepdim=True))
        token, new = (x[:, None].expand(batch, heads, -1) for x in (token, new))
        for name, values in fields.items():
            target = tail.fields[store.layout.fields.index(name)].view(torch.float32)
            target.copy_(torch.where(new, values.gather(2, token), target))

    def _chunk(
        self,
        layer: _Layer,
        store: PagedStore,
        new: NewTokens,
        mask: torch.Tensor | None,
        dense: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        position = layer.seen
        if position == 0:
            output = dense()
        else:
            store.reserve_tail(layer.tail_used)
            output = new.attend(store, layer.index, store.tail(layer.index), mask, position=position)
        fields: dict[str, torch.Tensor] = {}
        if self.recording and position:
            if self._holds:
                layer.held.extend(new.singly())
        elif self._observer is not None:
            fields = self._observe(self._observer, layer, store, new)
            if self._needs_distortion:
                self._measure(layer, new)
        if layer.sharing == "store" and new.tokens > 1:
            # The layers that read it must see what was there before and the new tokens apart, as this one did.
            self._waiting.append(partial(self._store, layer, store, new, fields, position))
            self._unfinished = not self.recording
        else:
            self._store(layer, store, new, fields, position)
        return output

    def _store(
        self, layer: _Layer, store: PagedStore, new: NewTokens, fields: dict[str, torch.Tensor], position: int
    ) -> None:
        started = time.perf_counter()
        if self.recording or new.tokens == 1:
            self._append(layer, store, new, fields, position)
        else:
            self._pack_chunk(layer, store, new, fields, position)
            self._unfinished = True
        self.statistics.seconds_packing += time.perf_counter() - started

    def _store_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            for store in waiting:
                store()
        except CacheMemoryError:
            self._undo_forward()
            raise

    def _verifies(self, layer: _Layer, mask: torch.Tensor | None, valid: torch.Tensor | None, tokens: int) -> bool:
        """Whether recorded tokens are to attend one by one, as decoded ones do.

        Decoding rounds attention over quantised pages in its own way, so a draft that is verified in one block could
        differ from the tokens of plain decoding where two of them are nearly equal.
        """
        if not self.recording or not layer.seen or tokens > self.recipe.when.every or layer.sharing is not None:
            return False
        if all(TIERS[name] == (0, 0) for name in self.recipe.tiers):
            return False
        if mask is None or valid is None:
            return True
        allowed, bias = split_mask(mask)
        causal = torch.ones((tokens, tokens), dtype=torch.bool, device=mask.device).tril() & valid[:, None]
        same = allowed is not None and bool(((allowed == causal) | ~valid[:, :, None]).all())
        return same and bias is None

    @property
    def _holds(self) -> bool:
        """Whether recorded tokens keep their queries until it is known which tokens stay."""
        observer = self._observer
        if not self.recording or observer is None:
            return False
        return bool(observer.sum_field or observer.square_field or observer.observes_steps)

    def _append(
        self, layer: _Layer, store: PagedStore, new: NewTokens, fields: dict[str, torch.Tensor], position: int
    ) -> None:
        """Puts new tokens into the tail, where they can still be taken back."""
        store.reserve_tail(max(self.recipe.when.every, layer.tail_used + new.tokens))
        tail = store.tail(layer.index)
        before = tail.lengths.clone()
        store.backend.append(tail, new.key, new.value, position, new.valid)
        if fields:
            self._write_fields(store, layer, before, new.valid, fields)
        layer.grows(new.tokens, new.valid)

    def _pack_chunk(
        self, layer: _Layer, store: PagedStore, new: NewTokens, fields: dict[str, torch.Tensor], position: int
    ) -> None:
        """Packs a chunk of a prompt straight into pages; padding and what no later query can see is left out."""
        key, value, valid = new.key, new.value, new.valid
        batch, heads, tokens, _ = key.shape
        if layer.tail_used:
            store.pack_tail(_BEST, layer.index, self._describe, self._tails(self._stores[store.geometry]))
            layer.emptied()
        if self._describe is not None:
            real = torch.ones((batch, tokens), dtype=torch.bool, device=key.device) if valid is None else valid
            fields = {**fields, **store.describe(self._describe, key, value, real, layer.index)}
        first = 0 if layer.window is None else max(0, tokens - layer.window + 1)
        index = None
        counts = to_device(torch.full((batch, heads), tokens - first, dtype=torch.int32), key.device)
        if "position" in store.layout.fields:
            positions = torch.arange(position, position + tokens, dtype=torch.int32, device=key.device)
            fields = {**fields, "position": positions.expand(batch, heads, -1)}
        if valid is not None:
            wanted = valid.clone()
            wanted[:, :first] = False
            counts = wanted.sum(1, keepdim=True, dtype=torch.int32).expand(-1, heads)
            if self._new_valid is not None:
                here = self._new_valid[:, first:].sum(1, keepdim=True, dtype=torch.int32)
                known_as(counts, here.expand(-1, heads))
            # A stable sort brings the wanted tokens to the front in their order.
            index = (~wanted).to(torch.uint8).argsort(dim=1, stable=True).to(torch.int32)[:, None]
        elif first:
            key, value = key[:, :, first:], value[:, :, first:]
            fields = {name: values[:, :, first:] for name, values in fields.items()}
        store.pack(
            _BEST,
            key,
            value,
            counts,
            None if index is None else index.expand(-1, heads, -1),
            fields,
            layer.index,
        )
        self.statistics.packings += 1

    @property
    def _describe(self) -> Describe | None:
        observer = self._observer
        return observer.describe if observer is not None and observer.describes else None

    # -- before and after a forward pass ---------------------------------------------------------------------------

    def _begin_forward(self, tokens: int, mask: torch.Tensor | None, key: torch.Tensor) -> None:
        if any(layer.store is not None and layer.seen != self.seen for layer in self._layers):
            behind = min(layer.seen for layer in self._layers if layer.store is not None)
            added = self.seen - behind
            self._undo_forward()
            raise RuntimeError(
                f"The last forward pass stopped half way, so its {added} tokens were in some layers only. They have "
                f"been taken back: the cache holds {self.seen} tokens again. Repeat that forward pass."
            )
        if self._unfinished or self._waiting:
            # The last layer of the model is not ours (pipeline parallelism), so the plan waited until now.
            self._end_forward()
        # A mask that is refused must leave nothing behind, so it is read before anything is noted.
        real = None if mask is None else real_tokens(mask, mask.shape[-2], tokens, key.shape[0])
        padding = None if real is None else (~real).sum(1)
        if tokens > 1 and not self.recording:
            self._make_room(tokens)
        if not self.batch:
            self._recipes = self._spread_recipes(key.shape[0])
            self.batch = key.shape[0]
        if (tokens > 1 and not self.recording) or not self.seen:
            self._prompt = self.seen + tokens
        decoding = tokens == 1 and self.seen > 0
        self._before = _Before(
            seen=self.seen,
            tail_used=[layer.tail_used for layer in self._layers],
            held=max(len(layer.held) for layer in self._layers),
            padding=self._padding,
            distortion=dict(self._distortion),
            # A decoded token only goes to the tail, from where it can be taken back without a copy of the lengths.
            stores=None if decoding else {g: owned.store.snapshot() for g, owned in self._stores.items()},
        )
        # While a prompt is read the device has enough to do, and how much is packed of it must be known.
        self._new_valid = None if real is None or decoding else on_host(real)
        if padding is not None:
            if self._new_valid is not None:
                known_as(padding, (~self._new_valid).sum(1))
            self._padding = padding if self._padding is None else _sum(self._padding, padding)

    def _spread_recipes(self, batch: int) -> tuple[Recipe, ...]:
        """One recipe per sequence where a batch has been expanded for beams or several answers per prompt."""
        given = len(self._recipes)
        if given == 1 or given == batch:
            return self._recipes
        if batch % given:
            raise ValueError(
                f"{given} recipes were given for a batch of {batch} rows; give one per row, or a single one for all."
            )
        return tuple(recipe for recipe in self._recipes for _ in range(batch // given))

    def _undo_forward(self) -> None:
        """Takes back a forward pass that did not reach its end: only additions were made so far."""
        before = self._before
        for geometry, owned in self._stores.items():
            if before.stores is None:
                owned.store.crop_tail(before.seen)
            else:
                owned.store.restore(before.stores.get(geometry))
        for layer, tail_used in zip(self._layers, before.tail_used, strict=True):
            layer.seen, layer.tail_used = min(layer.seen, before.seen), tail_used
            layer.uneven, layer.tails = True, None  # what was packed meanwhile may have made it even
            del layer.held[before.held :]
        self.seen, self._padding, self._unfinished = before.seen, before.padding, False
        self._distortion = before.distortion
        self._waiting.clear()
        self._give_back()

    def _end_forward(self) -> None:
        """Packs, plans and gives pages back, once per forward pass and over all layers together."""
        self._store_waiting()
        if self.recording:
            self._note_peak()
            return
        if not self._packs_next:
            return
        when = self.recipe.when
        full = [owned for owned in self._stores.values() if self._tail_used(owned) >= when.every]
        started = time.perf_counter()
        self._learn()
        for owned in self._stores.values() if self._unfinished else full:
            owned.store.pack_tail(_BEST, describe=self._describe, tails=self._tails(owned))
            for index in owned.layers:
                self._layers[index].emptied()
            self.statistics.packings += 1
        self._note_peak()
        packed = time.perf_counter()
        self.statistics.seconds_packing += packed - started
        self._drop_outside_windows()
        if self._unfinished and self._observer is not None and self._observer.reads_again:
            self.awaits_second_reading = True
        elif self.recipe.evicts and (when.prefill if self._unfinished else self._due()):
            if self.awaits_second_reading:
                raise UnsupportedFeatureError(
                    f"The recipe {self.recipe.name!r} reads the prompt a second time before it decides what to keep, "
                    "and this cache was filled without: fill it by kvcompress_hf.prefill(model, input_ids, recipe) or "
                    "by generate(input_ids), or take a recipe with another observer, such as 'auto'."
                )
            self._plan()
        self._fade()
        if self._unfinished:
            self._tell_clamped(ask(self._clamped))
        self._unfinished = False
        self._give_back()
        self.statistics.seconds_planning += time.perf_counter() - packed
        self._note_peak()

    @property
    def _packs_next(self) -> bool:
        """Whether something is packed at the end of this forward pass."""
        every = self.recipe.when.every
        return self._unfinished or any(self._tail_used(owned) >= every for owned in self._stores.values())

    def _make_room(self, tokens: int = 0) -> bool:
        """Where the next packing would take an arena beyond its limit, plans for less before anything is stored.

        Args:
            tokens (`int`): New tokens to be packed besides the tails.

        Returns:
            `bool`: Whether it fits now.
        """
        if self.max_bytes is None or self.recording or not (tokens or self._packs_next):
            return True
        self._learn()
        while (short := self._shortage(tokens)) > 0:
            live = sum(arena.live for arena in self._arenas.values())
            self._plan(freeing=short)
            self._give_back()
            # Rows that now end elsewhere in a page may take more pages for the new tokens, so look again.
            if sum(arena.live for arena in self._arenas.values()) >= live:
                return False
        return True

    def _shortage(self, tokens: int) -> int:
        """Bytes of pages that are missing for packing the tails and some more tokens; not positive if none are."""
        missing = 0
        for arena in self._arenas.values():
            needed = 0
            for owned in self._stores.values():
                if owned.store.arena is arena:
                    window = self._layers[owned.layers[0]].window
                    kept = tokens if window is None else min(tokens, window - 1)
                    needed += owned.store.pages_to_pack(_BEST, kept, len(owned.layers), self._tails(owned))
            over = (arena.live + needed) * arena.page_bytes - self.max_bytes if needed and self.max_bytes else 0
            missing = max(missing, over)
        # A plan spans all devices, so it must free as much on each as the one that lacks the most.
        return missing * len(self._arenas)

    def _no_room(self) -> CacheMemoryError:
        return CacheMemoryError(
            f"Packing the newest tokens takes more than max_bytes={self.max_bytes}, and compressing harder was not "
            f"enough: what is protected stays. The last forward pass was taken back, so the cache holds {self.seen} "
            "tokens and can be used. Raise max_bytes, protect fewer slots, or shorten the input."
        )

    def _due(self) -> bool:
        """Whether a packing during decoding also plans."""
        when = self.recipe.when
        return when.decode and self.seen - self._planned >= (when.interval or 0)

    def _fade(self) -> None:
        """Lets what was observed count less by the steps decoded since this was last done."""
        steps = self.seen - max(self._faded, self._prompt)
        self._faded = self.seen
        fields, factor = ((), 1.0) if self._observer is None else self._observer.fading
        if steps > 0:
            for name in fields:
                for owned in self._stores.values():
                    owned.store.scale_field(name, factor**steps)

    def _give_back(self) -> None:
        for layer in self._layers:
            layer.plan = None  # a plan holds on to the tables and slabs it was made for
        for arena in self._arenas.values():
            arena.trim(None if self._room is None else self._room // len(self._arenas))

    def _tail_used(self, owned: _StoreLayers) -> int:
        return max((self._layers[index].tail_used for index in owned.layers), default=0)

    def _tails(self, owned: _StoreLayers) -> torch.Tensor | None:
        """Slots in the tails on the host, `int32` `[layers of the store, batch]`; `None` if only the device knows."""
        here = known(owned.store.tail_lengths)
        if here is not None:
            return here
        lengths = torch.zeros((owned.store.layers, self.batch), dtype=torch.int32)
        for row, index in zip(lengths, owned.layers, strict=False):
            layer = self._layers[index]
            if layer.uneven and layer.tails is None:
                return None
            row.copy_(layer.tails) if layer.uneven and layer.tails is not None else row.fill_(layer.tail_used)
        return lengths

    def _learn(self) -> None:
        """Asks, at once, for what masks have left to the devices: tails of uneven lengths, and the padding so far."""
        owners = [owned for owned in self._stores.values() if self._tails(owned) is None]
        padding = [] if self._padding is None else [self._padding]
        answers = ask([*(owned.store.tail_lengths for owned in owners), *padding])
        for owned, tails in zip(owners, answers, strict=False):
            for index, row in zip(owned.layers, tails, strict=False):
                self._layers[index].tails = row
        for asked, answer in zip(padding, answers[len(owners) :], strict=True):
            known_as(asked, answer)

    @property
    def _clamped(self) -> list[torch.Tensor]:
        return [count for owned in self._stores.values() for count in owned.store.clamped]

    def _tell_clamped(self, counts: Sequence[torch.Tensor]) -> None:
        """Lets the stores warn: of as many slots as they asked for in [`_clamped`]."""
        stores = [owned.store for owned in self._stores.values() if owned.store.clamped]
        for store, count in zip(stores, counts, strict=True):
            store.tell_clamped(int(count))

    def _drop_outside_windows(self) -> None:
        dropped: list[tuple[PagedStore, int, torch.Tensor, torch.Tensor]] = []
        for owned in self._stores.values():
            window, store = self._layers[owned.layers[0]].window, owned.store
            if window is None or self.seen < window:
                continue
            # The next query is at position `seen` and sees what is less than `window` away. Where there is no slot, 0
            # is read, which is too far away.
            keeps = [store.read_field(tier, "position") > self.seen - window for tier in range(len(self.recipe.tiers))]
            dropped += [(store, tier, keep, keep.sum(1, dtype=torch.int32)) for tier, keep in enumerate(keeps)]
        for (store, tier, keep, kept), here in zip(dropped, ask([kept for *_, kept in dropped]), strict=True):
            store.evict(tier, keep, known_as(kept, here))

    def _plan(self, freeing: int = 0) -> None:
        """Brings every sequence within the budget, over all its layers and heads together.

        Args:
            freeing (`int`): Bytes of pages that must come free, whatever the budget.
        """
        observer = self._observer
        if observer is None:
            return
        parts = [
            StorePart(owned.store, tuple(owned.layers), tuple(self._layers[i].group for i in owned.layers))
            for owned in self._stores.values()
        ]
        padding = torch.zeros(self.batch, dtype=torch.int64) if self._padding is None else on_host(self._padding)
        tokens, expected = self.seen - padding, max(self.seen, self.prompt_tokens or 0) - padding
        windows = [self._layers[owned.layers[0]].window for owned in self._stores.values()]
        aside = [self._bytes_aside(part.store) for part in parts]
        held = torch.stack([bytes_held(part.store) for part in parts]).sum(0)
        ruled: list[tuple[Recipe, Plan, torch.Tensor | slice, Limits]] = []
        for recipe, rows in self._sequences_by_recipe():
            plan: Plan | None = recipe.plan
            if plan is None:
                return
            on_top = prompt_on_top(recipe, self._prompt, padding[rows])
            limits = make_limits(recipe, parts, windows, aside, expected=expected[rows], held=held[rows], on_top=on_top)
            ruled.append((recipe, plan, rows, limits))
        self._planned = self.seen
        waits = [limits.fits if plan.headroom and not freeing else None for _, plan, _, limits in ruled]
        if all(fits is not None and bool(fits.all()) for fits in waits):
            self._note_room(ruled, held)
            return
        slots = gather_slots(parts, observer.fields, self.seen, self._prompt)
        if not slots.filled.shape[-1]:  # so far everything was padding
            return
        importance, spread = observer.importance(slots), observer.spread(slots)
        views = [
            make_view(
                recipe,
                slots.of(rows),
                limits,
                importance=pick(importance, rows),
                spread=None if spread is None else pick(spread, rows),
                tokens=tokens[rows],
                padding=padding[rows],
                distortion=self._losses(),
                headroom=0.0 if self._unfinished else plan.headroom,
            )
            for recipe, plan, rows, limits in ruled
        ]
        if freeing:
            views = under_pressure(views, freeing)
        # Each sequence is planned when it would be if it were alone, so some may have to stay as they are.
        rulings = [
            Ruling(plan, view, rows, fits) for (_, plan, rows, _), view, fits in zip(ruled, views, waits, strict=True)
        ]
        decision, clamped = decide(parts, slots, rulings, self._clamped)
        self._tell_clamped(clamped)
        self.statistics.plans += 1
        turning = self.inv_freq if self.recipe.positions == "reindexed" else None
        self.statistics.evicted_slots += apply_targets(parts, slots, decision, turning)
        self._note_room(ruled, torch.stack([bytes_held(part.store) for part in parts]))

    def _note_room(
        self, ruled: Sequence[tuple[Recipe, Plan, torch.Tensor | slice, Limits]], held: torch.Tensor
    ) -> None:
        """Remembers what the budgets still allow beyond what is held, so that no more free pages are kept."""
        self._room = None
        if all(limits.allowed_bytes is not None for *_, limits in ruled):
            allowed = sum(int(limits.allowed_bytes.sum()) for *_, limits in ruled if limits.allowed_bytes is not None)
            self._room = max(0, allowed - int(held.sum()))

    def _sequences_by_recipe(self) -> list[tuple[Recipe, torch.Tensor | slice]]:
        """Each recipe with the sequences that it rules: `int64` indices, or all of them."""
        if len(self._recipes) == 1:
            return [(self.recipe, slice(None))]
        rows: dict[Recipe, list[int]] = {}
        for row, recipe in enumerate(self._recipes):
            rows.setdefault(recipe, []).append(row)
        return [(recipe, torch.tensor(mine)) for recipe, mine in rows.items()]

    def _bytes_aside(self, store: PagedStore) -> int:
        """Bytes of a store for one sequence that are not pages: its tail while decoding, lengths, means and the like.

        What depends on the other sequences of the batch is left out: a sequence must be compressed alike whatever it
        is batched with.
        """
        geometry = store.geometry
        slot = 2 * geometry.head_dim * geometry.dtype.itemsize + 4 * len(store.layout.fields)
        rows = store.layers * geometry.kv_heads
        means = 8 * geometry.head_dim if self._describe is not None else 0
        shift = 0 if store.key_shift is None else store.key_shift.nbytes // self.batch
        positions = 4 * store.layers * (self.recipe.when.every + 1)  # of the tail, and how many it holds
        slab = 12  # its address and size
        return rows * (self.recipe.when.every * slot + 4 * len(store.layout.tiers) + means) + positions + shift + slab

    def _note_peak(self) -> None:
        self.statistics.peak_bytes = max(self.statistics.peak_bytes, self.nbytes)

    # -- places ----------------------------------------------------------------------------------------------------

    def _place(self, layer: _Layer, layer_idx: int, key: torch.Tensor) -> PagedStore:
        """Finds or makes the store for a layer when its first keys arrive."""
        batch, heads, _, head_dim = key.shape
        if batch != self.batch:
            raise ValueError(f"The cache holds {self.batch} sequences, but keys of {batch} arrived; use a fresh cache.")
        geometry = Geometry(key.device, key.dtype, heads, head_dim, layer.window is not None)
        owned = self._stores.get(geometry)
        if owned is None:
            layout = layout_for(self.recipe, geometry)
            place = (key.device, layout.page_bytes)
            if place not in self._arenas:
                self._arenas[place] = Arena(layout.page_bytes, key.device, self.max_bytes)
            alike = sum(
                (other.window is None) == (layer.window is None) for other in self._layers if other.sharing != "reuse"
            )
            backend = kernels.get_backend(key.device)
            owned = _StoreLayers(PagedStore(geometry, alike, batch, layout, self._arenas[place], backend))
            self._stores[geometry] = owned
        layer.store, layer.index = owned.store, len(owned.layers)
        owned.layers.append(layer_idx)
        return owned.store

    # -- the past as a whole ---------------------------------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        """Forgets the newest tokens.

        Args:
            tokens (`int`): How many, at least 0. With 0, what was recorded is committed.

        Raises:
            UnsupportedFeatureError: If some of them have been compressed already.
        """
        target = max(0, self.seen - tokens)
        removed = self.seen - target
        if removed:
            for owned in self._stores.values():
                self._crop_store(owned, removed, target)
            for layer in self._layers:
                layer.seen = min(layer.seen, target)
                del layer.held[max(0, len(layer.held) - removed) :]
            self.seen = target
        if self.recording:
            self._commit()

    def _crop_store(self, owned: _StoreLayers, removed: int, target: int) -> None:
        store = owned.store
        in_tail = self._tail_used(owned)
        if removed > in_tail:
            behind = removed - in_tail
            if store.evicted:
                raise UnsupportedFeatureError(
                    f"crop would remove {removed} tokens, but only the newest {in_tail} are still in the tail and the "
                    "others have been compressed with eviction; call activate_past_recording() before generating what "
                    "may have to be taken back, or fork() the cache."
                )
            shorter = (store.lengths_on_host()[_BEST] - behind).clamp(min=0)
            store.truncate(_BEST, to_device(shorter, store.geometry.device))
        store.crop_tail(target)
        for index in owned.layers:
            self._layers[index].tail_used = max(0, self._layers[index].tail_used - removed)
            self._layers[index].tails = None

    def _commit(self) -> None:
        """Does what past recording held back, now that nothing of it can be taken back any more.

        The queries of the tokens that stayed are counted one by one, as if each had been decoded by itself; so
        importance, packing and plans are those of plain decoding.
        """
        self.recording = False
        held = [list(layer.held) for layer in self._layers]
        count = max((len(tokens) for tokens in held), default=0)
        try:
            if count:
                self._rewind(self.seen - count)
            for token in range(count):
                for layer, tokens in zip(self._layers, held, strict=True):
                    if layer.store is not None and tokens:
                        self._decode(layer, layer.store, tokens[token])
                        layer.seen += 1
                self.seen += 1
                self._settle()
            if not count:
                self._settle()
        finally:
            self.recording = True

    def _settle(self) -> None:
        if not self._make_room():
            raise self._no_room()
        self._end_forward()

    def _rewind(self, target: int) -> None:
        """Takes recorded tokens out of the tail, which holds all of them."""
        removed = self.seen - target
        for owned in self._stores.values():
            owned.store.crop_tail(target)
            for index in owned.layers:
                layer = self._layers[index]
                layer.seen, layer.tail_used, layer.tails = target, layer.tail_used - removed, None
                layer.held.clear()
        self.seen = target

    def tokens_until_packing(self) -> int:
        """How many more tokens fit into the tail before it is packed.

        Returns:
            `int`: Tokens, at least 0.
        """
        used = max((self._tail_used(owned) for owned in self._stores.values()), default=0)
        return max(0, self.recipe.when.every - used)

    def select(self, index: torch.Tensor) -> None:
        """Makes sequence `i` what sequence `index[i]` was.

        Args:
            index (`torch.Tensor`): `int64` `[new batch]`.
        """
        if not self.batch:
            return
        index = on_host(index)
        if index.numel() == self.batch and bool((index == torch.arange(self.batch)).all()):
            return
        for owned in self._stores.values():
            owned.store.select(index)
        for layer in self._layers:
            layer.plan = None
        if self._padding is not None:
            self._padding = pick(self._padding, index)
        self._distortion = {layer: pick(losses, index) for layer, losses in self._distortion.items()}
        for layer in self._layers:
            layer.held = [held.select(index) for held in layer.held]
            layer.tails = None if layer.tails is None else layer.tails[index]
        if len(self._recipes) > 1:
            self._recipes = tuple(self._recipes[i] for i in index.tolist())
        self.batch = index.numel()

    def reset(self) -> None:
        """Forgets everything and gives all pages back."""
        for owned in self._stores.values():
            owned.store.close()
        for arena in self._arenas.values():
            arena.trim()
        self._stores.clear()
        self._arenas.clear()
        self._layers = [_Layer(layer.window, layer.sharing) for layer in self._layers]
        self.seen = self.batch = self._prompt = self._planned = self._faded = 0
        self._padding = None
        self._distortion = {}
        self._unfinished = self.awaits_second_reading = False
        self._waiting.clear()

    def fork(self) -> "PagedAttention":
        """A copy that shares pages until one of the two writes to them.

        Returns:
            `PagedAttention`: The copy.
        """
        other = PagedAttention(
            self._recipes, self.windows, self.prompt_tokens, self.max_bytes, self.sharing, self.inv_freq
        )
        other.seen, other.batch, other.recording = self.seen, self.batch, self.recording
        other._unfinished, other._prompt = self._unfinished, self._prompt
        other._planned, other._faded = self._planned, self._faded
        other.awaits_second_reading = self.awaits_second_reading
        other._distortion = {layer: losses.clone() for layer, losses in self._distortion.items()}
        other._padding = self._padding
        other._arenas = dict(self._arenas)
        for geometry, owned in self._stores.items():
            other._stores[geometry] = _StoreLayers(owned.store.fork(), list(owned.layers))
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            theirs.index, theirs.group = mine.index, mine.group
            theirs.seen, theirs.tail_used = mine.seen, mine.tail_used
            theirs.uneven, theirs.tails = mine.uneven, mine.tails
            theirs.held = list(mine.held)
            if mine.store is not None:
                theirs.store = other._stores[mine.store.geometry].store
        return other

    def state(self) -> AttentionState:
        """What a file must hold besides the stores; the inverse of [`PagedAttention.load_state`].

        Returns:
            `AttentionState`: Numbers and tensors that are not changed in place later.

        Raises:
            RuntimeError: If a forward pass is under way or stopped half way, or recorded tokens wait for `crop`.
        """
        if any(layer.store is not None and layer.seen != self.seen for layer in self._layers):
            raise RuntimeError("A forward pass is not through yet; save the cache between two forward passes.")
        if any(layer.held for layer in self._layers):
            raise RuntimeError("Recorded tokens may still be taken back; to save, call crop(0) first.")
        return AttentionState(
            seen=self.seen,
            batch=self.batch,
            prompt=self._prompt,
            prompt_tokens=self.prompt_tokens,
            planned=self._planned,
            faded=self._faded,
            recording=self.recording,
            unfinished=self._unfinished,
            groups=[layer.group for layer in self._layers],
            tail_used=[layer.tail_used for layer in self._layers],
            padding=self._padding,
            distortion=torch.cat([self._distortion[i] for i in sorted(self._distortion)], dim=1)
            if self._losses()
            else None,
        )

    def load_state(self, state: AttentionState, stores: Sequence[tuple[PagedStore, Sequence[int]]]) -> None:
        """Fills an empty cache; nothing is checked here.

        Args:
            state (`AttentionState`): As from [`PagedAttention.state`].
            stores (`Sequence[tuple[PagedStore, Sequence[int]]]`): Filled stores, and the layers of the model whose rows
                each of them holds.
        """
        self.seen, self.batch, self._prompt = state.seen, state.batch, state.prompt
        self.prompt_tokens, self.recording, self._unfinished = state.prompt_tokens, state.recording, state.unfinished
        self._planned, self._faded = state.planned, state.faded
        self._padding = state.padding
        heads = {layer: store.geometry.kv_heads for store, layers in stores for layer in layers}
        if state.distortion is not None:
            parts = state.distortion.split([heads[layer] for layer in sorted(heads)], dim=1)
            self._distortion = dict(zip(sorted(heads), parts, strict=True))
        for store, layers in stores:
            self._stores[store.geometry] = _StoreLayers(store, list(layers))
            self._arenas[store.geometry.device, store.arena.page_bytes] = store.arena
            for index, layer_idx in enumerate(layers):
                layer = self._layers[layer_idx]
                layer.store, layer.index, layer.seen = store, index, state.seen
                layer.group, layer.tail_used = state.groups[layer_idx], state.tail_used[layer_idx]
                layer.uneven = True  # for all we know
        self._note_peak()

    def abandon(self) -> None:
        """Drops this cache's references to pages that forks may go on using; for finalizers, it waits for nobody."""
        forked = self.has_forks
        for owned in self._stores.values():
            if forked:
                owned.store.abandon()
            else:
                owned.store.arena.forget_abandoned()

    # -- looking inside --------------------------------------------------------------------------------------------

    @property
    def windows(self) -> list[int | None]:
        """`list[int | None]`: Sliding window of each layer."""
        return [layer.window for layer in self._layers]

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """`tuple[Recipe, ...]`: One for all sequences, or one per sequence."""
        return self._recipes

    @property
    def sharing(self) -> list[str | None]:
        """`list[str | None]`: Per layer whether its keys and values are read by others, or are those of another."""
        return [layer.sharing for layer in self._layers]

    @property
    def num_layers(self) -> int:
        """`int`: Layers of the model."""
        return len(self._layers)

    @property
    def has_forks(self) -> bool:
        """`bool`: Whether other caches take pages from the same arenas."""
        mine = {id(owned.store) for owned in self._stores.values()}
        return any(arena.has_other_owners(mine) for arena in self._arenas.values())

    @property
    def stores(self) -> list[PagedStore]:
        """`list[PagedStore]`: One per shape of layer and device."""
        return [owned.store for owned in self._stores.values()]

    @property
    def layers_of_stores(self) -> list[list[int]]:
        """`list[list[int]]`: Layers of the model in each of the stores, in the order of its rows."""
        return [list(owned.layers) for owned in self._stores.values()]

    @property
    def arenas(self) -> list[Arena]:
        """`list[Arena]`: The page pools."""
        return list(self._arenas.values())

    @property
    def nbytes(self) -> int:
        """`int`: Bytes allocated for slabs, tables and tails."""
        pools = sum(a.nbytes + a.table_bytes for a in self._arenas.values())
        return pools + sum(owned.store.own_bytes for owned in self._stores.values())

    def slots_per_head(self) -> list[torch.Tensor]:
        """Slots kept in each row.

        Returns:
            `list[torch.Tensor]`: One `int64` `[batch, kv_heads]` per layer; empty for a layer that never ran.
        """
        slots = {id(owned.store): owned.store.slots() for owned in self._stores.values()}
        return [
            torch.zeros((self.batch, 0), dtype=torch.int64)
            if layer.store is None
            else slots[id(layer.store)][layer.index]
            for layer in self._layers
        ]

    def dense_bytes(self) -> int:
        """What a `DynamicCache` would hold after the same tokens, padding included.

        Returns:
            `int`: Bytes.
        """
        total = 0
        for layer in self._layers:
            if layer.store is not None:
                geometry = layer.store.geometry
                tokens = layer.seen if layer.window is None else min(layer.seen, layer.window - 1)
                total += 2 * self.batch * geometry.kv_heads * geometry.head_dim * geometry.dtype.itemsize * tokens
        return total


def _sum(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The sum where `second` lies, known on the host if both are."""
    here, there = known(first), known(second)
    total = to_device(first, second.device) + second
    return total if here is None or there is None else known_as(total, here + there)


def layout_for(recipe: Recipe, geometry: Geometry) -> kernels.PageLayout:
    """What the pages of a cache look like.

    Args:
        recipe (`Recipe`): Its recipe: tiers, page size, and whether slots need positions and scores.
        geometry (`Geometry`): Shape and dtype of the keys.

    Returns:
        `PageLayout`: The layout.

    Raises:
        ValueError: If the recipe's `page_bytes` cannot hold a page, or `head_dim` is not supported.
    """
    observed = () if recipe.observer is None else recipe.observer.fields
    fields = ("position", *observed) if recipe.evicts or geometry.windowed else ()
    tiers = [TIERS[name] for name in recipe.tiers]
    return kernels.page_layout(geometry.head_dim, geometry.dtype, tiers, fields, recipe.page_bytes)
