"""The page pool of one device: slabs of equal pages, a reference count per page, and nothing else."""

import weakref
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Protocol

import torch

from kvcompress_hf.errors import CacheMemoryError
from kvcompress_hf.kernels.memory import page_memory
from kvcompress_hf.paging.waiting import on_host, to_device
from kvcompress_hf.units import format_bytes

_SLAB_BYTES = 4 * 2**20  # an empty slab goes back to the allocator, so smaller slabs give memory back sooner
_COPIED_BYTES = 2**20  # a slab up to this size grows in place of a further one
_GROWTH = 32  # a growing arena allocates 1/32 of its live pages ahead at most


class PageOwner(Protocol):
    """Whoever keeps page ids: told when pages are relocated and when slabs come or go."""

    def relocate(self, new_id: torch.Tensor) -> None:
        """Replaces every page id `i` it holds by `new_id[i]` (`int32` `[page ids]`)."""

    def slabs_changed(self) -> None:
        """Forgets what it derived from slab addresses."""


class Arena:
    """Pages of one size on one device.

    Page ids are int32; the slab of a page is `id >> slab_shift`, its place inside it `id & (2**slab_shift - 1)`.
    Growing adds a slab, or lengthens a small one; a slab without live pages is given back by [`Arena.trim`].

    Args:
        page_bytes (`int`): Size of a page in bytes.
        device (`torch.device`): Where the slabs live.
        max_bytes (`int`, *optional*): Most bytes the slabs may take together.
    """

    def __init__(self, page_bytes: int, device: torch.device, max_bytes: int | None = None) -> None:
        self.page_bytes = page_bytes
        self.device = device
        self.max_bytes = max_bytes
        pages = max(_SLAB_BYTES // page_bytes, 16)
        self.slab_shift = pages.bit_length() - 1
        self.slabs: list[torch.Tensor] = []  # uint8 [pages, page_bytes]; a slab given back has no pages
        with torch.inference_mode(False):
            self.slab_addresses = torch.zeros(0, dtype=torch.int64, device=device)
            # References per page id; -1 where the id has no page behind it.
            self.references = torch.zeros(0, dtype=torch.int32, device=device)
        self.live = 0  # pages with at least one reference
        self.shared = False  # whether any page may have more than one reference
        self._owners: weakref.WeakSet[PageOwner] = weakref.WeakSet()

    def register(self, owner: PageOwner) -> None:
        """Adds an owner of pages, held weakly.

        Args:
            owner (`PageOwner`): Called back on relocation and on slab changes.
        """
        self._owners.add(owner)

    def has_other_owners(self, mine: Container[int]) -> bool:
        """Whether anyone else takes pages from here.

        Args:
            mine (`Container[int]`): `id()` of the owners that do not count.

        Returns:
            `bool`: True if there is another owner alive.
        """
        return any(id(owner) not in mine for owner in self._owners)

    @property
    def pages(self) -> int:
        """`int`: Pages allocated, live or free."""
        return sum(slab.shape[0] for slab in self.slabs)

    @property
    def nbytes(self) -> int:
        """`int`: Bytes allocated for slabs."""
        return self.pages * self.page_bytes

    def allocate(self, count: int) -> torch.Tensor:
        """Takes pages, those with the lowest ids first, so that live pages stay together.

        Args:
            count (`int`): Number of pages.

        Returns:
            `torch.Tensor`: Page ids, `int32` `[count]`, each with one reference; on the CPU the pages are zeros.

        Raises:
            CacheMemoryError: If the arena would grow beyond `max_bytes`; nothing has changed then.
        """
        missing = count - (self.pages - self.live)
        if missing > 0:
            self._grow(missing)
        # By a prefix sum, because the device need not be asked how many are free.
        free = (self.references == 0).cumsum(0, dtype=torch.int32)
        ids = torch.searchsorted(
            free, torch.arange(1, count + 1, dtype=torch.int32, device=free.device), out_int32=True
        )
        self.references[ids] = 1
        self.live += count
        if self.device.type == "cpu":
            # A file of this cache must not hold, in the unused ends of its pages, what others had stored there. A GPU
            # would have to be asked which slabs these are.
            inner = (ids & ((1 << self.slab_shift) - 1)).long()
            for index in torch.unique(ids >> self.slab_shift).tolist():
                self.slabs[index][inner[(ids >> self.slab_shift) == index]] = 0
        return ids

    def retain(self, ids: torch.Tensor) -> None:
        """Adds one reference per occurrence of a page.

        Args:
            ids (`torch.Tensor`): Page ids, `int32` `[n]`, with repeats.
        """
        if ids.numel():
            self.references.index_add_(0, ids, torch.ones_like(ids))
            self.shared = True

    def release(self, ids: torch.Tensor) -> None:
        """Drops one reference per occurrence of a page; a page without references is free.

        Args:
            ids (`torch.Tensor`): Page ids, `int32` `[n]`, with repeats.
        """
        if not ids.numel():
            return
        held = self.references > 0 if self.shared else None
        self.references.index_add_(0, ids, torch.full_like(ids, -1))
        self.live -= ids.numel() if held is None else int((held & (self.references == 0)).sum())

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Copies the bytes of pages.

        Args:
            ids (`torch.Tensor`): Page ids, `int32` `[n]`.

        Returns:
            `torch.Tensor`: `uint8` `[n, page_bytes]`.
        """
        pages = torch.empty((ids.numel(), self.page_bytes), dtype=torch.uint8, device=self.device)
        for slab, inner, place in self._by_slab(ids):
            pages[place] = slab[inner]
        return pages

    def write(self, ids: torch.Tensor, pages: torch.Tensor) -> None:
        """Replaces the bytes of pages; the inverse of [`Arena.read`].

        Args:
            ids (`torch.Tensor`): Page ids, `int32` `[n]`.
            pages (`torch.Tensor`): `uint8` `[n, page_bytes]`.
        """
        for slab, inner, place in self._by_slab(ids):
            slab[inner] = pages[place]

    def _by_slab(self, ids: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Each slab with some of the pages, their places in it, and their places in `ids`."""
        here = on_host(ids)
        slabs, inner = here >> self.slab_shift, (here & ((1 << self.slab_shift) - 1)).long()
        for index in torch.unique(slabs).tolist():
            place = torch.nonzero(slabs == index).flatten()
            yield self.slabs[index], to_device(inner[place], self.device), to_device(place, self.device)

    def adopt(self, slabs: Sequence[torch.Tensor], references: torch.Tensor) -> torch.Tensor:
        """Takes memory with pages already in it, such as a mapped file, without copying it.

        Args:
            slabs (`Sequence[torch.Tensor]`): Each `uint8` `[pages, page_bytes]` of at most `2**slab_shift` pages, with
                a storage of its own, so that it can be given back by itself.
            references (`torch.Tensor`): `int32` `[n]`, references to each of these pages.

        Returns:
            `torch.Tensor`: Ids of the pages, `int32` `[n]`.

        Raises:
            CacheMemoryError: If the arena would grow beyond `max_bytes`; nothing has changed then.
        """
        self._check_limit(sum(slab.shape[0] for slab in slabs))
        ids = []
        with torch.inference_mode(False):
            for slab in slabs:
                index = self._insert(slab)
                ids.append(self._slab_ids(index))
            taken = torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int64, device=self.device)
            self.references[taken] = references.to(device=self.device, dtype=torch.int32)
        self.live += int((references > 0).sum())
        self.shared = self.shared or bool((references > 1).any())
        self._slabs_changed()
        return taken.to(torch.int32)

    def trim(self, room: int | None = None) -> None:
        """Gives memory back: gathers live pages in as few slabs as they need, drops the others, shortens one.

        Args:
            room (`int`, *optional*): Most bytes of free pages to keep for what comes next; a small share of the live
                ones in any case.
        """
        keep = self.live // _GROWTH
        if room is not None:
            keep = min(keep, room // self.page_bytes)
        if self.live and self.pages - self.live <= keep:
            return
        sizes = [slab.shape[0] for slab in self.slabs]
        state = on_host(self.references.clamp(max=1).to(torch.int8))  # -1: no page, 0: free, 1: live
        live = self._live_per_slab(state)
        kept: dict[int, int] = {}  # slab: pages it keeps
        pages = 0
        # First slabs first: page ids, and so the reference counts, reach no further than the last slab kept.
        for index, size in enumerate(sizes):
            if pages >= self.live:
                break
            kept[index] = size
            pages += size
        for index in sorted(kept, key=lambda i: sizes[i]):
            if pages - sizes[index] >= self.live:
                pages -= kept.pop(index)
        spare = pages - self.live
        if kept and spare > keep:
            # Every slab left is larger than what is spare, or it would be gone.
            kept[min(kept, key=lambda i: live[i])] -= spare - keep
        cut = [i for i, size in enumerate(sizes) if size and kept.get(i, 0) < size]
        if not cut:
            return
        self._gather(state, {index: kept.get(index, 0) for index in cut})
        for index in cut:
            pages, first = kept.get(index, 0), index << self.slab_shift
            self.references[first + pages : first + sizes[index]] = -1
            with torch.inference_mode(False):
                shorter = self.new_slab(pages)
                self.slabs[index] = shorter.copy_(self.slabs[index][:pages])
        while self.slabs and not self.slabs[-1].shape[0]:
            self.slabs.pop()
        with torch.inference_mode(False):
            self.references = self.references[: self._ids()].clone()
        self._slabs_changed()

    def _gather(self, state: torch.Tensor, kept: Mapping[int, int]) -> None:
        """Moves live pages out of what will be cut off: all but the first `kept[slab]` pages of each named slab."""
        leaving = torch.zeros_like(state, dtype=torch.bool)
        for index, pages in kept.items():
            first = index << self.slab_shift
            leaving[first + pages : first + self.slabs[index].shape[0]] = True
        sources = torch.nonzero(leaving & (state > 0)).flatten()
        if not sources.numel():
            return
        targets = torch.nonzero(~leaving & (state == 0)).flatten()[: sources.numel()]
        for index in kept:
            chosen = (sources >> self.slab_shift) == index
            self.write(targets[chosen], self.read(sources[chosen]))
        moved = torch.arange(state.numel(), dtype=torch.int32)
        moved[sources] = targets.to(torch.int32)
        sources, targets, moved = (to_device(each, self.device) for each in (sources, targets, moved))
        self.references[targets] = self.references[sources]
        for owner in self._owners:
            owner.relocate(moved)

    def copy_pages(self, ids: torch.Tensor) -> torch.Tensor:
        """Makes private copies of pages.

        Args:
            ids (`torch.Tensor`): Page ids, `int32` `[n]`.

        Returns:
            `torch.Tensor`: Ids of the copies, `int32` `[n]`.

        Raises:
            CacheMemoryError: If there is no room for the copies.
        """
        copies = self.allocate(ids.numel())
        here, there = on_host(ids), on_host(copies)
        for index in torch.unique(here >> self.slab_shift).tolist():
            chosen = (here >> self.slab_shift) == index
            self.write(there[chosen], self.read(here[chosen]))
        return copies

    def _slab_ids(self, index: int) -> torch.Tensor:
        first = index << self.slab_shift
        return torch.arange(first, first + self.slabs[index].shape[0], device=self.device)

    def _ids(self) -> int:
        """Page ids in use or not, up to the last page of the last slab."""
        return ((len(self.slabs) - 1) << self.slab_shift) + self.slabs[-1].shape[0] if self.slabs else 0

    def _live_per_slab(self, state: torch.Tensor) -> list[int]:
        if not self.slabs:
            return []
        beyond = (len(self.slabs) << self.slab_shift) - state.numel()
        live: list[int] = (torch.nn.functional.pad(state, (0, beyond)).view(len(self.slabs), -1) > 0).sum(1).tolist()
        return live

    def _grow(self, missing: int) -> None:
        # Ahead by a fraction of what lives, so that a long decode does not allocate at every packing.
        pages = max(missing, min(self.live // _GROWTH, 1 << self.slab_shift))
        if self.max_bytes is not None and (self.pages + pages) * self.page_bytes > self.max_bytes:
            pages = missing
            self._check_limit(pages)
        with torch.inference_mode(False):
            while pages > 0:
                pages -= self._lengthen(pages) or self._add(pages)
        self._slabs_changed()

    def _check_limit(self, more: int) -> None:
        size = (self.pages + more) * self.page_bytes
        if self.max_bytes is not None and size > self.max_bytes:
            raise CacheMemoryError(
                f"The cache needs {format_bytes(size)} of pages, more than its max_bytes of "
                f"{format_bytes(self.max_bytes)}; raise max_bytes, lower the budget, or shorten the input."
            )

    def _insert(self, slab: torch.Tensor) -> int:
        """Puts a slab in the first free place; the references of its pages are still to be set."""
        index = next((i for i, old in enumerate(self.slabs) if not old.shape[0]), len(self.slabs))
        if index < len(self.slabs):
            self.slabs[index] = slab
        else:
            self.slabs.append(slab)
        self._cover_ids()
        return index

    def _cover_ids(self) -> None:
        absent = max(0, self._ids() - self.references.numel())
        self.references = torch.nn.functional.pad(self.references, (0, absent), value=-1)

    def _add(self, pages: int) -> int:
        """Adds a slab of at most that many pages, and returns how many it has."""
        count = min(pages, 1 << self.slab_shift)
        index = self._insert(self.new_slab(count))  # this replaces self.references, so it comes first
        self.references[self._slab_ids(index)] = 0
        return count

    def _lengthen(self, pages: int) -> int:
        """Copies a small last slab into a longer one, and returns how many pages it has more.

        Page ids count up to the end of a slab, so many short slabs would make long tables.
        """
        old = self.slabs[-1].shape[0] if self.slabs else 0
        added = min(pages, (1 << self.slab_shift) - old)
        if not old or old * self.page_bytes > _COPIED_BYTES or not added:
            return 0
        slab = self.new_slab(old + added)
        slab[:old] = self.slabs[-1]
        self.slabs[-1] = slab
        self._cover_ids()
        self.references[self._slab_ids(len(self.slabs) - 1)[old:]] = 0
        return added

    def new_slab(self, pages: int) -> torch.Tensor:
        """Memory for a slab, not yet part of the arena.

        Args:
            pages (`int`): Pages it holds, at most `2**slab_shift`.

        Returns:
            `torch.Tensor`: Zeros, `uint8` `[pages, page_bytes]`.
        """
        if self.device.type == "cpu" and pages:
            return page_memory(pages, self.page_bytes)
        return torch.zeros((pages, self.page_bytes), dtype=torch.uint8, device=self.device)

    def _slabs_changed(self) -> None:
        with torch.inference_mode(False):
            addresses = [slab.data_ptr() if slab.shape[0] else 0 for slab in self.slabs]
            self.slab_addresses = to_device(torch.tensor(addresses, dtype=torch.int64), self.device)
        for owner in self._owners:
            owner.slabs_changed()
