"""The past of one cache as a whole: forward passes begin and end, beams are selected, caches are forked and emptied."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from kvcompress_hf.observers.base import Observer
from kvcompress_hf.paging.waiting import known, known_as, on_host, to_device
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.runtime import packing
from kvcompress_hf.runtime.call import Mask
from kvcompress_hf.runtime.compression import Compression
from kvcompress_hf.runtime.padding import cut_runs, runs_of, with_runs
from kvcompress_hf.runtime.rollback import Rollback
from kvcompress_hf.runtime.state import AttentionState, CacheState, StoreLayers
from kvcompress_hf.runtime.stopped import Beginning
from kvcompress_hf.validation import MOST_TOKENS

_Self = TypeVar("_Self", bound="Past")


class Past(CacheState):
    """A cache's state, changed as a whole: each change ends, is taken back, or closes the cache.

    Arguments are those of [`CacheState`].
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rollback = Rollback(self)
        self.compression = Compression(self, self.rollback)
        observer = self.recipe.observer
        self._observer = observer
        # What a decode step adds to the statistics of stored slots; asked for once, as every layer's step needs it.
        self._sum_field = None if observer is None else observer.sum_field
        self._square_field = None if observer is None else observer.square_field
        self._observes_steps = observer is not None and observer.observes_steps
        self._remembers = observer is not None and (observer.learns_centres or observer.newest_queries > 0)
        self._counts_steps = bool(self._sum_field or self._square_field or self._observes_steps or self._remembers)
        self._new_valid: torch.Tensor | None = None  # bool [batch, tokens] on the host: real tokens of this chunk
        self._masks: dict[int, Mask] = {}  # of this forward pass, by the tensor's id
        self._waiting: list[Callable[[], None]] = []  # deferred stores: layers that share these K/V run first
        self._beginning: Beginning | None = None  # of the forward pass under way, if there is a past
        self._stopped: Beginning | None = None  # of one that was taken back, as long as the caller may not know

    # -- forward passes --------------------------------------------------------------------------------------------

    def _read_mask(self, mask: torch.Tensor) -> Mask:
        """Reads a mask once per forward pass: layers that are given the same tensor get the same [`Mask`]."""
        read = self._masks.get(id(mask))
        if read is None:
            read = Mask(mask)
            if self.rollback.note is not None:
                self._masks[id(mask)] = read  # which keeps the tensor, so that no other gets its id
        return read

    def _begin_forward(self, tokens: int, mask: torch.Tensor | None, key: torch.Tensor) -> None:
        self.rollback.check_open()
        if self.rollback.note is not None:
            self._settle_last_pass()
        if self._stopped is not None:
            self._check_repeated(key)
        # A mask that is refused must leave nothing behind, so it is read before anything is noted.
        self._masks = {}
        real = None if mask is None else self._read_mask(mask).real_tokens(mask.shape[-2], tokens, key.shape[0])
        padding = None if real is None else (~real).sum(1)
        seen = self.seen
        if seen + tokens > MOST_TOKENS:
            raise ValueError(
                f"The cache has seen {seen} tokens, and {tokens} more are beyond what positions of 32 bits count, "
                f"{MOST_TOKENS}; begin a new one."
            )
        decoding = tokens == 1 and seen > 0
        if tokens > 1 and not self.recording and seen and self.max_bytes is not None:
            with self.rollback.whole():
                self.compression.make_room(tokens)
        # A decoded token only goes to the tail, from where it can be taken back without copies of the lengths.
        statistics = seen > 0 and self._observer is not None and not self._holds
        if decoding and statistics:
            statistics = self._writes_statistics(self._observer)
        self.rollback.begin(packs=not decoding, statistics=statistics)
        self._beginning = Beginning.of(key) if seen else None
        counters = self.counters
        if not counters.batch:
            counters.recipes = self._spread_recipes(key.shape[0])
            counters.batch = key.shape[0]
        if (tokens > 1 and not self.recording) or not seen:
            counters.prompt = seen + tokens
        # While a prompt is read the device has enough to do, and how much is packed of it must be known.
        self._new_valid = None if real is None or decoding else on_host(real)
        if padding is not None:
            if self._new_valid is not None:
                known_as(padding, (~self._new_valid).sum(1))
            counters.padding = padding if counters.padding is None else _sum(counters.padding, padding)
        here = known(real) if self._new_valid is None and real is not None else self._new_valid
        if here is not None and not bool(here.all()):
            counters.gaps = with_runs(counters.gaps, runs_of(here, seen))

    def _writes_statistics(self, observer: Observer | None) -> bool:
        """Whether a decode step writes over statistics of stored slots, and does not only add to them."""
        if observer is None or not self._counts_steps:
            return False
        clears = observer.last_only and any(layer.tail_used + 1 >= self.every for layer in self.layers)
        return observer.observes_steps or clears

    def _settle_last_pass(self) -> None:
        """Ends the last forward pass if all layers are through, else takes it back and says so."""
        note, seen = self.rollback.note, self.seen
        if note is None:
            return
        if seen == note.counters.seen and not note.undoing:
            self._take_back()  # nothing of it was through
            return
        if note.undoing or any(layer.store is not None and layer.seen != seen for layer in self.layers):
            count = seen - note.counters.seen  # 0 where it was being taken back already
            self._take_back()
            raise RuntimeError(
                f"The last forward pass stopped half way, so its {f'{count} ' if count else ''}tokens were in some "
                f"layers only. They have been taken back: the cache holds {self.seen} tokens again. Repeat that "
                "forward pass."
            )
        if not self.counters.unfinished and not self._waiting:
            self.rollback.commit()
            return
        # The last layer of the model is not ours (pipeline parallelism), so the plan waited until now.
        try:
            self._end_forward()
        except BaseException:
            self._take_back()
            raise
        self.rollback.note = None

    def _take_back(self) -> None:
        self.rollback.undo()
        self._forget_pass()

    def _stop(self, error: BaseException) -> None:
        """Takes back the forward pass that an exception has stopped."""
        beginning = None if self.rollback.note is None else self._beginning
        self._take_back()
        # An error is one of the pass, which then did not happen; an interrupt says nothing of what it interrupted.
        if self.batch and not isinstance(error, Exception):
            self._stopped = beginning

    def _check_repeated(self, key: torch.Tensor) -> None:
        """Refuses to go on, once, as if the tokens of a pass that was interrupted were there."""
        stopped, self._stopped = self._stopped, None
        if stopped is not None and not stopped.repeated_by(key):
            raise RuntimeError(
                f"The last forward pass stopped half way, so its {stopped.tokens} tokens have been taken back: the "
                f"cache holds {self.seen} tokens. This pass begins with other tokens. Repeat the one that stopped; or, "
                "to go on without its tokens, repeat this one."
            )

    def _forget_pass(self) -> None:
        self._waiting.clear()
        self._masks, self._new_valid, self._beginning = {}, None, None

    def _end_forward(self) -> None:
        """Stores what waited, packs, plans and gives pages back, over all layers together."""
        self._masks = {}
        if not self.compression.make_room():
            raise self.compression.no_room()
        waiting, self._waiting = self._waiting, []
        for store in waiting:
            store()
        self._new_valid = None
        if self.recording:
            self.note_peak()
        elif packing.packs_next(self):
            self.rollback.before_packing()
            packing.pack_tails(self)
            self.compression.after_packing()
            self.give_back()
            self.note_peak()

    def _spread_recipes(self, batch: int) -> tuple[Recipe, ...]:
        """One recipe per sequence where a batch has been expanded for beams or several answers per prompt."""
        given = len(self.given_recipes)
        if given == 1 or given == batch:
            return self.given_recipes
        if batch % given:
            raise ValueError(
                f"{given} recipes were given for a batch of {batch} rows; give one per row, or a single one for all."
            )
        return tuple(recipe for recipe in self.given_recipes for _ in range(batch // given))

    @property
    def _holds(self) -> bool:
        """Whether recorded tokens keep their queries until it is known which tokens stay."""
        return self.recording and self._counts_steps

    # -- the past as a whole ---------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Ends a forward pass whose last layer is elsewhere; takes back one that stopped half way, and says so.

        Raises:
            RuntimeError: If one had stopped half way, or the cache had to be closed.
        """
        self.rollback.check_open()
        self._settle_last_pass()
        self._stopped = None

    def give_up_pass(self, left_out: Sequence[int]) -> None:
        """Takes back a forward pass that left layers out; the cache is closed where its end has come already.

        Args:
            left_out (`Sequence[int]`): Layers that should have stored its tokens and were never asked.
        """
        if self.rollback.note is not None:
            self._take_back()
        elif any(self.layers[i].seen != self.seen for i in left_out):
            self.rollback.closed = (
                f"A forward pass left out layers {list(left_out)}, so this cache has been closed and its pages given "
                "back. Call reset() and begin again with the first token."
            )
            self.clear()

    def select(self, index: torch.Tensor) -> None:
        """Makes sequence `i` what sequence `index[i]` was.

        Args:
            index (`torch.Tensor`): `int64` `[new batch]`.
        """
        self.settle()
        if not self.batch:
            return
        index = on_host(index)
        if index.numel() == self.batch and bool((index == torch.arange(self.batch)).all()):
            return
        with contextlib.ExitStack() as held:
            for arena in self.arenas:
                held.enter_context(arena.lock)
            held.enter_context(self.rollback.whole(sequences=True, held=True))
            for owned in self.owned.values():
                owned.store.select(index)
            for layer in self.layers:
                layer.held = [tokens.select(index) for tokens in layer.held]
                layer.tails = None if layer.tails is None else layer.tails[index]
            self.counters = self.counters.select(index)

    def reset(self) -> None:
        """Forgets everything and gives all pages back."""
        self.rollback.closed = "reset() was stopped in the middle; call reset() again."
        self._forget_pass()
        self._stopped = None
        self.rollback.commit()
        self.clear()
        self.rollback.closed = None

    def fork(self: _Self) -> _Self:
        """Makes a second past out of this one; pages are shared until one of the two writes to them.

        Returns:
            `PagedAttention`: The new past, with the same tokens.
        """
        self.settle()
        other = type(self)(
            self.given_recipes, self.windows, self.prompt_tokens, self.max_bytes, self.sharing, self.inv_freq
        )
        other.rotations = self.rotations
        try:
            self.share_with(other)
        except BaseException:
            for owned in other.owned.values():
                owned.store.close()
            raise
        return other

    def tensors_aside(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Lists every tensor that is kept besides arenas and the tensors of stores, for counting bytes.

        Returns:
            `tuple[list[torch.Tensor], list[torch.Tensor]]`: Tensors of counters, masks and notes; and queries, keys,
            values and padding of tokens that are held back.
        """
        note, rest = self.rollback.note, [self.inv_freq if self.batch else None, self._new_valid]
        rest += [None if each is None else each.keys for each in (self._beginning, self._stopped)]
        held = [call for layer in self.layers for call in layer.held]
        for counters in [self.counters] if note is None else [self.counters, note.counters]:
            rest += [counters.padding, counters.gaps, *counters.distortion.values()]
        for mask in self._masks.values():
            rest += mask.tensors
        if note is not None:
            rest += note.tensors
            held += [call for calls in note.held or () for call in calls]
        tokens = [tensor for call in held for tensor in (call.query, call.key, call.value, call.valid)]
        return [each for each in rest if each is not None], [each for each in tokens if each is not None]

    def state(self) -> AttentionState:
        """Collects what a file must hold besides the stores; see [`CacheState.state`].

        Returns:
            `AttentionState`: The counters of this past, and what was measured.

        Raises:
            RuntimeError: If a forward pass is under way, recorded tokens wait for `crop`, or the cache is closed.
        """
        self.rollback.check_open()
        return super().state()

    def abandon(self) -> None:
        """Drops this cache's references to pages that forks may go on using; for finalizers, it waits for nobody."""
        forked = self.has_forks
        for owned in self.owned.values():
            if forked:
                owned.store.abandon()
            else:
                owned.store.arena.forget_abandoned()

    def tokens_until_packing(self) -> int:
        """How many more tokens fit into the tail before it is packed.

        Returns:
            `int`: Number of tokens, at least 0.
        """
        used = max((self.tail_used(owned) for owned in self.owned.values()), default=0)
        return max(0, self.every - used)

    def _crop_store(self, owned: StoreLayers, removed: int, target: int) -> None:
        store = owned.store
        in_tail = self.tail_used(owned)
        if removed > in_tail:
            tier, _ = packing.entry_of(self, self.layers[owned.layers[0]].window)
            packed = store.lengths_on_host()
            left = torch.full((self.batch,), target, dtype=packed.dtype)
            if self.counters.gaps is not None:
                left -= cut_runs(self.counters.gaps, target)[..., 1].sum(1).to(left.dtype)
            left = left[:, None].expand(-1, store.geometry.kv_heads).flatten().repeat(store.layers)
            for into in (0, tier)[: tier + 1]:  # the first tier holds the first slots, where there are two
                stays = torch.minimum(packed[into], left)
                store.truncate(into, to_device(stays, store.geometry.device))
                left = left - stays
        store.crop_tail(target)
        for index in owned.layers:
            self.layers[index].tail_used = max(0, self.layers[index].tail_used - removed)
            self.layers[index].tails = None


def _sum(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The sum where `second` lies, known on the host if both are."""
    here, there = known(first), known(second)
    total = to_device(first, second.device) + second
    return total if here is None or there is None else known_as(total, here + there)
