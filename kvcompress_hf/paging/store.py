"""The rows of all layers of one shape, and what is done to them: pack, demote, evict, turn keys."""

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch

from kvcompress_hf.paging.arena import changes_pages
from kvcompress_hf.paging.geometry import Geometry
from kvcompress_hf.paging.stored_rows import StoredRows, StoreNote
from kvcompress_hf.paging.turned import turn_stored_keys
from kvcompress_hf.paging.usage import Usage
from kvcompress_hf.paging.waiting import known_as, moves_into_holes, on_host, places, to_device

__all__ = ["Describe", "Geometry", "PagedStore", "StoreNote", "Usage"]

Describe = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


class PagedStore(StoredRows):
    """Packed slots and tails of rows, with the operations that change them.

    Arguments are those of [`StoredRows`].
    """

    # -- how keys are stored ---------------------------------------------------------------------------------------

    def settle_key_shift(
        self,
        layer: int,
        keys: torch.Tensor,
        real: torch.Tensor | None,
        query: torch.Tensor | None = None,
        bits: int = 8,
        sequences: torch.Tensor | None = None,
    ) -> None:
        """Decides what is taken off every key of a layer from now on; see [`KeyCentring.settle`].

        Args:
            layer (`int`): Index of the layer.
            keys (`torch.Tensor`): The first keys, `[batch, kv_heads, tokens, head_dim]`.
            real (`torch.Tensor`, *optional*): `bool` `[batch, tokens]`, false for padding.
            query (`torch.Tensor`, *optional*): Scaled queries, where only heads that gain are to be centred.
            bits (`int`): Bits of the keys' codes.
            sequences (`torch.Tensor`, *optional*): `bool` `[batch]`, those that have stored nothing yet; all when left
                out.
        """
        self._keys.settle(layer, keys, real, query, bits, sequences)

    def settle_key_feedback(
        self, layer: int, query: torch.Tensor, real: torch.Tensor | None, sequences: torch.Tensor | None = None
    ) -> None:
        """Decides how rotated keys of a layer are rounded from now on; see [`KeyFeedback.settle`].

        Args:
            layer (`int`): Index of the layer.
            query (`torch.Tensor`): Queries of the first tokens, `[batch, q_heads, queries, head_dim]`.
            real (`torch.Tensor`, *optional*): `bool` `[batch, queries]`, false for padding.
            sequences (`torch.Tensor`, *optional*): `bool` `[batch]`, those that have stored nothing yet; all when left
                out.
        """
        self._feedback.settle(layer, query, real, sequences)

    def drop_key_feedback(self) -> None:
        """Rounds keys that are packed from now on each to the nearest."""
        self._feedback.drop()

    def key_shift_of(self, layer: int) -> torch.Tensor | None:
        """What is taken off the keys of a layer before they are attended to and stored.

        Args:
            layer (`int`): Index of the layer.

        Returns:
            `torch.Tensor` or `None`: Native dtype `[batch, kv_heads, 1, head_dim]`; `None` if keys stay as they are.
        """
        return None if self.key_shift is None else self.key_shift[layer]

    def whole(self, layer: int | None, keys: torch.Tensor) -> torch.Tensor:
        """Adds the layer's `key_shift` again, for whoever needs the model's own keys; see [`KeyCentring.whole`].

        Args:
            layer (`int`, *optional*): Index of the layer; all layers when left out.
            keys (`torch.Tensor`): Centred, `[batch, kv_heads, tokens, head_dim]`.

        Returns:
            `torch.Tensor`: The keys as the model made them.
        """
        return self._keys.whole(layer, keys)

    # -- how values are stored -------------------------------------------------------------------------------------

    def rotated(self, vectors: torch.Tensor) -> torch.Tensor:
        """Takes values to the basis that the store keeps them in, or from there; and attention's output back.

        The transform is its own inverse, and lengths and sums of products stay what they are. Attention is linear in
        values, so it has to be undone once per query and not once per slot.

        Args:
            vectors (`torch.Tensor`): `[batch, outer, inner, head_dim]`, values or output, in their dtype.

        Returns:
            `torch.Tensor`: The transformed vectors; `vectors` themselves where values are kept as they are.
        """
        return self.backend.hadamard(vectors, self.layout.rotation_block) if self.rotates_values else vectors

    # -- the tail --------------------------------------------------------------------------------------------------

    def reserve_tail(self, capacity: int) -> None:
        """Makes the tail private to this store and large enough.

        Args:
            capacity (`int`): Tokens per row there must be room for, those already there included.
        """
        self._tail.reserve(capacity)

    def crop_tail(self, position: int) -> None:
        """Forgets tail slots at or behind a position.

        Args:
            position (`int`): First logical position to forget.
        """
        self._tail.crop(position)

    @changes_pages
    def pack_tail(
        self,
        tier: int,
        layer: int | None = None,
        describe: Describe | None = None,
        tails: torch.Tensor | None = None,
        sinks: int = 0,
    ) -> None:
        """Moves the whole tail of one layer, or of all, into pages.

        Args:
            tier (`int`): Index of the tier that receives the slots.
            layer (`int`, *optional*): Index of the layer; all layers when left out.
            describe (`Callable`, *optional*): Makes slot fields from keys, values and the means of both, see
                [`PagedStore.describe`].
            tails (`torch.Tensor`, *optional*): `tail_lengths` on the host, where the caller knows them.
            sinks (`int`): As for [`PagedStore.enter`].

        Raises:
            CacheMemoryError: If the arena is full. With `sinks` some slots may have been added by then; the tail still
                has all of them, and the change that this is a part of is taken back as a whole.
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
            fields.update(self.describe(describe, keys, self.rotated(values), real, layer))
        self.enter(tier, keys, values, counts, None, fields, layer, sinks)
        self._tail.empty(part)

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
                `[batch, kv_heads, 1, head_dim]` to fields by name, `[batch, kv_heads, tokens]`. It sees keys and values
                as the model made them.
            keys (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`, centred; with all layers, `batch` is
                `layers * batch`.
            values (`torch.Tensor`): Values as the model made them, of the same shape.
            real (`torch.Tensor`): `bool` `[batch, tokens]`, which tokens count.
            layer (`int`, *optional*): Index of the layer; all layers when left out.

        Returns:
            `dict[str, torch.Tensor]`: What `describe` made: fields by name, `[batch, kv_heads, tokens]`.
        """
        keys = self.whole(layer, keys)
        means = self._means.add(slice(None) if layer is None else slice(layer, layer + 1), keys, values, real)
        # What is not a token may hold anything.
        clean_keys, clean_values = (torch.where(real[:, None, :, None], x, 0) for x in (keys, values))
        return describe(clean_keys, clean_values, means[0], means[1])

    # -- packed slots ----------------------------------------------------------------------------------------------

    def enter(
        self,
        tier: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        counts: torch.Tensor,
        index: torch.Tensor | None,
        fields: Mapping[str, torch.Tensor],
        layer: int | None,
        sinks: int = 0,
    ) -> None:
        """[`PagedStore.pack`] for tokens in their order, the first of each sequence into the first tier.

        Args:
            tier (`int`): Index of the tier for all others.
            keys (`torch.Tensor`): As for [`PagedStore.pack`], like all that follows.
            values (`torch.Tensor`): Likewise.
            counts (`torch.Tensor`): Likewise.
            index (`torch.Tensor`, *optional*): Likewise.
            fields (`Mapping[str, torch.Tensor]`): Likewise.
            layer (`int`, *optional*): Likewise.
            sinks (`int`): Slots of a row that lie in the first tier once it has as many.

        Raises:
            CacheMemoryError: If the arena is full; the first of them may have been added by then.
        """
        here = on_host(counts)
        first = self._missing_sinks(sinks, self._slice(layer), here) if sinks else torch.zeros_like(here)
        if not bool(first.any()):
            self.pack(tier, keys, values, counts, index, fields, layer)
            return
        most = int(first.max())
        head = known_as(to_device(first, counts.device), first)
        begin = None if index is None else index[..., :most].contiguous()
        self.pack(0, keys, values, head, begin, fields, layer)
        rest = here - first
        if not bool(rest.any()):
            return
        if index is None:
            index = torch.arange(keys.shape[2], dtype=torch.int32, device=keys.device).expand(*counts.shape, -1)
        place = torch.arange(keys.shape[2], device=keys.device) + head[..., None].long()
        index = index.gather(2, place.clamp(max=keys.shape[2] - 1)).contiguous()
        self.pack(tier, keys, values, known_as(to_device(rest, counts.device), rest), index, fields, layer)

    def _missing_sinks(self, sinks: int, part: slice, added: torch.Tensor) -> torch.Tensor:
        """How many of the slots to be added to each row belong into the first tier, on the host, as `added`."""
        stored = self.lengths_on_host()[0][part].view(added.shape)
        return torch.minimum((sinks - stored).clamp(min=0), added).to(torch.int32)

    @changes_pages
    def pack(
        self,
        tier: int,
        key: torch.Tensor,
        value: torch.Tensor,
        counts: torch.Tensor,
        index: torch.Tensor | None,
        fields: Mapping[str, torch.Tensor],
        layer: int | None,
    ) -> None:
        """Adds slots to rows, taking pages as needed.

        Args:
            tier (`int`): Index of the tier.
            key (`torch.Tensor`): Keys as they are to be stored, `[batch, kv_heads, tokens, head_dim]`; with all layers,
                `batch` is `layers * batch`.
            value (`torch.Tensor`): Values as they are to be stored, of the same shape.
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
        self._tables.reserve(tier, part, added)
        clamped = self.backend.pack(self.rows(layer), tier, key, value, counts, index, fields)
        self._tables.add(tier, part, counts.reshape(-1), added)
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
            count (`int`): Number of slots that were clamped.
        """
        self._clamped = None
        if count:
            warnings.warn(
                f"{count} slots have keys or values beyond fp16's range (65504) and were clamped in a quantised "
                "tier; use the 'lossless' recipe for this model if the output suffers.",
                stacklevel=3,
            )

    def pages_of_rows(self) -> torch.Tensor:
        """Pages of each row.

        Returns:
            `torch.Tensor`: `int64` `[tiers, batch, rows of a sequence]`, on the host.
        """
        pages = torch.stack([self._tables.pages(tier, lengths) for tier, lengths in enumerate(self.lengths_on_host())])
        by_sequence = pages.view(-1, self.layers, self.batch, self.geometry.kv_heads).transpose(1, 2)
        return by_sequence.flatten(2).long()

    @changes_pages
    def pages_to_pack(
        self,
        tier: int,
        tokens: int,
        layers: int,
        tails: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        sinks: int = 0,
    ) -> int:
        """Pages that packing the tail and some more tokens takes, copies of shared ones included.

        Args:
            tier (`int`): Index of the tier that receives them.
            tokens (`int`): New tokens per row besides those of the tail.
            layers (`int`): Layers that have rows here so far.
            tails (`torch.Tensor`, *optional*): `tail_lengths` on the host, where the caller knows them.
            lengths (`torch.Tensor`, *optional*): `int32` `[tiers, rows]` on the host, in place of what rows hold now.
            sinks (`int`): As for [`PagedStore.enter`].

        Returns:
            `int`: Number of pages, over all rows.
        """
        lengths = (self.lengths_on_host() if lengths is None else lengths).view(
            len(self.layout.tiers), self.layers, self.batch, -1
        )
        lengths = lengths[:, :layers]
        added = on_host(self.tail_lengths if tails is None else tails)[:layers, :, None] + tokens
        first = torch.minimum((sinks - lengths[0]).clamp(min=0), added)
        return sum(
            self._pages_to_add(into, lengths[into], more)
            for into, more in ([(tier, added)] if not sinks else [(0, first), (tier, added - first)])
        )

    def _pages_to_add(self, tier: int, lengths: torch.Tensor, added: torch.Tensor) -> int:
        """Pages that more slots take, by layer, sequence and head, copies of shared ones included."""
        pages = self._tables.pages
        new = int((pages(tier, lengths + added) - pages(tier, lengths)).sum())
        grows = torch.zeros((self.layers, self.batch, self.geometry.kv_heads), dtype=torch.bool)
        grows[: lengths.shape[0]] = added > 0
        return new + self._tables.shared_pages_to_copy(tier, grows.flatten())

    def pages_freed(self, lengths: torch.Tensor) -> int:
        """Pages that come free once rows have other lengths, if nobody shares them.

        Args:
            lengths (`torch.Tensor`): `int32` `[tiers, rows]` on the host.

        Returns:
            `int`: Number of pages; negative if more are needed than now.
        """
        now, pages = self.lengths_on_host(), self._tables.pages
        return sum(int((pages(tier, now[tier]) - pages(tier, after)).sum()) for tier, after in enumerate(lengths))

    @changes_pages
    def own_all(self) -> None:
        """Makes every page private, for recipes that write statistics into slots at each decode step."""
        self._tables.own_all()

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
    def uncount(
        self, layer: int, fields: Sequence[str], before: list[torch.Tensor], again: Callable[[], object]
    ) -> None:
        """Takes out of float fields of a layer what was added to them last, by adding it once more to zeros.

        Args:
            layer (`int`): Index of the layer.
            fields (`Sequence[str]`): Names of the fields.
            before (`list[torch.Tensor]`): Empty; filled with the fields as they are, so that all of this may be
                repeated if it breaks off.
            again (`Callable`): Adds to the fields what is to be taken out, and changes nothing else.
        """
        if not before:
            before[:] = self._layer_fields(layer, fields)
        self._layer_fields(layer, fields, [torch.zeros_like(values) for values in before])
        again()
        added = self._layer_fields(layer, fields)
        self._layer_fields(layer, fields, [(x - y).clamp(min=0) for x, y in zip(before, added, strict=True)])

    def _layer_fields(
        self, layer: int, fields: Sequence[str], values: Sequence[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Float fields of the slots of a layer, in pages and tail; written where `values` are given."""
        rows, told, read = self.rows(layer), iter(() if values is None else values), []
        for name in fields:
            for tier in range(len(rows.lengths)):
                width = rows.width(tier)
                if width and values is not None:
                    self.backend.write_field(rows, tier, name, next(told))
                elif width:
                    read.append(self.backend.read_field(rows, tier, name, width))
            if self.tail_fields is not None:
                tail = self.tail_fields[layer, self.layout.fields.index(name)].view(torch.float32)
                read.append(tail.clone()) if values is None else tail.copy_(next(told))
        return read

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
        self, tier: int, marks: torch.Tensor, kept: torch.Tensor | None = None, gone: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Drops slots: the last survivors fill the holes, and pages that come free go back to the arena.

        Holes are filled in ascending order from the end (KV-Compress, section 3.2 of the reference), so sources and
        destinations never overlap.

        Args:
            tier (`int`): Index of the tier.
            marks (`torch.Tensor`): `bool` or `int8` `[rows, slots]` over all layers; what lies beyond a row's length
                is ignored.
            kept (`torch.Tensor`, *optional*): `int32` `[rows]`, how many slots stay; best if known on the host. A row
                that all are to stay of is left alone, whatever its marks.
            gone (`int`): Slots with this mark go: with a mask, those where it is false.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]` or `None`: The rows, old slots and new slots of what has
            moved, `int64` `[n]` each; a move may be named twice. `None` if nothing has.
        """
        if kept is None:
            kept = self._filled(tier, marks != gone).sum(1, dtype=torch.int32)
        here, before = on_host(kept), self.lengths_on_host()[tier]
        moves = torch.minimum(here, before - here)  # of each row at most
        moved = None
        if bool(moves.any()):
            row, target, source = self._moves(tier, (marks, gone), kept, moves)
            if row.numel():
                if self.arena.shared:
                    pages = torch.unique(torch.stack([row, target // self.layout.tiers[tier].slots]), dim=1)
                    self._tables.own_pages(tier, pages[0], pages[1])
                as_int = (x.to(torch.int32) for x in (row, target, source))
                self.backend.move(self.rows(), tier, *as_int)
                moved = row, source, target
        if not torch.equal(here, before):
            self.evicted = True
            self.truncate(tier, kept)
        return moved

    def _filled(self, tier: int, mask: torch.Tensor) -> torch.Tensor:
        """A mask over slots, `[rows, slots]`, false beyond each row's length."""
        return mask & (torch.arange(mask.shape[1], device=mask.device) < self.lengths[tier][:, None])

    def _moves(
        self, tier: int, marked: tuple[torch.Tensor, int], kept: torch.Tensor, most: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The moves that fill the holes of rows, at most so many of each: row, hole and mover, `int64` `[n]` each."""
        (marks, gone), lengths = marked, self.lengths[tier]
        if self.backend.plans is not None:
            found = self.backend.plans.holes(marks.view(torch.int8), gone, lengths, kept, int(most.sum()))
            row, target, source = (each.long() for each in found)
            return row, target, source
        keep = self._filled(tier, (marks != gone) | (kept >= lengths)[:, None])
        column = torch.arange(keep.shape[1], device=keep.device)
        holes, movers = ~keep & (column < kept[:, None]), keep & (column >= kept[:, None])
        return moves_into_holes(holes, movers, int(most.sum()), int(most.argmax()))

    @changes_pages
    def own_before_evicting(self, tier: int, kept: torch.Tensor, changing: torch.Tensor) -> None:
        """Makes private what [`PagedStore.evict`] may write to, so that evicting needs no memory.

        Args:
            tier (`int`): Index of the tier.
            kept (`torch.Tensor`): `int32` `[rows]`, slots that stay at least until the last eviction.
            changing (`torch.Tensor`): `bool` `[rows]`, rows that lose slots; the others are left shared.

        Raises:
            CacheMemoryError: If the arena is full; what rows hold is as it was.
        """
        if self.arena.shared:
            columns = torch.arange(self.tables[tier].shape[1], device=kept.device)
            pages = (columns < self._tables.pages(tier, kept)[:, None]) & changing[:, None]
            row, column = torch.nonzero(pages, as_tuple=True)
            self._tables.own_pages(tier, row, column)

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
            self._tables.own_pages(tier, row, column)

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
        turn_stored_keys(self, tier, by, seed, inv_freq)

    def _by_page(self, tier: int, values: torch.Tensor) -> torch.Tensor:
        """`[rows, slots]` to `[rows, pages, slots of a page]`."""
        slots = self.layout.tiers[tier].slots
        pages = -(-values.shape[1] // slots)
        padded = torch.nn.functional.pad(values, (0, pages * slots - values.shape[1]))
        return padded.view(-1, pages, slots)

    @changes_pages
    def demote(self, tier: int, lower: int, targets: torch.Tensor, counts: torch.Tensor) -> None:
        """Copies slots into a lower tier, re-quantised from what is stored; [`PagedStore.evict`] then drops them here.

        Args:
            tier (`int`): Index of the tier they are in.
            lower (`int`): Index of the tier that receives them.
            targets (`torch.Tensor`): `int8` `[rows, slots]` over all layers: `lower` for those that are copied; what
                lies beyond a row's length is ignored.
            counts (`torch.Tensor`): `int32` `[rows]`, how many of each; best if known on the host. Where that is 0,
                the row is left alone, whatever its targets.

        Raises:
            CacheMemoryError: If the arena is full; nothing has changed then.
        """
        here = on_host(counts)
        total = int(here.sum())
        if not total:
            return
        self._tables.reserve(lower, slice(0, targets.shape[0]), here)
        if self.backend.plans is not None:
            row, source, rank = self.backend.plans.places(targets, lower, self.lengths[tier], here)
        else:
            chosen = self._filled(tier, (targets == lower) & (counts > 0)[:, None])
            at, slot = places(chosen, total)
            rank = chosen.cumsum(1, dtype=torch.int32)[at, slot] - 1
            row, source = at.to(torch.int32), slot.to(torch.int32)
        self.backend.retier(self.rows(), row, tier, source, lower, self.lengths[lower][row.long()] + rank)
        self._tables.add(lower, slice(None), counts, here)
        self.evicted = True

    @changes_pages
    def truncate(self, tier: int, lengths: torch.Tensor) -> None:
        """Shortens rows and frees the pages behind.

        Args:
            tier (`int`): Index of the tier.
            lengths (`torch.Tensor`): `int32` `[rows]` over all layers, none longer than now; best if known on the host.
        """
        self._tables.truncate(tier, lengths)
