"""What a store holds, and its life: views for kernels, going back, beams, forks, files, bytes.

All of it but the views follows from the declarations of the tensors; see `sequence_tensors.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvcompress_hf.kernels import Backend, PageLayout, Rows, Tail
from kvcompress_hf.paging.arena import Arena, changes_pages
from kvcompress_hf.paging.evicted import EVICTED_MEANS, EvictedMeans
from kvcompress_hf.paging.geometry import Geometry
from kvcompress_hf.paging.key_centring import KEY_SHIFT, KeyCentring
from kvcompress_hf.paging.key_feedback import KEY_FEEDBACK, KeyFeedback
from kvcompress_hf.paging.means import MEANS, Means
from kvcompress_hf.paging.queries import QUERIES, QueryMemory
from kvcompress_hf.paging.sequence_tensors import Declared, SequenceTensors
from kvcompress_hf.paging.tables import Tables, declare_tables
from kvcompress_hf.paging.tail import TailSlots, declare_tail
from kvcompress_hf.paging.usage import Usage, measure_usage
from kvcompress_hf.paging.waiting import to_device


def declare(layout: PageLayout, device: torch.device) -> list[Declared]:
    """Declares every tensor of a store that sequences have a part of.

    Args:
        layout (`PageLayout`): Layout of the store's pages.
        device (`torch.device`): Where the store is.

    Returns:
        `list[Declared]`: Their declarations; a new tensor is one more.
    """
    return [
        *declare_tables(len(layout.tiers), device),
        *declare_tail(layout),
        *MEANS,
        KEY_SHIFT,
        KEY_FEEDBACK,
        *EVICTED_MEANS,
        *QUERIES,
    ]


@dataclass
class StoreNote:
    """What a store held at one moment; see [`StoredRows.note`].

    Args:
        tensors (`dict[str, torch.Tensor]`): The declared tensors by name, copied where they change in place.
        tail_shared (`bool`): Whether forks shared the tail.
        evicted (`bool`): Whether slots had been dropped or moved.
        fields (`list[tuple[int, str, torch.Tensor]]`): Statistics in slots: tier, field, and its values,
            `[rows, slots]`.
        batch (`int`, *optional*): Sequences, where `tensors` are all there is for as many.
    """

    tensors: dict[str, torch.Tensor]
    tail_shared: bool
    evicted: bool
    fields: list[tuple[int, str, torch.Tensor]]
    batch: int | None = None


class StoredRows:
    """Tables, tail, means and centring of `layers x batch x kv_heads` rows; [`PagedStore`] works on them.

    Row order is `[layers, batch, kv_heads]`, so one layer is a contiguous slice, and work over all rows (packing,
    planning, eviction) is one vectorised step over all layers.

    Args:
        geometry (`Geometry`): Shape, dtype and place of keys and values.
        layers (`int`): Number of layers that have rows here; a layer that never arrives costs only table entries.
        batch (`int`): Sequences.
        layout (`PageLayout`): What a page looks like.
        arena (`Arena`): Where pages come from; shared by forks of a cache.
        backend (`Backend`): The operations on pages for `geometry.device`.
        rotates_values (`bool`): Whether values are kept rotated, in pages and tail alike.
    """

    def __init__(
        self,
        geometry: Geometry,
        layers: int,
        batch: int,
        layout: PageLayout,
        arena: Arena,
        backend: Backend,
        rotates_values: bool = False,
    ) -> None:
        self.geometry, self.layers, self.rotates_values = geometry, layers, rotates_values
        self.layout, self.arena, self.backend = layout, arena, backend
        self.evicted = False  # once slots have been dropped or moved, their order no longer tells their age
        self._clamped: torch.Tensor | None = None  # int32 [] on a device: slots clamped that nobody has been told of
        sizes = dict(
            layers=layers,
            batch=batch,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            tiers=len(layout.tiers),
            fields=len(layout.fields),
        )
        self.tensors = SequenceTensors(declare(layout, geometry.device), sizes, geometry.dtype, geometry.device)
        self._tables = Tables(self.tensors, layout, arena)
        self._tail = TailSlots(self.tensors)
        self._means = Means(self.tensors)
        self._keys = KeyCentring(self.tensors)
        self._feedback = KeyFeedback(self.tensors)
        self.queries = QueryMemory(self.tensors)
        self.evicted_means = EvictedMeans(self.tensors)
        self.reading = arena.register(self)  # held while kernels read pages outside of a change

    # -- what it is made of ----------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """`int`: Sequences."""
        return self.tensors.sizes["batch"]

    @property
    def version(self) -> int:
        """`int`: Changes whenever tables, slabs or the tail move in memory."""
        return self.tensors.version

    @property
    def tables(self) -> list[torch.Tensor]:
        """`list[torch.Tensor]`: Page ids of each tier, `int32` `[rows, columns]`."""
        return self._tables.tables

    @property
    def lengths(self) -> torch.Tensor:
        """`torch.Tensor`: Packed slots of each row, `int32` `[tiers, rows]`."""
        return self.tensors.values["lengths"]

    @property
    def tail_lengths(self) -> torch.Tensor:
        """`torch.Tensor`: Slots in the tail of each sequence, `int32` `[layers, batch]`."""
        return self.tensors.values["tail_lengths"]

    @property
    def tail_keys(self) -> torch.Tensor | None:
        """`torch.Tensor` or `None`: `[layers, batch, kv_heads, capacity, head_dim]`."""
        return self.tensors.values.get("tail_keys")

    @property
    def tail_values(self) -> torch.Tensor | None:
        """`torch.Tensor` or `None`: `[layers, batch, kv_heads, capacity, head_dim]`."""
        return self.tensors.values.get("tail_values")

    @property
    def tail_positions(self) -> torch.Tensor | None:
        """`torch.Tensor` or `None`: Logical positions, `int32` `[layers, batch, capacity]`."""
        return self.tensors.values.get("tail_positions")

    @property
    def tail_fields(self) -> torch.Tensor | None:
        """`torch.Tensor` or `None`: Slot fields, `int32` `[layers, fields, batch, kv_heads, capacity]`."""
        return self.tensors.values.get("tail_fields")

    @property
    def tail_is_shared(self) -> bool:
        """`bool`: Whether a fork may still read the same tail."""
        return self._tail.shared

    @property
    def tail_capacity(self) -> int:
        """`int`: Tokens the tail has room for."""
        return self._tail.capacity

    @property
    def key_shift(self) -> torch.Tensor | None:
        """`torch.Tensor` or `None`: Taken off every key, native dtype `[layers, batch, kv_heads, 1, head_dim]`."""
        return self._keys.shift

    @property
    def key_feedback(self) -> torch.Tensor | None:
        """`torch.Tensor` or `None`: How rotated keys are rounded, `[layers, batch, kv_heads, 2, rank, head_dim]`."""
        return self._feedback.value

    @property
    def rows_per_layer(self) -> int:
        """`int`: Rows of one layer, `batch * kv_heads`."""
        return self.batch * self.geometry.kv_heads

    def _slice(self, layer: int | None) -> slice:
        rows = self.rows_per_layer
        return slice(0, self.layers * rows) if layer is None else slice(layer * rows, (layer + 1) * rows)

    def rows(self, layer: int | None = None) -> Rows:
        """Shows the packed slots of one layer, or of all layers in one, to the kernels.

        Args:
            layer (`int`, *optional*): Index of the layer; all layers when left out.

        Returns:
            `Rows`: Views of tables and lengths; valid until `version` changes, which other threads may cause unless
            `reading` is held.
        """
        part = self._slice(layer)
        rows = self._tables.rows(part)
        if self.key_feedback is not None:
            rows.key_feedback = self.key_feedback.flatten(0, 2)[part]
        rows.evicted_means, rows.evicted_counts = self.evicted_means.of(part)
        return rows

    def tail(self, layer: int) -> Tail:
        """Shows the tail of one layer to the kernels; it must have been reserved.

        Args:
            layer (`int`): Index of the layer.

        Returns:
            `Tail`: Views of the layer's tail; valid until `version` changes.
        """
        return self._tail.views(layer)

    def lengths_on_host(self) -> torch.Tensor:
        """Brings the lengths of rows to the host; see [`Tables.lengths_on_host`].

        Returns:
            `torch.Tensor`: `int32` `[tiers, rows]`, not to be changed.
        """
        return self._tables.lengths_on_host()

    def width(self, tier: int) -> int:
        """Slots of the longest row in a tier.

        Args:
            tier (`int`): Index of the tier.

        Returns:
            `int`: Number of slots, 0 without rows.
        """
        lengths = self.lengths_on_host()[tier]
        return int(lengths.max()) if lengths.numel() else 0

    def pages(self, tier: int, lengths: torch.Tensor) -> torch.Tensor:
        """How many pages so many slots of a tier take.

        Args:
            tier (`int`): Index of the tier.
            lengths (`torch.Tensor`): Numbers of slots.

        Returns:
            `torch.Tensor`: Numbers of pages, of the same shape and dtype.
        """
        return self._tables.pages(tier, lengths)

    def slots(self) -> torch.Tensor:
        """Slots kept, packed and in the tail.

        Returns:
            `torch.Tensor`: `int64` `[layers, batch, kv_heads]`.
        """
        packed = self.lengths.sum(0).view(self.layers, self.batch, self.geometry.kv_heads)
        return packed + self.tail_lengths[:, :, None]

    @changes_pages
    def live_ids(self) -> torch.Tensor:
        """Page ids in use, with repeats where rows share a page.

        Returns:
            `torch.Tensor`: Page ids, `int32` `[n]`.
        """
        return self._tables.live_ids()

    @changes_pages
    def read_field(self, tier: int, field: str, width: int | None = None) -> torch.Tensor:
        """Reads a field of every packed slot of all layers.

        Args:
            tier (`int`): Index of the tier.
            field (`str`): Name of the field.
            width (`int`, *optional*): Slots of the longest row, where that is known.

        Returns:
            `torch.Tensor`: `[rows, slots]`, zero beyond each row's length.
        """
        if width is None:
            width = self.width(tier)
        return self.backend.read_field(self.rows(), tier, field, width)

    @changes_pages
    def read_field_to(self, tier: int, field: str, out: torch.Tensor, sequences: torch.Tensor | None = None) -> None:
        """Reads a field of every packed slot to where it is wanted, by sequence.

        Args:
            tier (`int`): Index of the tier.
            field (`str`): Name of the field.
            out (`torch.Tensor`): `[batch, rows of a sequence, slots]`, zeros, on any device; as many slots as the
                longest row has.
            sequences (`torch.Tensor`, *optional*): `int64` `[n]` on the host, those of the batch that are read, in the
                order of `out`; all when left out.
        """
        by_layer = out.unflatten(1, (-1, self.geometry.kv_heads)).transpose(0, 1)
        if self.backend.plans is not None and out.device == self.geometry.device:
            place = None
            if sequences is not None:
                place = torch.full((self.batch,), -1, dtype=torch.int32)
                place[sequences] = torch.arange(sequences.numel(), dtype=torch.int32)
            self.backend.plans.gather(self.rows(), tier, field, by_layer, place)
            return
        values = self.backend.read_field(self.rows(), tier, field, out.shape[-1])
        values = values.view(self.layers, self.batch, self.geometry.kv_heads, -1)[: by_layer.shape[0]]
        if sequences is not None:
            values = values[:, to_device(sequences, values.device)]
        by_layer.copy_(values, non_blocking=True)

    @changes_pages
    def positions(self) -> list[torch.Tensor] | None:
        """Logical positions of what each row keeps, packed or in the tail.

        Returns:
            `list[torch.Tensor]` or `None`: Per row `int64` `[slots]`, ascending; `None` without the field `position`.
        """
        if "position" not in self.layout.fields:
            return None
        packed = [self.read_field(tier, "position").cpu() for tier in range(len(self.layout.tiers))]
        lengths, tails = self.lengths.cpu(), self.tail_lengths.cpu()
        newest = None if self.tail_positions is None else self.tail_positions.cpu()
        result = []
        for row in range(lengths.shape[1]):
            parts = [values[row, : int(lengths[tier, row])] for tier, values in enumerate(packed)]
            if newest is not None:
                layer, rest = divmod(row, self.rows_per_layer)
                sequence = rest // self.geometry.kv_heads
                parts.append(newest[layer, sequence, : int(tails[layer, sequence])])
            result.append(torch.cat(parts).long().sort().values)
        return result

    # -- going back ------------------------------------------------------------------------------------------------

    def note(self, statistics: bool = False, packing: bool = True, tail: bool = False) -> StoreNote:
        """Notes what the store holds, to go back to by [`StoredRows.restore`] if only additions follow.

        Args:
            statistics (`bool`): Whether statistics in slots will change.
            packing (`bool`): Whether slots may be packed; if not, [`StoredRows.note_before_packing`] must come first.
            tail (`bool`): Whether slots of the tail may be written over.

        Returns:
            `StoreNote`: What is needed to go back, with copies of what changes in place.
        """
        changing = ["step"] + ["packing"] * packing + ["statistics"] * statistics
        fields: list[tuple[int, str, torch.Tensor]] = []
        if statistics:
            for tier in range(len(self.layout.tiers)):
                width = self.width(tier)
                names = [name for name in self.layout.fields if name != "position"] if width else []
                fields += [(tier, name, self.read_field(tier, name, width)) for name in names]
        noted = self.tensors.note(*changing)
        if tail:
            with torch.inference_mode(False):
                slots = (name for name in self.tensors.values if "slots" in self.tensors.declared[name].dims)
                noted.update({name: self.tensors.values[name].clone() for name in slots})
        return StoreNote(noted, self._tail.shared, self.evicted, fields)

    def note_sequences(self) -> StoreNote:
        """Notes what the store holds, to go back to if other sequences take the places of these and nothing else comes.

        Returns:
            `StoreNote`: What is needed to go back, without copies: [`StoredRows.select`] changes nothing in place.
        """
        return StoreNote(dict(self.tensors.values), self._tail.shared, self.evicted, [], self.batch)

    def note_before_packing(self, note: StoreNote) -> None:
        """Adds copies of what packing changes to a note made without.

        Args:
            note (`StoreNote`): The note.
        """
        for name, value in self.tensors.note("packing").items():
            if self.tensors.declared[name].changed_by == "packing":
                note.tensors[name] = value

    @changes_pages
    def restore(self, note: StoreNote) -> None:
        """Takes back what was added since a note; pages that came since go back to the arena.

        Args:
            note (`StoreNote`): From [`StoredRows.note`]; may be used again if this breaks off.
        """
        if note.batch is None:
            self.tensors.restore(note.tensors)
        else:
            self.tensors.replace(note.tensors, note.batch)
        self._tail.shared, self.evicted = note.tail_shared, note.evicted
        self._clamped = None
        for tier, field, values in note.fields:
            self.backend.write_field(self.rows(), tier, field, values)
        for tier in range(len(self.layout.tiers)):
            self._tables.narrow(tier)
        self.arena.recount()

    # -- sequences -------------------------------------------------------------------------------------------------

    @changes_pages
    def select(self, index: torch.Tensor) -> None:
        """Makes sequence `i` what sequence `index[i]` was; shared pages are counted, not copied.

        Args:
            index (`torch.Tensor`): `int64` `[new batch]`.
        """
        old = self.live_ids()
        self.tensors.replace(self.tensors.select(index), batch=index.numel())
        self._tail.shared = False
        self.arena.retain(self.live_ids())
        self.arena.release(old)

    @changes_pages
    def fork(self) -> Any:
        """A second owner of the same pages and tail; whoever writes first copies what it writes to.

        Returns:
            `PagedStore`: The other owner, a store of the same class.
        """
        made_of = (self.layout, self.arena, self.backend, self.rotates_values)
        other = type(self)(self.geometry, self.layers, self.batch, *made_of)
        try:
            copies = self.tensors.copies_for_fork()
            self._tail.shared = other._tail.shared = self.tail_keys is not None
            self.tensors.moved()  # who writes to the tail from now on has to look whether it is shared
            other.evicted = self.evicted
            other.tensors.replace(copies)
            self.arena.retain(other.live_ids())
        except BaseException:
            self.arena.unregister(other)
            raise
        return other

    @changes_pages
    def close(self) -> None:
        """Gives every page back and empties the rows."""
        self.tensors.clear()
        self._tail.shared = self.evicted = False
        self._clamped = None
        self.arena.recount()

    def abandon(self) -> None:
        """Gives every page back soon, without waiting for anybody; for finalizers."""
        self._tail.drop()
        self.arena.abandon(self)

    # -- to a file and back ----------------------------------------------------------------------------------------

    @changes_pages
    def state(self, layers: int) -> dict[str, torch.Tensor]:
        """Everything the store holds but its pages; the inverse of [`StoredRows.load_state`].

        Args:
            layers (`int`): How many layers have rows; those that never arrived are left out.

        Returns:
            `dict[str, torch.Tensor]`: The declared tensors that are saved, by name: a `table.{tier}` per tier, `int32`
            `[rows, columns]`, zero where no page is live; `lengths` `int32` `[tiers, rows]`; `tail_lengths` `int32`
            `[layers, batch]`; where the tail is not empty `tail_keys`, `tail_values`, `tail_positions` and
            `tail_fields`, cut to what is used; where means are kept `sums` and `summed`; where keys are centred
            `key_shift`; where they are rounded with feedback `key_feedback`; where evicted slots
            are remembered `evicted_means` and `evicted_counts`; where queries are remembered those of
            `QUERIES`. Copies, save for the means and the tail.
        """
        used = int(self.tail_lengths[:layers].max()) if self.tail_lengths[:layers].numel() else 0
        state = self.tensors.state(layers, used)
        for tier in range(len(self.layout.tiers)):
            name = f"table.{tier}"
            live = self._tables.live(tier)[: state[name].shape[0]]
            columns = int(live.sum(1).max()) if live.numel() else 0
            state[name] = torch.where(live, state[name], 0)[:, :columns]
        return state

    @changes_pages
    def load_state(self, state: Mapping[str, torch.Tensor], evicted: bool) -> None:
        """Fills an empty store of as many layers as the state has; nothing is checked here.

        Args:
            state (`Mapping[str, torch.Tensor]`): As from [`StoredRows.state`], the tables with page ids of this
                store's arena, which must already count them as referenced. Taken over, not copied.
            evicted (`bool`): Whether slots have ever been dropped or moved.
        """
        self.tensors.replace({name: state[name] for name in self.tensors.declared if name in state})
        self.evicted = evicted

    # -- called by the arena ---------------------------------------------------------------------------------------

    def relocate(self, new_id: torch.Tensor) -> None:
        """Follows pages that the arena has moved.

        Args:
            new_id (`torch.Tensor`): `int32` `[page ids]`, where each page lives now.
        """
        self._tables.relocate(new_id)

    def slabs_changed(self) -> None:
        """Notes that slab addresses are no longer what they were."""
        self.tensors.moved()

    # -- bytes -----------------------------------------------------------------------------------------------------

    @property
    def own_bytes(self) -> int:
        """`int`: Bytes of tables, means and tail."""
        return sum(self.tensors.bytes_by_kind.values())

    @property
    def plan_bytes(self) -> int:
        """`int`: Bytes that decode plans hold besides what they were made for."""
        return sum(plan.nbytes for plan in list(self.tensors.plans.values()))

    @property
    def step_bytes(self) -> int:
        """`int`: Most bytes that a layer's decode step takes while it runs."""
        return max((plan.step_nbytes for plan in list(self.tensors.plans.values())), default=0)

    @changes_pages
    def usage(self) -> Usage:
        """Where the bytes of this store go; pages that forks share are counted in each.

        Returns:
            `Usage`: Bytes by kind, without the arena's free pages and reference counts.
        """
        return measure_usage(self._tables, self.tensors)
