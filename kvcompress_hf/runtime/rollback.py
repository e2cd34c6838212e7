"""Changes that happen as a whole: what they may touch is noted first, and put back if anything stops them.

A forward pass is one such change, spread over the calls of its layers; plans, `crop`, `select` and the second reading
are others. As long as slots are only added, all of it can be taken back. Evicting, lowering and re-scoring write over
what is stored; a change that is stopped in the middle of that cannot be undone, and the cache is closed instead.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from kvcompress_hf.paging.geometry import Geometry
from kvcompress_hf.paging.store import PagedStore, StoreNote
from kvcompress_hf.runtime.call import AttentionCall
from kvcompress_hf.runtime.state import CacheState, Counters, LayerState


@dataclass
class Note:
    """What a cache held when a change began.

    Args:
        counters (`Counters`): Its counters.
        recording (`bool`): Whether new tokens were held back.
        layers (`list[tuple[Any, ...]]`): Of each layer `tail_used`, `uneven`, `tails` and how many tokens were held.
        stores (`dict[Geometry, StoreNote]`): What the stores held.
        held (`list[list[Any]]`, *optional*): The held tokens themselves, where they may be taken.
        packs (`bool`): Whether the stores' notes cover packing.
        statistics (`bool`): Whether they cover statistics in slots.
        overwriting (`str`, *optional*): What is writing over stored slots, once that has begun.
        counted (`list[Counted]`): What decode steps have added to statistics that `stores` have no copies of.
        undoing (`bool`): Whether going back has begun.
        piecewise (`bool`): Whether slots are packed and planned for in the middle of the change.
        renewed (`bool`): Whether a part of the change is through, and stays.
    """

    counters: Counters
    recording: bool
    layers: list[tuple[Any, ...]]
    stores: dict[Geometry, StoreNote]
    held: list[list[Any]] | None = None
    packs: bool = True
    statistics: bool = False
    overwriting: str | None = None
    counted: list["Counted"] = field(default_factory=list)
    undoing: bool = False
    piecewise: bool = False
    renewed: bool = False

    @property
    def tensors(self) -> list[torch.Tensor]:
        """`list[torch.Tensor]`: What the notes of stores keep alive, for counting bytes."""
        of_stores = (noted.tensors.values() for noted in self.stores.values())
        fields = (values for noted in self.stores.values() for *_, values in noted.fields)
        return [*(tensor for tensors in of_stores for tensor in tensors), *fields]


@dataclass
class Counted:
    """A decoded token whose probabilities are added to statistics of stored slots.

    To copy all statistics at each step would cost more than the step, so they are taken out again by attending once
    more.

    Args:
        layer (`LayerState`): The layer.
        new (`AttentionCall`): The token.
        before (`list[torch.Tensor]`): Statistics as going back found them.
    """

    layer: LayerState
    new: AttentionCall
    before: list[torch.Tensor] = field(default_factory=list)


class Rollback:
    """Notes what a cache holds before it changes, and goes back to it.

    Args:
        state (`CacheState`): The cache.
    """

    def __init__(self, state: CacheState) -> None:
        # A proxy: a cycle would keep a dropped cache's memory until the next garbage collection.
        self.state: CacheState = weakref.proxy(state)
        self.note: Note | None = None  # of the change under way
        self.closed: str | None = None  # why the cache can no longer be used

    def begin(
        self,
        *,
        packs: bool = True,
        statistics: bool = False,
        held: bool = False,
        tail: bool = False,
        sequences: bool = False,
        renewed: bool = False,
    ) -> Note:
        """Notes everything; from now on [`Rollback.undo`] comes back to this moment.

        Args:
            packs (`bool`): Whether slots may be packed; if not, [`Rollback.before_packing`] must come before that.
            statistics (`bool`): Whether statistics in slots will change.
            held (`bool`): Whether held tokens may be taken.
            tail (`bool`): Whether slots of the tail may be written over.
            sequences (`bool`): Whether other sequences take the places of these, and nothing else happens.
            renewed (`bool`): Whether what the change under way has done so far stays.

        Returns:
            `Note`: What was noted, which is `self.note` from now on.
        """
        state = self.state
        noted = {
            geometry: owned.store.note_sequences() if sequences else owned.store.note(statistics, packs, tail)
            for geometry, owned in state.owned.items()
        }
        note = Note(
            counters=state.counters.copy(),
            recording=self.note.recording if renewed and self.note is not None else state.recording,
            layers=[(layer.tail_used, layer.uneven, layer.tails, len(layer.held)) for layer in state.layers],
            stores=noted,
            held=[list(layer.held) for layer in state.layers] if held else None,
            packs=packs,
            statistics=statistics,
            renewed=renewed,
            overwriting="Committing recorded tokens" if renewed else None,
        )
        self.note = note
        return note

    def before_packing(self) -> None:
        """Makes sure that packing can be taken back."""
        note = self.note
        if note is not None and not note.packs:
            for geometry, noted in note.stores.items():
                self.state.owned[geometry].store.note_before_packing(noted)
            note.packs = True

    def overwrites(self, what: str) -> None:
        """Says that stored slots are going to be written over; from here on a change can only end or close the cache.

        Args:
            what (`str`): The change that writes over them, as the first words of a message.
        """
        if self.note is not None:
            self.note.overwriting = what

    def rebase(self) -> None:
        """Says that what wrote over stored slots is through, and nothing new has been packed yet.

        From now on undoing keeps what it did and takes back what came before and after; statistics stay as they are.
        """
        note = self.note
        if note is not None and note.piecewise:
            self.renew()
        elif note is not None:
            for geometry, noted in note.stores.items():
                store = self.state.owned[geometry].store
                store.note_before_packing(noted)
                noted.evicted, noted.fields = store.evicted, []
            note.packs, note.overwriting = True, None

    def renew(self) -> None:
        """Notes everything anew in the middle of a change: what it has done so far stays, whatever comes."""
        if self.note is not None:
            note = self.begin(statistics=self.note.statistics, held=True, tail=True, renewed=True)
            note.piecewise = True

    def commit(self) -> None:
        """Ends the change: what it did stays."""
        self.note = None

    @contextlib.contextmanager
    def whole(self, **what: bool) -> Iterator[None]:
        """Makes a block one change; inside of another one it is a part of that.

        Args:
            what (`bool`): As for [`Rollback.begin`].
        """
        if self.note is not None:
            yield
            return
        try:
            self.begin(**what)
            yield
            self.note = None  # here and not behind, so that whatever stops it before is undone
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Puts everything back, or closes the cache where that is not possible; may be repeated if it is stopped."""
        note = self.note
        if note is None:
            return
        note.undoing = True
        if note.overwriting is not None:
            self.closed = (
                f"{note.overwriting} was stopped in the middle, which cannot be taken back, so this cache has been "
                "closed and its pages given back. Call reset() and begin again with the first token."
            )
            self.state.clear()
        elif not note.counters.seen:
            self.state.clear()
        else:
            self.restore()
        self.state.recording = note.recording
        self.note = None

    def counts(self, layer: LayerState, new: AttentionCall) -> None:
        """Says that a decoded token is going to be counted in statistics of stored slots.

        Args:
            layer (`LayerState`): The layer.
            new (`AttentionCall`): The token.
        """
        if self.note is not None and not self.note.statistics:
            self.note.counted.append(Counted(layer, new))

    def _uncount(self, note: Note) -> None:
        observer = self.state.recipe.observer
        while observer is not None and note.counted:
            counted = note.counted[-1]
            layer, new, store = counted.layer, counted.new, counted.layer.store
            # The kernel that counts a token also appends it.
            if store is not None and self._appended(note, layer, store):
                plan = store.backend.plan_decode(
                    store.rows(layer.index),
                    replace(store.tail(layer.index), used=None),
                    logits=new.logits,
                    q_heads=new.query.shape[1],
                    sum_field=observer.sum_field,
                    square_field=observer.square_field,
                )
                valid = None if new.valid is None else new.valid[:, 0]
                again = partial(plan.run, new.query.detach(), None, None, new.position, valid, append=False)
                names = [name for name in (observer.sum_field, observer.square_field) if name]
                store.uncount(layer.index, names, counted.before, again)
            note.counted.pop()

    def _appended(self, note: Note, layer: LayerState, store: PagedStore) -> bool:
        """Whether the tail of a layer has grown since a note."""
        before = note.stores[store.geometry].tensors["tail_lengths"]
        return not torch.equal(store.tail_lengths[layer.index], before[layer.index])

    def restore(self) -> None:
        """Goes back to what was noted; the change goes on."""
        state, note = self.state, self.note
        if note is None:
            return
        self._uncount(note)
        # First, so that the next pass finds that this one is not through, wherever this stops.
        state.counters = note.counters.copy()
        for geometry, owned in list(state.owned.items()):
            noted = note.stores.get(geometry)
            if noted is None:  # made meanwhile
                owned.store.close()
                del state.owned[geometry]
            else:
                owned.store.restore(noted)
        seen = note.counters.seen
        for i, (layer, noted_layer) in enumerate(zip(state.layers, note.layers, strict=True)):
            layer.tail_used, layer.uneven, layer.tails, held = noted_layer
            layer.seen = min(layer.seen, seen) if note.held is None else seen
            if layer.store is not None and layer.store.geometry not in state.owned:
                layer.store = None
            if layer.store is None:
                layer.seen = 0
            if note.held is None:
                del layer.held[held:]
            else:
                layer.held = list(note.held[i])
        state.give_back()

    def check_open(self) -> None:
        """Refuses a cache that had to be closed.

        Raises:
            RuntimeError: If the cache had to be closed; the message says why.
        """
        if self.closed is not None:
            raise RuntimeError(self.closed)
