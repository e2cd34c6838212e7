"""Which pages each row has, and how many slots: page tables, lengths, and the host's copy of the lengths."""

import torch

from kvcompress_hf.kernels import PageLayout, Rows
from kvcompress_hf.paging.arena import Arena
from kvcompress_hf.paging.sequence_tensors import Declared, SequenceTensors
from kvcompress_hf.paging.waiting import on_host, places, to_device

_AHEAD = 32  # a growing table is allocated 1/32 wider than it must be


def declare_tables(tiers: int, device: torch.device) -> list[Declared]:
    """Declares the tensors of page tables.

    Args:
        tiers (`int`): Number of tiers; each has a table.
        device (`torch.device`): Where the store is; off the CPU, the host keeps a copy of the lengths.

    Returns:
        `list[Declared]`: A `table.{tier}` each of page ids, and `lengths`: slots in each row.
    """
    tables = [
        Declared(f"table.{tier}", torch.int32, ("rows", "columns"), changed_by="owner", always=True)
        for tier in range(tiers)
    ]
    lengths = Declared("lengths", torch.int32, ("tiers", "rows"), changed_by="packing", always=True)
    if device.type == "cpu":
        return [*tables, lengths]
    # Absent where only the device knows.
    known = Declared(
        "known_lengths",
        torch.int32,
        ("tiers", "rows"),
        kind=None,
        changed_by="packing",
        saved=False,
        on_host=True,
        always=True,
    )
    return [*tables, lengths, known]


class Tables:
    """The pages and slots of each row of a store.

    Args:
        tensors (`SequenceTensors`): The store's tensors, the tables and lengths among them.
        layout (`PageLayout`): What a page looks like.
        arena (`Arena`): Where pages come from.
    """

    def __init__(self, tensors: SequenceTensors, layout: PageLayout, arena: Arena) -> None:
        self.tensors, self.layout, self.arena = tensors, layout, arena
        self.names = [f"table.{tier}" for tier in range(len(layout.tiers))]

    @property
    def tables(self) -> list[torch.Tensor]:
        """`list[torch.Tensor]`: Page ids of each tier, `int32` `[rows, columns]`."""
        return [self.tensors.values[name] for name in self.names]

    @property
    def lengths(self) -> torch.Tensor:
        """`torch.Tensor`: Slots in each row, `int32` `[tiers, rows]`."""
        return self.tensors.values["lengths"]

    @property
    def _known(self) -> torch.Tensor | None:
        return self.tensors.values.get("known_lengths")

    def lengths_on_host(self) -> torch.Tensor:
        """The lengths on the host; waits for the device after they changed in a way that only the device knows.

        Returns:
            `torch.Tensor`: `int32` `[tiers, rows]`, not to be changed.
        """
        if self.lengths.device.type == "cpu":
            return self.lengths
        known = self._known
        if known is None:
            known = self.tensors.values["known_lengths"] = self.lengths.cpu()
        return known

    def rows(self, part: slice) -> Rows:
        """Shows some rows to the kernels.

        Args:
            part (`slice`): The rows to show.

        Returns:
            `Rows`: Views of the tables and lengths of these rows.
        """
        pool, known = self.arena.pool, self._known
        widths: list[int] | None = None
        if known is not None and part.start != part.stop:
            widths = known[:, part].amax(1).tolist()
        return Rows(
            layout=self.layout,
            slabs=pool.slabs,
            slab_addresses=pool.addresses,
            slab_pages=pool.sizes,
            slab_shift=self.arena.slab_shift,
            tables=[table[part] for table in self.tables],
            lengths=list(self.lengths[:, part].unbind()),
            widths=widths,
        )

    def pages(self, tier: int, lengths: torch.Tensor) -> torch.Tensor:
        """How many pages so many slots of a tier take.

        Args:
            tier (`int`): Index of the tier.
            lengths (`torch.Tensor`): Numbers of slots.

        Returns:
            `torch.Tensor`: Numbers of pages, of the same shape and dtype.
        """
        slots = self.layout.tiers[tier].slots
        return (lengths + (slots - 1)) // slots

    def live(self, tier: int) -> torch.Tensor:
        """Which entries of a table have a page behind them.

        Args:
            tier (`int`): Index of the tier.

        Returns:
            `torch.Tensor`: True where there is a page, `bool` `[rows, columns]`.
        """
        table = self.tensors.values[self.names[tier]]
        columns = torch.arange(table.shape[1], device=table.device)
        return columns < self.pages(tier, self.lengths[tier])[:, None]

    def live_ids(self) -> torch.Tensor:
        """Page ids in use, with repeats where rows share a page.

        Returns:
            `torch.Tensor`: Page ids, `int32` `[n]`.
        """
        ids = []
        for tier, (table, lengths) in enumerate(zip(self.tables, self.lengths_on_host(), strict=True)):
            ids.append(table[places(self.live(tier), int(self.pages(tier, lengths).sum()))])
        return torch.cat(ids)

    def add(self, tier: int, part: slice, counts: torch.Tensor, here: torch.Tensor) -> None:
        """Notes slots that were added to rows.

        Args:
            tier (`int`): Index of the tier.
            part (`slice`): The rows that are meant.
            counts (`torch.Tensor`): `int32` `[rows]`, how many slots each row got.
            here (`torch.Tensor`): `counts` on the host.
        """
        known = self._known
        if known is not None:
            known[tier, part] += here
        self.lengths[tier, part] += counts

    def reserve(self, tier: int, part: slice, counts: torch.Tensor) -> None:
        """Takes the pages that rows need for more slots.

        Args:
            tier (`int`): Index of the tier.
            part (`slice`): The rows that are meant.
            counts (`torch.Tensor`): `int32` `[rows]` on the host, slots to come.

        Raises:
            CacheMemoryError: If the arena is full.
        """
        lengths = self.lengths_on_host()[tier, part]
        if not lengths.numel():
            return
        held = self.pages(tier, lengths)
        needed = self.pages(tier, lengths + counts)
        extra = needed - held
        total, columns = torch.stack((extra.sum(), needed.max().long())).tolist()
        if self.arena.shared:
            partial = (lengths % self.layout.tiers[tier].slots != 0) & (counts > 0)
            row = torch.nonzero(partial).flatten()
            self.own_pages(tier, row + part.start, held[row].long() - 1)
        if not total:
            return
        ids = self.arena.allocate(total)
        self._widen(tier, columns)
        extra, held = extra.long(), held.long()
        row = torch.repeat_interleave(extra, output_size=total)
        first = extra.cumsum(0) - extra - held  # column = running number - first page's running number + pages held
        column = torch.arange(total) - first[row]
        table = self.tensors.values[self.names[tier]]
        table[to_device(row + part.start, ids.device), to_device(column, ids.device)] = ids

    def _widen(self, tier: int, columns: int) -> None:
        name = self.names[tier]
        table = self.tensors.values[name]
        if columns > table.shape[1]:
            wider = self.tensors.zeros(name, columns=columns + columns // _AHEAD)
            wider[:, : table.shape[1]] = table
            self.tensors.values[name] = wider
            self.tensors.moved()

    def shared_pages_to_copy(self, tier: int, grows: torch.Tensor) -> int:
        """Pages that must be copied before rows grow, because others share their last, half-filled one.

        Args:
            tier (`int`): Index of the tier that grows.
            grows (`torch.Tensor`): `bool` `[rows]` on the host.

        Returns:
            `int`: Number of pages.
        """
        if not self.arena.shared:
            return 0
        lengths = self.lengths_on_host()[tier]
        row = torch.nonzero(grows & (lengths % self.layout.tiers[tier].slots != 0)).flatten()
        column = self.pages(tier, lengths)[row].long() - 1
        ids = self.tensors.values[self.names[tier]]
        ids = ids[to_device(row, ids.device), to_device(column, ids.device)]
        return int((self.arena.references[ids.long()] > 1).sum())

    def own_pages(self, tier: int, row: torch.Tensor, column: torch.Tensor) -> None:
        """Copies those of the named pages that others share, before they are written to; waits for the device.

        Args:
            tier (`int`): Index of the tier.
            row (`torch.Tensor`): `int64` `[n]`.
            column (`torch.Tensor`): `int64` `[n]`.

        Raises:
            CacheMemoryError: If the arena is full; nothing has changed then.
        """
        table = self.tensors.values[self.names[tier]]
        row, column = to_device(row, table.device), to_device(column, table.device)
        ids = table[row, column]
        foreign = self.arena.references[ids.long()] > 1
        if bool(foreign.any()):
            ids = ids[foreign]
            table[row[foreign], column[foreign]] = self.arena.copy_pages(ids)
            self.arena.release(ids)

    def own_all(self) -> None:
        """Makes every page private."""
        if not self.arena.shared:
            return
        for tier in range(len(self.names)):
            row, column = torch.nonzero(self.live(tier), as_tuple=True)
            self.own_pages(tier, row, column)
        self.arena.shared = bool((self.arena.references > 1).any())

    def truncate(self, tier: int, lengths: torch.Tensor) -> None:
        """Shortens rows and frees the pages behind.

        Args:
            tier (`int`): Index of the tier.
            lengths (`torch.Tensor`): `int32` `[rows]`, none longer than now; best if known on the host.
        """
        here = on_host(lengths)
        pages = self.pages(tier, here)
        freed = int((self.pages(tier, self.lengths_on_host()[tier]) - pages).sum())
        before = self.live(tier) if freed else None
        self.lengths[tier] = lengths
        known, table = self._known, self.tensors.values[self.names[tier]]
        if known is not None:
            known[tier] = here
        if before is not None:
            self.arena.release(table[places(before & ~self.live(tier), freed)])
        self.narrow(tier)

    def narrow(self, tier: int) -> None:
        """Makes a table as narrow as its longest row allows, with a little room to grow.

        Args:
            tier (`int`): Index of the tier.
        """
        pages = self.pages(tier, self.lengths_on_host()[tier])
        columns = int(pages.max()) if pages.numel() else 0
        table = self.tensors.values[self.names[tier]]
        if columns + columns // _AHEAD < table.shape[1]:
            with torch.inference_mode(False):
                self.tensors.values[self.names[tier]] = table[:, :columns].clone()
            self.tensors.moved()

    def relocate(self, new_id: torch.Tensor) -> None:
        """Follows pages that the arena has moved.

        Args:
            new_id (`torch.Tensor`): `int32` `[page ids]`, where each page lives now.
        """
        for tier, table in enumerate(self.tables):
            live = self.live(tier)
            table.copy_(torch.where(live, new_id[torch.where(live, table, 0).long()], table))
