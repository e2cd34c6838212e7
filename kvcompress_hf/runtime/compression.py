"""What follows packing, over all layers at once: windows, plans, fading; and making room before memory runs out."""

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvcompress_hf.errors import CacheMemoryError, UnsupportedFeatureError
from kvcompress_hf.observers import checked
from kvcompress_hf.paging.slots import (
    Decision,
    Slots,
    StorePart,
    apply_targets,
    gather_slots,
    own_before_applying,
)
from kvcompress_hf.paging.store import PagedStore
from kvcompress_hf.paging.waiting import ask, known_as, on_host, pick, to_device
from kvcompress_hf.plans.base import Plan, PlanView
from kvcompress_hf.plans.decide import Ruling, decide
from kvcompress_hf.plans.distortion import MOST_MEASURED, measure_distortion
from kvcompress_hf.plans.pressure import under_pressure
from kvcompress_hf.plans.run import Limits, bytes_held, make_limits, make_view, prompt_on_top, slots_held
from kvcompress_hf.recipe import TIERS, Recipe
from kvcompress_hf.runtime.call import AttentionCall
from kvcompress_hf.runtime.looking import look
from kvcompress_hf.runtime.packing import describe_of, entry_of, packs_next
from kvcompress_hf.runtime.padding import padding_first
from kvcompress_hf.runtime.rollback import Rollback
from kvcompress_hf.runtime.state import CacheState, LayerState

_CACHED_SLOTS = 1 << 18  # what is looked at several times over takes 4 bytes for each


@dataclass(frozen=True)
class _Ruled:
    """A recipe's plan, the sequences it rules, and what they may hold."""

    recipe: Recipe
    plan: Plan
    rows: torch.Tensor | slice
    limits: Limits

    def of(self, sequences: torch.Tensor | slice) -> "_Ruled":
        """The same for some of the sequences that it rules, by their place among these."""
        if isinstance(self.rows, slice):
            rows = torch.arange(self.limits.held_bytes.numel())[sequences]
        else:
            rows = self.rows[sequences]
        return replace(self, rows=rows, limits=self.limits.of(sequences))

    def due(self, freeing: int) -> "_Ruled | None":
        """The same for the sequences that are to be planned for; `None` if there is none.

        A plan that leaves headroom has nothing to do for those that are within their budget. Each sequence is planned
        for when it would be if it were alone.
        """
        waits = self.limits.fits if self.plan.headroom and not freeing else torch.zeros_like(self.limits.fits)
        if not bool(waits.any()):
            return self
        return None if bool(waits.all()) else self.of(torch.nonzero(~waits).flatten())

    def among(self, chosen: torch.Tensor | None) -> torch.Tensor | slice:
        """Where its sequences are among the chosen ones of the batch, which are all if `None`."""
        if chosen is None or isinstance(self.rows, slice):
            return self.rows
        return torch.searchsorted(chosen, self.rows)

    def split(self, most: int) -> "list[_Ruled]":
        """The same for at most so many sequences at a time."""
        count = self.limits.held_bytes.numel()
        parts = [slice(first, min(first + most, count)) for first in range(0, count, most)]
        if len(parts) == 1:
            return [self]
        every = isinstance(self.rows, slice)
        return [replace(self.of(part), rows=part) if every else self.of(part) for part in parts]


@dataclass(frozen=True)
class _Decided:
    """A decision that has not been carried out."""

    parts: list[StorePart]
    slots: Slots
    decision: Decision
    ruled: list[_Ruled]


def _together(slots: Slots) -> int:
    """How many sequences are planned at a time: on a CPU as many as its caches hold, on a device all."""
    batch, rows, width = slots.filled.shape
    return max(1, _CACHED_SLOTS // (rows * width)) if slots.filled.device.type == "cpu" else batch


class Compression:
    """Plans over one cache.

    Args:
        state (`CacheState`): The cache.
        rollback (`Rollback`): Told before stored slots are written over.
    """

    def __init__(self, state: CacheState, rollback: Rollback) -> None:
        self.state: CacheState = weakref.proxy(state)  # see Rollback
        self.rollback = rollback
        self.needs_distortion = any(r.plan is not None and r.plan.needs_distortion for r in state.given_recipes)

    # -- after packing ---------------------------------------------------------------------------------------------

    def after_packing(self) -> None:
        """Drops what no window reaches, plans where it is due, and lets statistics fade."""
        state, counters = self.state, self.state.counters
        when, observer = state.recipe.when, state.recipe.observer
        started = time.perf_counter()
        self._drop_outside_windows()
        if counters.unfinished and observer is not None and observer.reads_again:
            counters.awaits_second_reading = True
        elif state.recipe.evicts and (when.prefill if counters.unfinished else self._due()):
            if counters.awaits_second_reading:
                raise UnsupportedFeatureError(
                    f"The recipe {state.recipe.name!r} reads the prompt a second time before it decides what to keep, "
                    "and this cache was filled without: fill it by kvcompress_hf.prefill(model, input_ids, recipe) or "
                    "by generate(input_ids), or take a recipe with another observer, such as 'auto'."
                )
            self.plan()
        self._fade()
        if counters.unfinished:
            self._tell_clamped(ask(self._clamped))
        counters.unfinished = False
        self.drop_feedback()
        state.statistics.seconds_planning += time.perf_counter() - started

    def drop_feedback(self) -> None:
        """Forgets how keys of the prompt were to be rounded, once they are, unless those to come are rounded so too."""
        if not self.state.recipe.keeps_feedback and not self.state.counters.awaits_second_reading:
            for owned in self.state.owned.values():
                owned.store.drop_key_feedback()

    def _due(self) -> bool:
        """Whether a packing during decoding also plans."""
        when, counters = self.state.recipe.when, self.state.counters
        return when.decode and counters.seen - counters.planned >= (when.interval or 0)

    def _drop_outside_windows(self) -> None:
        state = self.state
        dropped: list[tuple[PagedStore, int, torch.Tensor, torch.Tensor]] = []
        for owned in state.owned.values():
            window, store = state.layers[owned.layers[0]].window, owned.store
            if window is None or state.seen < window:
                continue
            # The next query is at position `seen` and sees what is less than `window` away. Where there is no slot, 0
            # is read, which is too far away.
            keeps = [
                store.read_field(tier, "position") > state.seen - window for tier in range(len(state.recipe.tiers))
            ]
            dropped += [(store, tier, keep, keep.sum(1, dtype=torch.int32)) for tier, keep in enumerate(keeps)]
        for (*_, kept), here in zip(dropped, ask([kept for *_, kept in dropped]), strict=True):
            known_as(kept, here)
        for store, tier, _, kept in dropped:
            store.own_before_evicting(tier, kept, kept < store.lengths[tier])
        if any(not torch.equal(on_host(kept), store.lengths_on_host()[tier]) for store, tier, _, kept in dropped):
            self.rollback.overwrites("Dropping what lies outside sliding windows")
        for store, tier, keep, kept in dropped:
            store.evict(tier, keep, kept)

    def _fade(self) -> None:
        """Lets what was observed count less by the steps decoded since this was last done."""
        state, counters = self.state, self.state.counters
        steps = counters.seen - max(counters.faded, counters.prompt)
        counters.faded = counters.seen
        observer = state.recipe.observer
        names, factor = ((), 1.0) if observer is None else observer.fading
        if steps > 0 and names:
            for owned in state.owned.values():
                owned.store.own_all()
            self.rollback.overwrites("Fading of statistics")
            for name in names:
                for owned in state.owned.values():
                    owned.store.scale_field(name, factor**steps)

    @property
    def _clamped(self) -> list[torch.Tensor]:
        return [count for owned in self.state.owned.values() for count in owned.store.clamped]

    def _tell_clamped(self, counts: Sequence[torch.Tensor]) -> None:
        """Passes clamp counts, asked for in [`Compression._clamped`], to the stores, which warn."""
        stores = [owned.store for owned in self.state.owned.values() if owned.store.clamped]
        for store, count in zip(stores, counts, strict=True):
            store.tell_clamped(int(count))

    # -- measuring -------------------------------------------------------------------------------------------------

    def measure(self, number: int, layer: LayerState, new: AttentionCall, real_on_host: torch.Tensor | None) -> None:
        """Measures what tiers lose on the first tokens of every sequence.

        Args:
            number (`int`): Index of the layer.
            layer (`LayerState`): The layer.
            new (`AttentionCall`): The tokens of a chunk.
            real_on_host (`torch.Tensor`, *optional*): `new.valid` on the host.
        """
        distortion, note = self.state.counters.distortion, self.rollback.note
        before = distortion.get(number)
        padded = None if note is None else note.counters.padding
        if before is not None and (padded is None or bool((on_host(padded) < layer.seen).all())):
            return  # every sequence had tokens before
        older = max(0, new.tokens - MOST_MEASURED)
        padding = None if real_on_host is None else (~real_on_host[:, older:]).sum(1)
        tiers = [TIERS[name] for name in self.state.recipe.tiers]
        query, key, value = (states[:, :, older:] for states in (new.query, new.key, new.value))
        value = value if layer.store is None else layer.store.rotated(value)
        measured = measure_distortion(query, key, value, new.logits.scale, tiers, padding)
        if before is not None:
            before = to_device(before, measured.device)
            measured = torch.where(before.isnan(), measured, before)
        distortion[number] = measured

    # -- plans -----------------------------------------------------------------------------------------------------

    def plan(self) -> None:
        """Brings every sequence within the budget, over all its layers and heads together."""
        decided = self._decide()
        if decided is not None:
            self._apply(decided)

    def _decide(self, freeing: int = 0) -> _Decided | None:
        """Asks the plans; nothing that is stored changes.

        Args:
            freeing (`int`): Bytes of pages that must come free, whatever the budget.

        Returns:
            `_Decided` or `None`: The decision; `None` if there is nothing to decide.
        """
        state, counters, observer = self.state, self.state.counters, self.state.recipe.observer
        if observer is None:
            return None
        parts = [
            StorePart(owned.store, tuple(owned.layers), tuple(state.layers[i].group for i in owned.layers))
            for owned in state.owned.values()
        ]
        padding = torch.zeros(state.batch, dtype=torch.int64) if counters.padding is None else on_host(counters.padding)
        held = torch.stack([bytes_held(part.store) for part in parts]).sum(0)
        ruled = self._rule(parts, padding, held)
        if ruled is None:
            return None
        counters.planned = state.seen
        due = [part for each in ruled if (part := each.due(freeing)) is not None]
        if not due:
            self._note_room(ruled, held)
            return None
        wanted = torch.zeros(state.batch, dtype=torch.bool)
        for each in due:
            wanted[each.rows] = True
        # Where keys are turned or looked at, all are.
        every = state.recipe.positions == "reindexed" or bool(observer.looks) or bool(wanted.all())
        chosen = None if every else torch.nonzero(wanted).flatten()
        slots = gather_slots(parts, observer.fields, state.seen, counters.prompt, chosen)
        gaps = counters.gaps
        if chosen is not None:
            padding, gaps = padding[chosen], None if gaps is None else pick(gaps, chosen)
        slots = replace(slots, positions=padding_first(slots.positions, gaps), padding=padding)
        if not slots.filled.shape[-1]:  # so far everything was padding
            return None
        if observer.looks:
            slots = replace(slots, fields={**slots.fields, **look(state, observer, parts, slots)})
        recent = slots.seen
        if freeing and self.rollback.note is not None:
            # If room is not made, the token under way is taken back, and what was recent then must still be there.
            recent = min(recent, self.rollback.note.counters.seen)
        due = [part for each in due for part in each.split(_together(slots))]
        losses = state.losses()
        among = [each.among(chosen) for each in due]
        views = [self._view(each, slots.of(rows), losses, recent) for each, rows in zip(due, among, strict=True)]
        if freeing:
            views = under_pressure(views, freeing)
        rulings = [Ruling(each.plan, view, rows) for each, view, rows in zip(due, views, among, strict=True)]
        decision, clamped = decide(parts, slots, rulings, self._clamped, chosen)
        self._tell_clamped(clamped)
        return _Decided(parts, slots, decision, ruled)

    def _view(self, ruled: _Ruled, slots: Slots, losses: Sequence[torch.Tensor], recent: int) -> PlanView:
        """What a plan decides on; slots are recent by their distance from a position."""
        state, observer, padding = self.state, self.state.recipe.observer, slots.padding
        if observer is None or padding is None:
            raise ValueError("A plan needs an observer, and slots whose padding is known.")
        importance, spread = checked.rank(observer, slots)
        return make_view(
            ruled.recipe,
            replace(slots, seen=recent),
            ruled.limits,
            importance=importance,
            spread=spread,
            tokens=state.seen - padding,
            padding=padding,
            distortion=[of_layer[ruled.rows] for of_layer in losses],
            headroom=0.0 if state.counters.unfinished else ruled.plan.headroom,
            guesses=state.guesses,
        )

    def _rule(self, parts: Sequence[StorePart], padding: torch.Tensor, held: torch.Tensor) -> list[_Ruled] | None:
        """Each recipe's plan and limits; `None` if one has no plan."""
        state = self.state
        expected = max(state.seen, state.prompt_tokens or 0) - padding
        windows = [state.layers[part.layers[0]].window for part in parts]
        aside = [self._bytes_aside(part.store) for part in parts]
        stored = torch.stack([slots_held(part.store) for part in parts]).sum(0)
        ruled = []
        for recipe, rows in self._sequences_by_recipe():
            plan: Plan | None = recipe.plan
            if plan is None:
                return None
            on_top = prompt_on_top(recipe, state.counters.prompt, padding[rows])
            limits = make_limits(
                recipe,
                parts,
                windows,
                aside,
                expected=expected[rows],
                held=(held[rows], stored[rows]),
                on_top=on_top,
                entering=(state.entry, state.every),
            )
            ruled.append(_Ruled(recipe, plan, rows, limits))
        return ruled

    def _apply(self, decided: _Decided) -> None:
        state, parts = self.state, decided.parts
        turning = state.inv_freq if state.recipe.positions == "reindexed" else None
        own_before_applying(parts, decided.slots, decided.decision, turning is not None)
        self.rollback.overwrites("Evicting and lowering slots")
        state.statistics.plans += 1
        remembers = state.recipe.keeps_mean
        state.statistics.evicted_slots += apply_targets(parts, decided.slots, decided.decision, turning, remembers)
        self._note_room(decided.ruled, torch.stack([bytes_held(part.store) for part in parts]))

    def _note_room(self, ruled: Sequence[_Ruled], held: torch.Tensor) -> None:
        """Remembers what the budgets still allow beyond what is held, so that no more free pages are kept."""
        allowed = [each.limits.allowed_bytes for each in ruled]
        known = [int(each.sum()) for each in allowed if each is not None]
        self.state.counters.room = max(0, sum(known) - int(held.sum())) if len(known) == len(allowed) else None

    def _sequences_by_recipe(self) -> list[tuple[Recipe, torch.Tensor | slice]]:
        """Each recipe with the sequences that it rules: `int64` indices, or all of them."""
        recipes = self.state.recipes
        if len(recipes) == 1:
            return [(self.state.recipe, slice(None))]
        rows: dict[Recipe, list[int]] = {}
        for row, recipe in enumerate(recipes):
            rows.setdefault(recipe, []).append(row)
        return [(recipe, torch.tensor(mine)) for recipe, mine in rows.items()]

    def _bytes_aside(self, store: PagedStore) -> int:
        """Bytes of a store for one sequence that are not pages: its tail while decoding, lengths, means and the like.

        What depends on the other sequences of the batch is left out: a sequence must be compressed alike whatever it
        is batched with.
        """
        geometry, every = store.geometry, self.state.every
        slot = 2 * geometry.head_dim * geometry.dtype.itemsize + 4 * len(store.layout.fields)
        rows = store.layers * geometry.kv_heads
        means = 8 * geometry.head_dim if describe_of(self.state) is not None else 0
        of_keys = [
            each.nbytes // self.state.batch
            for each, stays in ((store.key_shift, True), (store.key_feedback, self.state.recipe.keeps_feedback))
            if each is not None and stays
        ]
        queries = store.queries.nbytes // self.state.batch
        if self.state.recipe.keeps_mean and not geometry.windowed:  # of what is evicted, and how much that is
            means += 2 * geometry.head_dim * geometry.dtype.itemsize + 4
        positions = 4 * store.layers * (every + 1)  # of the tail, and how many it holds
        slab = 12  # its address and size
        return rows * (every * slot + 4 * len(store.layout.tiers) + means) + positions + sum(of_keys) + queries + slab

    # -- memory ----------------------------------------------------------------------------------------------------

    def make_room(self, tokens: int = 0) -> bool:
        """Where the next packing would take an arena beyond its limit, plans for less before anything is stored.

        Args:
            tokens (`int`): New tokens to be packed besides the tails.

        Returns:
            `bool`: True if the next packing fits now.
        """
        state = self.state
        if state.max_bytes is None or state.recording or not (tokens or packs_next(state)):
            return True
        state.learn_tails()
        while (short := self._shortage(tokens)) > 0:
            live = sum(arena.live for arena in state.arenas)
            decided = self._enough(short, tokens)
            if decided is None:
                return False
            self._apply(decided)
            self.rollback.rebase()
            state.give_back()
            # Rows that now end elsewhere in a page may take more pages for the new tokens, so look again.
            if sum(arena.live for arena in state.arenas) >= live:
                return False
        return True

    def _enough(self, short: int, tokens: int) -> _Decided | None:
        """A decision after which the next packing fits, as far as that is known; `None` if there is none."""
        freeing, fewest, stride = short, None, 1
        held = sum(arena.live * arena.page_bytes for arena in self.state.arenas)
        while True:
            decided = self._decide(freeing)
            if decided is None:
                return None
            if any(part.store.arena.shared for part in decided.parts):
                return decided  # what comes free depends on others
            left = self._shortage(tokens, decided)
            if left <= 0:
                return decided
            if freeing > held:
                return None
            # Plans go by whole pages and rows, so a little less allowed may change nothing.
            stride = 1 if fewest is None or left < fewest else 2 * stride
            fewest = left if fewest is None else min(left, fewest)
            freeing += stride * left

    def _shortage(self, tokens: int, decided: _Decided | None = None) -> int:
        """Bytes of pages that are missing for packing the tails and some more tokens; not positive if none are.

        Args:
            tokens (`int`): New tokens per row besides those of the tails.
            decided (`_Decided`, *optional*): As it would be once this has been carried out.
        """
        state, missing = self.state, 0
        after: dict[int, torch.Tensor] = {}
        if decided is not None:
            pairs = zip(decided.parts, decided.decision.counts, strict=True)
            after = {id(part.store): on_host(counts).sum(0, dtype=torch.int32) for part, counts in pairs}
        for arena in state.arenas:
            needed, live = 0, arena.live
            for owned in state.owned.values():
                store = owned.store
                if store.arena is arena:
                    window = state.layers[owned.layers[0]].window
                    kept = tokens if window is None else min(tokens, window - 1)
                    lengths = after.get(id(store))
                    tier, sinks = entry_of(state, window)
                    needed += store.pages_to_pack(tier, kept, len(owned.layers), state.tails(owned), lengths, sinks)
                    live -= 0 if lengths is None else store.pages_freed(lengths)
            over = (live + needed) * arena.page_bytes - state.max_bytes if needed and state.max_bytes else 0
            missing = max(missing, over)
        # A plan spans all devices, so it must free as much on each as the one that lacks the most.
        return missing * len(state.arenas)

    def no_room(self) -> CacheMemoryError:
        """The error to raise where [`Compression.make_room`] could not, before the change is taken back.

        Returns:
            `CacheMemoryError`: The error, for the caller to raise.
        """
        note = self.rollback.note
        seen = self.state.seen if note is None else note.counters.seen
        left = f"The last forward pass was taken back, so the cache holds {seen} tokens and can be used."
        if note is not None and note.held is not None:
            left = "Recorded tokens could not all be committed; they are all there, and the cache can be used."
        return CacheMemoryError(
            f"Packing the newest tokens takes more than max_bytes={self.state.max_bytes}, and compressing harder was "
            f"not enough: what is protected stays. {left} Raise max_bytes, protect fewer slots, or shorten the input."
        )
