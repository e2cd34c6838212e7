"""The rows of all layers of one shape: page tables, lengths, and the tail that is not packed yet."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kvcompress_hf.kernels import Backend, PageLayout, Rows, Tail, page_section
from kvcompress_hf.paging.arena import Arena, changes_pages
from kvcompress_hf.paging.key_shift import steady_mean
from kvcompress_hf.paging.key_turn import turn_keys
from kvcompress_hf.paging.waiting import known_as, moves_into_holes, on_host, pick, places, to_device

_AHEAD = 32  # a growing table is allocated 1/32 wider than it must be
_TURNED_BYTES = 1 << 23  # of pages whose keys are turned at once
Describe = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Geometry:
    """What layers must have in common to share a store.

    Args:
        device (`torch.device`): Where keys and values arrive.
        dtype (`torch.dtype`): Their dtype.
        kv_heads (`int`): KV heads in the tensors (the local ones under tensor parallelism).
        head_dim (`int`): Size of a head.
        windowed (`bool`): Whether the layers attend through a sliding window.
    """

    device: torch.device
    dtype: torch.dtype
    kv_heads: int
    head_dim: int
    windowed: bool


@dataclass
class Usage:
    """Bytes of a store by kind, and the number of pages it holds."""

    payload: int = 0
    metadata: int = 0
    fields: int = 0
    slack: int = 0
    tables: int = 0
    tail: int = 0
    pages: int = 0


@dataclass(frozen=True)
class Snapshot:
    """How much a store holds at one moment; see [`PagedStore.snapshot`]."""

    lengths: torch.Tensor
    tail_lengths: torch.Tensor
    sums: tuple[torch.Tensor, torch.Tensor] | None


class PagedStore:
    """Packed slots and tails of `layers x batch x kv_heads` rows.

    Row order is `[layers, batch, kv_heads]`, so one layer is a contiguous slice, and work over all rows (packing,
    planning, eviction) is one vectorised step over all layers.

    Args:
        geometry (`Geometry`): Shape, dtype and place of keys and values.
        layers (`int`): Number of layers that have rows here; a layer that never arrives costs only table entries.
        batch (`int`): Sequences.
        layout (`PageLayout`): What a page looks like.
        arena (`Arena`): Where pages come from; shared by forks of a cache.
        backend (`Backend`): The operations on pages for `geometry.device`.
    """

    def __init__(
        self, geometry: Geometry, layers: int, batch: int, layout: PageLayout, arena: Arena, backend: Backend
    ) -> None:
        self.geometry = geometry
        self.layers = layers
        self.batch = batch
        self.layout = layout
        self.arena = arena
        self.backend = backend
        self.version = 0  # changes whenever tables, slabs or the tail move in memory
        self.evicted = False  # once slots have been dropped or moved, their order no longer tells their age
        rows = layers * batch * geometry.kv_heads
        with torch.inference_mode(False):
            self.tables = [self._int32(rows, 0) for _ in layout.tiers]
            self.lengths = self._int32(len(layout.tiers), rows)
            self.tail_lengths = self._int32(layers, batch)
        self.tail_keys: torch.Tensor | None = None  # [layers, batch, kv_heads, capacity, head_dim]
        self.tail_values: torch.Tensor | None = None
        self.tail_positions: torch.Tensor | None = None  # int32 [layers, batch, capacity]
        self.tail_fields: torch.Tensor | None = None  # int32 [layers, fields, batch, kv_heads, capacity]
        self._tail_shared = False
        self._clamped: torch.Tensor | None = None  # int32 [] on a device: slots clamped that nobody has been told of
        # Native dtype [layers, batch, kv_heads, 1, head_dim]: taken off every key before it is stored, in pages and
        # tail alike; None while nothing is.
        self.key_shift: torch.Tensor | None = None
        self._sums: torch.Tensor | None = None  # float32 [2, layers, batch, kv_heads, head_dim]: of keys and of values
        self._summed: torch.Tensor | None = None  # float32 [layers, batch]: tokens in the sums
        # What `lengths` holds, on the host; None on the CPU, where they are at hand, and where only the device knows.
        self._known: torch.Tensor | None = None
        if geometry.device.type != "cpu":
            self._known = torch.zeros((len(layout.tiers), rows), dtype=torch.int32)
        self.reading = arena.register(self)  # held while kernels read pages outside of a change

    def _int32(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.geometry.device)

    # -- views for the kernels -------------------------------------------------------------------------------------

    @property
    def rows_per_layer(self) -> int:
        """`int`: Rows of one layer, `batch * kv_heads`."""
        return self.batch * self.geometry.kv_heads

    def _slice(self, layer: int | None) -> slice:
        if layer is None:
            return slice(0, self.layers * self.rows_per_layer)
        return slice(layer * self.rows_per_layer, (layer + 1) * self.rows_per_layer)

    def rows(self, layer: int | None = None) -> Rows:
        """The packed slots of one layer, or of all layers in one.

        Args:
            layer (`int`, *optional*): Index of the layer; all layers when left out.

        Returns:
            `Rows`: Views of tables and lengths; valid until `version` changes, which other threads may cause unless
            `reading` is held.
        """
        part, pool = self._slice(layer), self.arena.pool
        return Rows(
            layout=self.layout,
            slabs=pool.slabs,
            slab_addresses=pool.addresses,
            slab_pages=pool.sizes,
            slab_shift=self.arena.slab_shift,
            tables=[table[part] for table in self.tables],
            lengths=[length[part] for length in self.lengths],
            widths=self._widths(part),
        )

    def tail(self, layer: int) -> Tail:
        """The tail of one layer; it must have been reserved.

        Args:
            layer (`int`): Index of the layer.

        Returns:
            `Tail`: Views; valid until `version` changes.
        """
        if self.tail_keys is None or self.tail_values is None or self.tail_positions is None:
            raise RuntimeError("The tail was used before reserve_tail().")
        return Tail(
            k=self.tail_keys[layer],
            v=self.tail_values[layer],
            lengths=self.tail_lengths[layer],
            positions=self.tail_positions[layer],
            fields=None if self.tail_fields is None else self.tail_fields[layer],
        )

    @property
    def tail_is_shared(self) -> bool:
        """`bool`: Whether a fork may still read the same tail."""
        return self._tail_shared

    @property
    def tail_capacity(self) -> int:
        """`int`: Tokens the tail has room for."""
        return 0 if self.tail_keys is None else self.tail_keys.shape[3]

    def lengths_on_host(self) -> torch.Tensor:
        """The lengths on the host; waits for the device after they changed in a way that only the device knows.

        Returns:
            `torch.Tensor`: `int32` `[tiers, rows]`, not to be changed.
        """
        if self.lengths.device.type == "cpu":
            return self.lengths
        if self._known is None:
            self._known = self.lengths.cpu()
        return self._known

    def _widths(self, part: slice) -> list[int] | None:
        """Slots of the longest row per tier, where the host knows it of a device."""
        if self._known is None or part.start == part.stop:
            return None
        widths: list[int] = self._known[:, part].amax(1).tolist()
        return widths

    def width(self, tier: int) -> int:
        """Slots of the longest row in a tier.

        Args:
            tier (`int`): Index of the tier.

        Returns:
            `int`: Slots.
        """
        lengths = self.lengths_on_host()[tier]
        return int(lengths.max()) if lengths.numel() else 0

    def slots(self) -> torch.Tensor:
        """Slots kept, packed and in the tail.

        Returns:
            `torch.Tensor`: `int64` `[layers, batch, kv_heads]`.
        """
        packed = self.lengths.sum(0).view(self.layers, self.batch, self.geometry.kv_heads)
        return packed + self.tail_lengths[:, :, None]

    def snapshot(self) -> "Snapshot":
        """How much is stored now, to go back to by [`PagedStore.restore`] if only additions follow.

        Returns:
            `Snapshot`: Copies of the lengths.
        """
        with torch.inference_mode(False):
            sums = None if self._sums is None or self._summed is None else (self._sums.clone(), self._summed.clone())
            lengths, tail_lengths = self.lengths.clone(), self.tail_lengths.clone()
        if self._known is not None:
            known_as(lengths, self._known.clone())
        return Snapshot(lengths, tail_lengths, sums)

    @changes_pages
    def restore(self, snapshot: "Snapshot | None") -> None:
        """Takes back what was added since; what was packed from the tail is still in the tail's memory.

        Args:
            snapshot (`Snapshot` or `None`): From [`PagedStore.snapshot`]; `None` takes back everything.
        """
        if snapshot is None:
            snapshot = Snapshot(torch.zeros_like(self.lengths), torch.zeros_like(self.tail_lengths), None)
        for tier in range(len(self.tables)):
            self.truncate(tier, pick(snapshot.lengths, tier))
        self.tail_lengths.copy_(snapshot.tail_lengths)
        self._sums, self._summed = snapshot.sums or (None, None)

    # -- centred keys ----------------------------------------------------------------------------------------------

    def settle_key_shift(self, layer: int, keys: torch.Tensor, real: torch.Tensor | None) -> None:
        """Decides what is taken off every key of a layer from now on; nothing of the layer may be stored yet.

        Args:
            layer (`int`): Index of the layer.
            keys (`torch.Tensor`): The first keys, `[batch, kv_heads, tokens, head_dim]`.
            real (`torch.Tensor`, *optional*): `bool` `[batch, tokens]`, false for padding.
        """
        geometry = self.geometry
        shape = (self.layers, self.batch, geometry.kv_heads, 1, geometry.head_dim)
        with torch.inference_mode(False):
            if self.key_shift is None:
                shift = torch.zeros(shape, dtype=geometry.dtype, device=geometry.device)
            else:
                shift = self.key_shift.clone()  # forks may share it
        shift[layer] = steady_mean(keys, real)
        self.key_shift = shift

    def centre(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """New keys as they are stored and attended to.

        Args:
            layer (`int`): Index of the layer.
            keys (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`.

        Returns:
            `torch.Tensor`: The keys less the layer's `key_shift`; the keys themselves while there is none.
        """
        return keys if self.key_shift is None else keys - self.key_shift[layer]

    def whole(self, layer: int | None, keys: torch.Tensor) -> torch.Tensor:
        """The inverse of [`PagedStore.centre`], for those who look at more of keys than what softmax sees.

        Args:
            layer (`int`, *optional*): Index of the layer; all layers when left out.
            keys (`torch.Tensor`): Centred, `[batch, kv_heads, tokens, head_dim]`; with all layers, `batch` is
                `layers * batch`.

        Returns:
            `torch.Tensor`: The keys with the layer's `key_shift`, float32; the keys themselves while there is none.
        """
        if self.key_shift is None:
            return keys
        part = slice(None) if layer is None else slice(layer, layer + 1)
        return keys.float() + self.key_shift[part].flatten(0, 1)

    # -- the tail --------------------------------------------------------------------------------------------------

    def reserve_tail(self, capacity: int) -> None:
        """Makes the tail private to this store and large enough.

        Args:
            capacity (`int`): Tokens per row there must be room for, those already there included.
        """
        if self.tail_keys is not None and not self._tail_shared and capacity <= self.tail_capacity:
            return
        capacity = max(capacity, self.tail_capacity)
        geometry = self.geometry
        shape = (self.layers, self.batch, geometry.kv_heads, capacity, geometry.head_dim)
        with torch.inference_mode(False):
            keys = torch.empty(shape, dtype=geometry.dtype, device=geometry.device)
            values = torch.empty_like(keys)
            positions = self._int32(self.layers, self.batch, capacity)
            fields = None
            if self.layout.fields:
                fields = self._int32(self.layers, len(self.layout.fields), *shape[1:4])
            if self.tail_keys is not None and self.tail_values is not None and self.tail_positions is not None:
                old = self.tail_capacity
                keys[:, :, :, :old] = self.tail_keys
                values[:, :, :, :old] = self.tail_values
                positions[:, :, :old] = self.tail_positions
                if fields is not None and self.tail_fields is not None:
                    fields[..., :old] = self.tail_fields
            self.tail_lengths = self.tail_lengths.clone()
        self.tail_keys, self.tail_values, self.tail_positions, self.tail_fields = keys, values, positions, fields
        self._tail_shared = False
        self.version += 1

    def drop_tail(self) -> None:
        """Gives the tail's memory back; it must be empty."""
        if self.tail_keys is not None:
            self.tail_keys = self.tail_values = self.tail_positions = self.tail_fields = None
            self._tail_shared = False
            self.version += 1

    @changes_pages
    def pack_tail(
        self,
        tier: int,
        layer: int | None = None,
        describe: Describe | None = None,
        tails: torch.Tensor | None = None,
    ) -> None:
        """Moves the whole tail of one layer, or of all, into pages.

        Args:
            tier (`int`): Index of the tier that receives the slots.
            layer (`int`, *optional*): Index of the layer; all layers when left out.
            describe (`Callable`, *optional*): Makes slot fields from keys, values and the means of both, see
                [`PagedStore.describe`].
            tails (`torch.Tensor`, *optional*): `tail_lengths` on the host, where the caller knows them.

        Raises:
            CacheMemoryError: If the arena is full; nothing has changed then.
        """
        if self.tail_keys is None or self.tail_values is None or self.tail_positions is None:
            return
        part = slice(None) if layer is None else slice(layer, layer + 1)
        here = (on_host(self.tail_lengths) if tails is None else tails)[part].flatten()
        if not bool(here.any()):
            return
        # Not more than is used: sums over tokens must not round by the room there happens to be (a file keeps none).
        used = int(here.max())
        keys, values = (x[part, :, :, :used].flatten(0, 1) for x in (self.tail_keys, self.tail_values))
        lengths = self.tail_lengths[part].flatten()
        counts = lengths[:, None].expand(-1, self.geometry.kv_heads)
        known_as(counts, here[:, None].expand(-1, self.geometry.kv_heads))
        fields: dict[str, torch.Tensor] = {}
        for i, name in enumerate(self.layout.fields):
            if name == "position":
                positions = self.tail_positions[part, :, :used].flatten(0, 1)
                fields[name] = positions[:, None].expand(-1, self.geometry.kv_heads, -1)
            elif self.tail_fields is not None:
                fields[name] = self.tail_fields[part, i, ..., :used].flatten(0, 1).view(torch.float32)
        if describe is not None:
            real = torch.arange(used, device=keys.device) < lengths[:, None]
            fields.update(self.describe(describe, keys, values, real, layer))
        self.pack(tier, keys, values, counts, None, fields, layer)
        if self._tail_shared:
            with torch.inference_mode(False):
                self.tail_lengths = self.tail_lengths.clone()
        self.tail_lengths[part] = 0

    def crop_tail(self, position: int) -> None:
        """Forgets tail slots at or behind a position.

        Args:
            position (`int`): First logical position to forget.
        """
        if self.tail_positions is None:
            return
        used = torch.arange(self.tail_capacity, device=self.geometry.device) < self.tail_lengths[..., None]
        self.tail_lengths.copy_((used & (self.tail_positions < position)).sum(-1))

    def describe(
        self,
        describe: Describe,
        keys: torch.Tensor,
        values: torch.Tensor,
        real: torch.Tensor,
        layer: int | None,
    ) -> dict[str, torch.Tensor]:
        """Makes slot fields of new tokens from their keys and values and the means over all tokens so far.

        Args:
            describe (`Callable`): From keys, values `[batch, kv_heads, tokens, head_dim]` and the means of both
                `[batch, kv_heads, 1, head_dim]` to fields by name, `[batch, kv_heads, tokens]`. It sees whole keys.
            keys (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`, centred; with all layers, `batch` is
                `layers * batch`.
            values (`torch.Tensor`): Likewise.
            real (`torch.Tensor`): `bool` `[batch, tokens]`, which tokens count.
            layer (`int`, *optional*): Index of the layer; all layers when left out.

        Returns:
            `dict[str, torch.Tensor]`: Fields by name.
        """
        geometry = self.geometry
        if self._sums is None or self._summed is None:
            shape = (2, self.layers, self.batch, geometry.kv_heads, geometry.head_dim)
            with torch.inference_mode(False):
                self._sums = torch.zeros(shape, device=geometry.device)
                self._summed = torch.zeros((self.layers, self.batch), device=geometry.device)
        part = slice(None) if layer is None else slice(layer, layer + 1)
        keys = self.whole(layer, keys)
        weight = real.float()
        for sums, states in zip(self._sums, (keys, values), strict=True):
            clean = torch.where(real[:, None, :, None], states.float(), 0.0)
            sums[part] += clean.sum(2).view_as(sums[part])
        self._summed[part] += weight.sum(1).view_as(self._summed[part])
        count = self._summed[part].flatten().clamp(min=1)[:, None, None, None]
        means = [sums[part].flatten(0, 1)[:, :, None] / count for sums in self._sums]
        # What is not a token may hold anything.
        clean_keys, clean_values = (torch.where(real[:, None, :, None], x, 0) for x in (keys, values))
        return describe(clean_keys, clean_values, means[0], means[1])

    # -- packed slots ----------------------------------------------------------------------------------------------

    @changes_pages
    def pack(
        self,
        tier: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        counts: torch.Tensor,
        index: torch.Tensor | None,
        fields: Mapping[str, torch.Tensor],
        layer: int | None,
    ) -> None:
        """Adds slots to rows, taking pages as needed.

        Args:
            tier (`int`): Index of the tier.
            keys (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`; with all layers, `batch` is
                `layers * batch`.
            values (`torch.Tensor`): Likewise.
            counts (`torch.Tensor`): `int32` `[batch, kv_heads]`, slots to add to each row.
            index (`torch.Tensor`, *optional*): `int32` `[batch, kv_heads, tokens]`, which tokens; the first ones
                when left out.
            fields (`Mapping[str, torch.Tensor]`): Slot fields by name, `[batch, kv_heads, tokens]`.
            layer (`int`, *optional*): Index of the layer; all layers when left out.

        Raises:
            CacheMemoryError: If the arena is full; no slot has been added then.
        """
        part = self._slice(layer)
        added = on_host(counts).reshape(-1)
        self._reserve(tier, part, added)
        clamped = self.backend.pack(self.rows(layer), tier, keys, values, counts, index, fields)
        self.lengths[tier, part] += counts.reshape(-1)
        if self._known is not None:
            self._known[tier, part] += added
        if isinstance(clamped, int):
            self.tell_clamped(clamped)
        else:
            self._clamped = clamped if self._clamped is None else self._clamped + clamped

    @property
    def clamped(self) -> list[torch.Tensor]:
        """`list[torch.Tensor]`: On a device, how many slots were clamped that nobody was told of; or nothing."""
        return [] if self._clamped is None else [self._clamped]

    def tell_clamped(self, count: int) -> None:
        """Warns if slots had to be clamped.

        Args:
            count (`int`): How many.
        """
        self._clamped = None
        if count:
            warnings.warn(
                f"{count} slots have keys or values beyond fp16's range (65504) and were clamped in a quantised "
                "tier; use the 'lossless' recipe for this model if the output suffers.",
                stacklevel=3,
            )

    def _pages(self, tier: int, lengths: torch.Tensor) -> torch.Tensor:
        slots = self.layout.tiers[tier].slots
        return (lengths + (slots - 1)) // slots

    def pages_of_rows(self) -> torch.Tensor:
        """Pages of each row.

        Returns:
            `torch.Tensor`: `int64` `[tiers, batch, rows of a sequence]`, on the host.
        """
        pages = torch.stack([self._pages(tier, lengths) for tier, lengths in enumerate(self.lengths_on_host())])
        by_sequence = pages.view(-1, self.layers, self.batch, self.geometry.kv_heads).transpose(1, 2)
        return by_sequence.flatten(2).long()

    def _reserve(self, tier: int, part: slice, counts: torch.Tensor) -> None:
        """Takes the pages that rows need for `counts` more slots, which are on the host."""
        lengths = self.lengths_on_host()[tier, part]
        if not lengths.numel():
            return
        held = self._pages(tier, lengths)
        needed = self._pages(tier, lengths + counts)
        extra = needed - held
        total, columns = torch.stack((extra.sum(), needed.max().long())).tolist()
        if self.arena.shared:
            partial = (lengths % self.layout.tiers[tier].slots != 0) & (counts > 0)
            row = torch.nonzero(partial).flatten()
            self._own_pages(tier, row + part.start, held[row].long() - 1)
        if not total:
            return
        ids = self.arena.allocate(total)
        self._widen(tier, columns)
        extra, held = extra.long(), held.long()
        row = torch.repeat_interleave(extra, output_size=total)
        first = extra.cumsum(0) - extra - held  # column = running number - first page's running number + pages held
        column = torch.arange(total) - first[row]
        self.tables[tier][to_device(row + part.start, ids.device), to_device(column, ids.device)] = ids

    def pages_to_pack(self, tier: int, tokens: int, layers: int, tails: torch.Tensor | None = None) -> int:
        """Pages that packing the tail and some more tokens takes.

        Args:
            tier (`int`): Index of the tier that receives them.
            tokens (`int`): New tokens per row besides those of the tail.
            layers (`int`): Layers that have rows here so far.
            tails (`torch.Tensor`, *optional*): `tail_lengths` on the host, where the caller knows them.

        Returns:
            `int`: Pages over all rows.
        """
        lengths = self.lengths_on_host()[tier].view(self.layers, self.batch, -1)[:layers]
        after = lengths + on_host(self.tail_lengths if tails is None else tails)[:layers, :, None] + tokens
        return int((self._pages(tier, after) - self._pages(tier, lengths)).sum())

    def _widen(self, tier: int, columns: int) -> None:
        table = self.tables[tier]
        if columns > table.shape[1]:
            with torch.inference_mode(False):
                wider = self._int32(table.shape[0], columns + columns // _AHEAD)
            wider[:, : table.shape[1]] = table
            self.tables[tier] = wider
            self.version += 1

    def _own_pages(self, tier: int, row: torch.Tensor, column: torch.Tensor) -> None:
        """Copies those of the named pages that others share, before they are written to; waits for the device."""
        row, column = to_device(row, self.geometry.device), to_device(column, self.geometry.device)
        ids = self.tables[tier][row, column]
        foreign = self.arena.references[ids.long()] > 1
        if bool(foreign.any()):
            ids = ids[foreign]
            self.tables[tier][row[foreign], column[foreign]] = self.arena.copy_pages(ids)
            self.arena.release(ids)

    @changes_pages
    def own_all(self) -> None:
        """Makes every page private, for recipes that write statistics into slots at each decode step."""
        if not self.arena.shared:
            return
        for tier in range(len(self.tables)):
            row, column = torch.nonzero(self._live(tier), as_tuple=True)
            self._own_pages(tier, row, column)
        self.arena.shared = bool((self.arena.references > 1).any())

    def _live(self, tier: int) -> torch.Tensor:
        columns = torch.arange(self.tables[tier].shape[1], device=self.geometry.device)
        return columns < self._pages(tier, self.lengths[tier])[:, None]

    @changes_pages
    def live_ids(self) -> torch.Tensor:
        """Page ids in use, with repeats where rows share a page.

        Returns:
            `torch.Tensor`: `int32` `[n]`.
        """
        ids = []
        for tier, (table, lengths) in enumerate(zip(self.tables, self.lengths_on_host(), strict=True)):
            ids.append(table[places(self._live(tier), int(self._pages(tier, lengths).sum()))])
        return torch.cat(ids)

    @changes_pages
    def read_field(self, tier: int, field: str, width: int | None = None) -> torch.Tensor:
        """A field of every packed slot of all layers.

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

    @changes_pages
    def clear_field(self, field: str, layer: int) -> None:
        """Sets a float field of every slot of a layer to zero, in pages and tail.

        Args:
            field (`str`): Name of the field.
            layer (`int`): Index of the layer.
        """
        rows = self.rows(layer)
        for tier, lengths in enumerate(rows.lengths):
            width = rows.width(tier)
            if width:
                zeros = torch.zeros((lengths.numel(), width), device=lengths.device)
                self.backend.write_field(rows, tier, field, zeros)
        if self.tail_fields is not None:
            self.tail_fields[layer, self.layout.fields.index(field)] = 0

    @changes_pages
    def scale_field(self, field: str, factor: float) -> None:
        """Multiplies a float field of every packed slot of all layers.

        Args:
            field (`str`): Name of the field.
            factor (`float`): The factor.
        """
        self.own_all()
        for tier in range(len(self.tables)):
            if self.width(tier):
                self.backend.write_field(self.rows(), tier, field, self.read_field(tier, field) * factor)

    @changes_pages
    def evict(
        self, tier: int, keep: torch.Tensor, kept: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Drops slots: the last survivors fill the holes, and pages that come free go back to the arena.

        Holes are filled in ascending order from the end (KV-Compress, section 3.2 of the reference), so sources and
        destinations never overlap.

        Args:
            tier (`int`): Index of the tier.
            keep (`torch.Tensor`): `bool` `[rows, slots]` over all layers; what lies beyond a row's length is ignored.
            kept (`torch.Tensor`, *optional*): `int32` `[rows]`, how many that are; best if known on the host.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]` or `None`: The rows, old slots and new slots of what has
            moved, `int64` `[n]` each; a move may be named twice. `None` if nothing has.
        """
        column = torch.arange(keep.shape[1], device=keep.device)
        keep = keep & (column < self.lengths[tier][:, None])
        if kept is None:
            kept = keep.sum(1, dtype=torch.int32)
        here, before = on_host(kept), self.lengths_on_host()[tier]
        moves = torch.minimum(here, before - here)  # of each row at most
        moved = None
        if bool(moves.any()):
            holes, movers = ~keep & (column < kept[:, None]), keep & (column >= kept[:, None])
            row, target, source = moves_into_holes(holes, movers, int(moves.sum()), int(moves.argmax()))
            if row.numel():
                if self.arena.shared:
                    pages = torch.unique(torch.stack([row, target // self.layout.tiers[tier].slots]), dim=1)
                    self._own_pages(tier, pages[0], pages[1])
                as_int = (x.to(torch.int32) for x in (row, target, source))
                self.backend.move(self.rows(), tier, *as_int)
                moved = row, source, target
        if not torch.equal(here, before):
            self.evicted = True
            self.truncate(tier, kept)
        return moved

    @changes_pages
    def own(self, tier: int, chosen: torch.Tensor) -> None:
        """Makes the pages of some slots private, so that they can be written to.

        Args:
            tier (`int`): Index of the tier.
            chosen (`torch.Tensor`): `bool` `[rows, slots]` over all layers, within each row's length.

        Raises:
            CacheMemoryError: If the arena is full; nothing has changed then.
        """
        if self.arena.shared:
            row, column = torch.nonzero(self._by_page(tier, chosen).any(-1), as_tuple=True)
            self._own_pages(tier, row, column)

    @changes_pages
    def turn_keys(self, tier: int, by: torch.Tensor, seed: torch.Tensor, inv_freq: torch.Tensor) -> None:
        """Rotates stored keys on, so that they look newer; see [`paging.key_turn.turn_keys`].

        Args:
            tier (`int`): Index of a native tier; the pages of slots that are turned must be private.
            by (`torch.Tensor`): Positions to go forward, `int32` `[rows, slots]` over all layers; 0 leaves a slot as it
                is. What lies beyond a row's length is ignored.
            seed (`torch.Tensor`): For rounding, likewise; another one each time a slot is turned.
            inv_freq (`torch.Tensor`): Radians per position of each pair of channels, float32 `[pairs]`.
        """
        filled = torch.arange(by.shape[1], device=by.device) < self.lengths[tier][:, None]
        by, seed = self._by_page(tier, torch.where(filled, by, 0)), self._by_page(tier, seed)
        row, column = torch.nonzero(by.any(-1), as_tuple=True)
        step = max(1, _TURNED_BYTES // self.layout.page_bytes)
        inv_freq = to_device(inv_freq, by.device)
        if not row.numel():
            return
        here = on_host(self.tables[tier][row, column])
        for some_rows, some_columns, ids in zip(row.split(step), column.split(step), here.split(step), strict=True):
            pages = self.backend.to_canonical(self.layout, tier, self.arena.read(ids))
            keys = page_section(pages, self.layout, tier, "keys")
            amounts, seeds = by[some_rows, some_columns], seed[some_rows, some_columns]
            turned = turn_keys(keys.flatten(0, 1), amounts.flatten(), inv_freq, seeds.flatten()).view_as(keys)
            keys.copy_(torch.where((amounts > 0)[..., None], turned, keys))
            self.arena.write(ids, self.backend.from_canonical(self.layout, tier, pages))

    def _by_page(self, tier: int, values: torch.Tensor) -> torch.Tensor:
        """`[rows, slots]` to `[rows, pages, slots of a page]`."""
        slots = self.layout.tiers[tier].slots
        pages = -(-values.shape[1] // slots)
        padded = torch.nn.functional.pad(values, (0, pages * slots - values.shape[1]))
        return padded.view(-1, pages, slots)

    @changes_pages
    def demote(self, tier: int, lower: int, chosen: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Copies slots into a lower tier, re-quantised from what is stored; [`PagedStore.evict`] then drops them here.

        Args:
            tier (`int`): Index of the tier they are in.
            lower (`int`): Index of the tier that receives them.
            chosen (`torch.Tensor`): `bool` `[rows, slots]` over all layers, within each row's length.
            counts (`torch.Tensor`, *optional*): `int32` `[rows]`, how many of each; best if known on the host.

        Raises:
            CacheMemoryError: If the arena is full; nothing has changed then.
        """
        if counts is None:
            counts = chosen.sum(1, dtype=torch.int32)
        here = on_host(counts)
        total = int(here.sum())
        if not total:
            return
        self._reserve(lower, slice(0, chosen.shape[0]), here)
        row, source = places(chosen, total)
        rank = chosen.cumsum(1, dtype=torch.int32)[row, source] - 1
        target = self.lengths[lower][row] + rank
        self.backend.retier(self.rows(), row.to(torch.int32), tier, source.to(torch.int32), lower, target)
        self.lengths[lower] += counts
        if self._known is not None:
            self._known[lower] += here
        self.evicted = True

    @changes_pages
    def truncate(self, tier: int, lengths: torch.Tensor) -> None:
        """Shortens rows and frees the pages behind.

        Args:
            tier (`int`): Index of the tier.
            lengths (`torch.Tensor`): `int32` `[rows]` over all layers, none longer than now; best if known on the host.
        """
        here = on_host(lengths)
        pages = self._pages(tier, here)
        freed = int((self._pages(tier, self.lengths_on_host()[tier]) - pages).sum())
        before = self._live(tier) if freed else None
        self.lengths[tier] = lengths
        if self._known is not None:
            self._known[tier] = here
        if before is not None:
            self.arena.release(self.tables[tier][places(before & ~self._live(tier), freed)])
        columns = int(pages.max()) if pages.numel() else 0
        if columns + columns // _AHEAD < self.tables[tier].shape[1]:
            with torch.inference_mode(False):
                self.tables[tier] = self.tables[tier][:, :columns].clone()
            self.version += 1

    # -- sequences -------------------------------------------------------------------------------------------------

    @changes_pages
    def select(self, index: torch.Tensor) -> None:
        """Makes sequence `i` what sequence `index[i]` was; shared pages are counted, not copied.

        Args:
            index (`torch.Tensor`): `int64` `[new batch]`.
        """
        old = self.live_ids()
        heads = self.geometry.kv_heads
        if self._known is not None:
            self._known = self._known.view(-1, self.layers, self.batch, heads)[:, :, on_host(index)].flatten(1)
        index = to_device(index, self.geometry.device)
        with torch.inference_mode(False):
            self.tables = [
                table.view(self.layers, self.batch, heads, -1)[:, index].flatten(0, 2).contiguous()
                for table in self.tables
            ]
            lengths = self.lengths.view(-1, self.layers, self.batch, heads)[:, :, index]
            self.lengths = lengths.flatten(1).contiguous()
            self.tail_lengths = self.tail_lengths[:, index].contiguous()
            if self.tail_keys is not None and self.tail_values is not None and self.tail_positions is not None:
                self.tail_keys = self.tail_keys[:, index].contiguous()
                self.tail_values = self.tail_values[:, index].contiguous()
                self.tail_positions = self.tail_positions[:, index].contiguous()
            if self.tail_fields is not None:
                self.tail_fields = self.tail_fields[:, :, index].contiguous()
            if self.key_shift is not None:
                self.key_shift = self.key_shift[:, index].contiguous()
            if self._sums is not None and self._summed is not None:
                self._sums, self._summed = self._sums[:, :, index].contiguous(), self._summed[:, index].contiguous()
        self._tail_shared = False
        self.batch = index.numel()
        self.arena.retain(self.live_ids())
        self.arena.release(old)
        self.version += 1

    @changes_pages
    def fork(self) -> "PagedStore":
        """A second owner of the same pages and tail; whoever writes first copies what it writes to.

        Returns:
            `PagedStore`: The copy.
        """
        other = PagedStore(self.geometry, self.layers, self.batch, self.layout, self.arena, self.backend)
        try:
            with torch.inference_mode(False):  # what is changed in place later, in whatever mode
                tables, lengths = [table.clone() for table in self.tables], self.lengths.clone()
                other.tail_lengths = self.tail_lengths.clone()
                if self._sums is not None and self._summed is not None:
                    other._sums, other._summed = self._sums.clone(), self._summed.clone()
            other.tail_keys, other.tail_values = self.tail_keys, self.tail_values
            other.tail_positions, other.tail_fields = self.tail_positions, self.tail_fields
            other.evicted, other.key_shift = self.evicted, self.key_shift
            other._known = None if self._known is None else self._known.clone()
            self._tail_shared = other._tail_shared = self.tail_keys is not None
            other.tables, other.lengths = tables, lengths
            self.arena.retain(other.live_ids())
        except BaseException:
            self.arena.unregister(other)
            raise
        return other

    @changes_pages
    def close(self) -> None:
        """Gives every page back and empties the rows."""
        self.arena.release(self.live_ids())
        self.lengths.zero_()
        self._known = None if self._known is None else torch.zeros_like(self._known)
        with torch.inference_mode(False):
            self.tail_lengths = torch.zeros_like(self.tail_lengths)
        self.evicted = False
        self._sums = self._summed = self.key_shift = None
        self.drop_tail()

    def abandon(self) -> None:
        """Gives every page back soon, without waiting for anybody; for finalizers."""
        self.drop_tail()
        self.arena.abandon(self)

    # -- to a file and back ----------------------------------------------------------------------------------------

    @changes_pages
    def state(self, layers: int) -> dict[str, torch.Tensor]:
        """Everything the store holds but its pages; the inverse of [`PagedStore.load_state`].

        Args:
            layers (`int`): How many layers have rows; those that never arrived are left out.

        Returns:
            `dict[str, torch.Tensor]`: By name: a `table.{tier}` per tier, `int32` `[rows, columns]`, zero where no page
            is live; `lengths` `int32` `[tiers, rows]`; `tail_lengths` `int32` `[layers, batch]`; where the tail is not
            empty `tail_keys`, `tail_values`, `tail_positions` and `tail_fields`, cut to what is used; where means are
            kept `sums` and `summed`; where keys are centred `key_shift`. Copies, save for the means and the tail.
        """
        rows = layers * self.rows_per_layer
        state = {"lengths": self.lengths[:, :rows].clone(), "tail_lengths": self.tail_lengths[:layers].clone()}
        for tier, table in enumerate(self.tables):
            live = self._live(tier)[:rows]
            columns = int(live.sum(1).max()) if live.numel() else 0
            state[f"table.{tier}"] = torch.where(live, table[:rows], 0)[:, :columns]
        used = int(self.tail_lengths[:layers].max()) if self.tail_lengths[:layers].numel() else 0
        if used and self.tail_keys is not None and self.tail_values is not None and self.tail_positions is not None:
            state["tail_keys"] = self.tail_keys[:layers, :, :, :used]
            state["tail_values"] = self.tail_values[:layers, :, :, :used]
            state["tail_positions"] = self.tail_positions[:layers, :, :used]
            if self.tail_fields is not None:
                state["tail_fields"] = self.tail_fields[:layers, ..., :used]
        if self._sums is not None and self._summed is not None:
            state["sums"], state["summed"] = self._sums[:, :layers], self._summed[:layers]
        if self.key_shift is not None:
            state["key_shift"] = self.key_shift[:layers]
        return state

    @changes_pages
    def load_state(self, state: Mapping[str, torch.Tensor], evicted: bool) -> None:
        """Fills an empty store of as many layers as the state has; nothing is checked here.

        Args:
            state (`Mapping[str, torch.Tensor]`): As from [`PagedStore.state`], the tables with page ids of this
                store's arena, which must already count them as referenced. Taken over, not copied.
            evicted (`bool`): Whether slots have ever been dropped or moved.
        """
        self.tables = [state[f"table.{tier}"] for tier in range(len(self.layout.tiers))]
        self.lengths, self.tail_lengths = state["lengths"], state["tail_lengths"]
        self.tail_keys, self.tail_values = state.get("tail_keys"), state.get("tail_values")
        self.tail_positions, self.tail_fields = state.get("tail_positions"), state.get("tail_fields")
        self._sums, self._summed = state.get("sums"), state.get("summed")
        self.key_shift = state.get("key_shift")
        self.evicted, self._known = evicted, None
        self.version += 1

    # -- called by the arena ---------------------------------------------------------------------------------------

    def relocate(self, new_id: torch.Tensor) -> None:
        """Follows pages that the arena has moved.

        Args:
            new_id (`torch.Tensor`): `int32` `[page ids]`, where each page lives now.
        """
        for tier, table in enumerate(self.tables):
            live = self._live(tier)
            table.copy_(torch.where(live, new_id[torch.where(live, table, 0).long()], table))

    def slabs_changed(self) -> None:
        """Notes that slab addresses are no longer what they were."""
        self.version += 1

    # -- bytes -----------------------------------------------------------------------------------------------------

    @property
    def own_bytes(self) -> int:
        """`int`: Bytes of tables, means and tail."""
        tail = [self.tail_keys, self.tail_values, self.tail_positions, self.tail_fields]
        tail += [self._sums, self._summed, self.key_shift]
        owned = [*self.tables, self.lengths, self.tail_lengths, *(t for t in tail if t is not None)]
        return sum(t.nbytes for t in owned)

    @changes_pages
    def usage(self) -> Usage:
        """Where the bytes of this store go; pages that forks share are counted in each.

        Returns:
            `Usage`: Bytes by kind, without the arena's free pages and reference counts.
        """
        usage = Usage()
        for tier, layout in enumerate(self.layout.tiers):
            live = self._live(tier)
            first = torch.arange(live.shape[1], device=live.device) * layout.slots
            filled = (self.lengths[tier][:, None] - first).clamp(max=layout.slots)
            # Beams share pages, so slots are counted per page and not per row.
            per_page = torch.zeros(self.arena.references.numel(), dtype=torch.int64, device=live.device)
            per_page.scatter_reduce_(0, self.tables[tier][live].long(), filled[live].long(), "amax")
            slots, pages = int(per_page.sum()), int((per_page > 0).sum())
            payload = layout.key_params - layout.keys + layout.value_params - layout.values
            metadata = layout.values - layout.key_params + layout.fields - layout.value_params
            usage.payload += slots * payload // layout.slots
            usage.metadata += slots * metadata // layout.slots
            usage.fields += slots * (layout.used - layout.fields) // layout.slots
            usage.pages += pages
        packed = usage.payload + usage.metadata + usage.fields
        usage.slack = usage.pages * self.layout.page_bytes - packed
        means = sum(t.nbytes for t in (self._sums, self._summed) if t is not None)
        usage.tables = means + sum(t.nbytes for t in [*self.tables, self.lengths, self.tail_lengths])
        shift = 0 if self.key_shift is None else self.key_shift.nbytes
        usage.metadata += shift
        usage.tail = self.own_bytes - usage.tables - shift
        return usage
