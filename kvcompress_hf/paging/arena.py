"""The page pool of one device: slabs of equal pages and a reference count per page, shared by the forks of a cache.

Forks may run in threads of their own, so three rules hold. What changes slabs, references or page tables happens under
`Arena.lock`, as a whole ([`changes_pages`]): if it breaks off, references are counted anew from what owners hold, and
pages that nobody holds are free again. Whoever lets a kernel read pages without that lock holds the lock that
[`Arena.register`] gave it; pages move and slabs go only while none of those is held. Finalizers, which may run in the
middle of anything, take no lock: they leave word ([`Arena.abandon`]), and the next change acts on it.
"""

import contextlib
import functools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from kvcompress_hf.errors import CacheMemoryError
from kvcompress_hf.kernels.memory import page_memory
from kvcompress_hf.paging.waiting import on_host, to_device
from kvcompress_hf.units import format_bytes

_SLAB_BYTES = 4 * 2**20  # an empty slab goes back to the allocator, so smaller slabs give memory back sooner
_COPIED_BYTES = 2**20  # a slab up to this size grows in place of a further one
_SLACK = 8  # once more than 1/8 of the live pages are free when a fork goes, memory is given back at once
_GROWTH = 32  # a growing arena allocates 1/32 of its live pages ahead at most
_PATIENCE = 0.005  # seconds that giving memory back waits for the kernels of other threads; else it is put off

_Method = TypeVar("_Method", bound=Callable[..., Any])


class PageOwner(Protocol):
    """Whoever keeps page ids: told when pages are relocated and when slabs come or go."""

    def relocate(self, new_id: torch.Tensor) -> None:
        """Replaces every page id `i` it holds by `new_id[i]` (`int32` `[page ids]`)."""

    def slabs_changed(self) -> None:
        """Forgets what it derived from slab addresses."""

    def live_ids(self) -> torch.Tensor:
        """The page ids it holds, `int32` `[n]`, one per reference."""


@dataclass(frozen=True)
class Slabs:
    """The memory of an arena at one moment.

    Args:
        slabs (`list[torch.Tensor]`): Each `uint8` `[pages, page_bytes]`; one given back has no pages.
        addresses (`torch.Tensor`): Of their first bytes, `int64` `[slabs]`, on the arena's device.
        sizes (`torch.Tensor`): Pages of each, `int32` `[slabs]`, on the host.
    """

    slabs: list[torch.Tensor]
    addresses: torch.Tensor
    sizes: torch.Tensor

    @classmethod
    def of(cls, slabs: Sequence[torch.Tensor], device: torch.device) -> "Slabs":
        """The slabs with their addresses and sizes."""
        addresses = torch.tensor([slab.data_ptr() if slab.shape[0] else 0 for slab in slabs], dtype=torch.int64)
        sizes = torch.tensor([slab.shape[0] for slab in slabs], dtype=torch.int32)
        return cls(list(slabs), to_device(addresses, device), sizes)


def changes_pages(method: _Method) -> _Method:
    """For methods of an arena, or of an owner with an `arena`, that change references, page tables or slabs.

    They run one at a time. When the outermost of them raises, references are counted anew, so it must leave the tables
    and lengths of its owner in a state that says what is held.
    """

    @functools.wraps(method)
    def whole(self: Any, *args: Any, **kwargs: Any) -> Any:
        arena: Arena = self if isinstance(self, Arena) else self.arena
        with arena.lock:
            if arena.section.locked():  # called by another such method of this thread
                return method(self, *args, **kwargs)
            with arena.section:
                arena.begin_change()
                try:
                    result = method(self, *args, **kwargs)
                except BaseException:
                    arena.recount()
                    raise
                arena.broken = False
                return result

    return whole  # type: ignore[return-value]


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
        with torch.inference_mode(False):
            self.pool = Slabs.of((), device)  # replaced as a whole, so that a reader never sees half a change
            # References per page id; -1 where the id has no page behind it.
            self.references = torch.zeros(0, dtype=torch.int32, device=device)
        self.shared = False  # whether any page may have more than one reference
        self.lock = threading.RLock()
        self.section = threading.Lock()  # taken inside `lock` by the outermost of nested changes
        self.broken = False  # a change has begun and not ended
        self._live = 0  # pages with at least one reference
        self._owners: dict[int, tuple[weakref.ref[PageOwner], Any]] = {}  # and a `threading.RLock`
        self._abandoned: deque[PageOwner] = deque()
        self._lost: deque[weakref.ref[PageOwner]] = deque()  # owners that are gone without a word

    def register(self, owner: PageOwner) -> Any:
        """Adds an owner of pages, held weakly.

        Args:
            owner (`PageOwner`): Called back on relocation and on slab changes.

        Returns:
            `threading.RLock`: To be held while kernels read the owner's pages outside of a change. Who holds it must
            not begin a change.
        """
        with self.lock:
            reading = threading.RLock()
            self._owners[id(owner)] = weakref.ref(owner, self._lost.append), reading
            return reading

    def unregister(self, owner: PageOwner) -> None:
        """Forgets an owner that holds no pages any more.

        Args:
            owner (`PageOwner`): The owner.
        """
        self._owners.pop(id(owner), None)

    def abandon(self, owner: PageOwner) -> None:
        """Leaves word that an owner is gone, so that the next change releases its pages; for finalizers.

        Args:
            owner (`PageOwner`): An owner that nobody uses any more; kept until then.
        """
        self._abandoned.append(owner)
        if self.lock.acquire(blocking=False):  # mostly; a finalizer must not wait
            try:
                if not self.section.locked():  # else this thread is in the middle of a change
                    self._settle()
                    # Those who are left may be parked, and take no step by themselves. Not while this thread reads.
                    reads = any(reading._is_owned() for _, reading in list(self._owners.values()))
                    if not reads and self.pages - self._live > self._live // _SLACK:
                        self.trim(patience=0.0)
            finally:
                self.lock.release()

    def forget_abandoned(self) -> None:
        """Drops what finalizers have left; for the last owner of all, which takes the pages with it."""
        self._abandoned.clear()

    def _alive(self) -> list[PageOwner]:
        owners = (ref() for ref, _ in list(self._owners.values()))
        return [owner for owner in owners if owner is not None]

    def begin_change(self) -> None:
        """Puts right what an interrupted change and finalizers have left; see [`changes_pages`]."""
        if self.broken or self._lost:
            self.recount()
        self.broken = True
        while self._abandoned:
            owner = self._abandoned[0]
            known = self._owners.get(id(owner))
            # The garbage collector clears references before it finalises: such an owner has been, or will be, lost.
            if known is not None and known[0]() is owner:
                self.release(owner.live_ids())
                self.unregister(owner)
            self._abandoned.popleft()

    def recount(self) -> None:
        """Counts references from what owners hold, after a change broke off."""
        while self._abandoned:
            self.unregister(self._abandoned.popleft())
        lost = len(self._lost)
        for key, (ref, _) in list(self._owners.items()):
            if ref() is None:
                self._owners.pop(key, None)
        with torch.inference_mode(False):
            counts = torch.zeros_like(self.references)
            for owner in self._alive():
                ids = owner.live_ids()
                counts.index_add_(0, ids, torch.ones_like(ids))
            counts[self.references < 0] = -1
        self.references, self._live = counts, int((counts > 0).sum())
        self.shared = bool((counts > 1).any())
        for _ in range(lost):
            self._lost.popleft()
        self.broken = False

    def has_other_owners(self, mine: Container[int]) -> bool:
        """Whether anyone else takes pages from here.

        Args:
            mine (`Container[int]`): `id()` of the owners that do not count.

        Returns:
            `bool`: True if there is another owner alive.
        """
        gone = {id(owner) for owner in list(self._abandoned)}
        alive = [key for key, (ref, _) in list(self._owners.items()) if ref() is not None]
        return any(owner not in mine and owner not in gone for owner in alive)

    @property
    def slabs(self) -> list[torch.Tensor]:
        """`list[torch.Tensor]`: `uint8` `[pages, page_bytes]` each, not to be changed; one given back has no pages."""
        return self.pool.slabs

    @property
    def slab_addresses(self) -> torch.Tensor:
        """`torch.Tensor`: `int64` `[slabs]`, the address of each slab's first byte."""
        return self.pool.addresses

    @property
    def live(self) -> int:
        """`int`: Pages with at least one reference."""
        if self._abandoned or self._lost:
            self._settle()
        return self._live

    @property
    def pages(self) -> int:
        """`int`: Pages allocated, live or free."""
        return sum(slab.shape[0] for slab in self.pool.slabs)

    @property
    def nbytes(self) -> int:
        """`int`: Bytes allocated for slabs."""
        return self.pages * self.page_bytes

    @property
    def table_bytes(self) -> int:
        """`int`: Bytes of reference counts and of what is known of slabs."""
        return self.references.nbytes + self.pool.addresses.nbytes + self.pool.sizes.nbytes

    @changes_pages
    def _settle(self) -> None:
        """Releases what finalizers have left."""

    def allocate(self, count: int) -> torch.Tensor:
        """Takes pages, those with the lowest ids first, so that live pages stay together.

        Args:
            count (`int`): Number of pages.

        Returns:
            `torch.Tensor`: Page ids, `int32` `[count]`, each with one reference; on the CPU the pages are zeros.

        Raises:
            CacheMemoryError: If the arena would grow beyond `max_bytes`; nothing has changed then.
        """
        with self.lock:
            missing = count - (self.pages - self._live)
            if missing > 0:
                self._grow(missing)
            # By a prefix sum, because the device need not be asked how many are free.
            free = (self.references == 0).cumsum(0, dtype=torch.int32)
            ids = torch.searchsorted(
                free, torch.arange(1, count + 1, dtype=torch.int32, device=free.device), out_int32=True
            )
            if self.device.type == "cpu":
                # A file of this cache must not hold, in the unused ends of its pages, what others had stored there. A
                # GPU would have to be asked which slabs these are.
                inner = (ids & ((1 << self.slab_shift) - 1)).long()
                for index in torch.unique(ids >> self.slab_shift).tolist():
                    words = self.slabs[index].view(torch.int64)  # an eighth of the work that bytes are
                    words[inner[(ids >> self.slab_shift) == index]] = 0
            self.references[ids] = 1
            self._live += count
            return ids

    def retain(self, ids: torch.Tensor) -> None:
        """Adds one reference per occurrence of a page.

        Args:
            ids (`torch.Tensor`): Page ids, `int32` `[n]`, with repeats.
        """
        if ids.numel():
            with self.lock:
                self.references.index_add_(0, ids, torch.ones_like(ids))
                self.shared = True

    def release(self, ids: torch.Tensor) -> None:
        """Drops one reference per occurrence of a page; a page without references is free.

        Args:
            ids (`torch.Tensor`): Page ids, `int32` `[n]`, with repeats.
        """
        if not ids.numel():
            return
        with self.lock:
            held = self.references > 0 if self.shared else None
            self.references.index_add_(0, ids, torch.full_like(ids, -1))
            self._live -= ids.numel() if held is None else int((held & (self.references == 0)).sum())

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Copies the bytes of pages.

        Args:
            ids (`torch.Tensor`): Page ids, `int32` `[n]`.

        Returns:
            `torch.Tensor`: The bytes of each page, `uint8` `[n, page_bytes]`.
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
        with self.lock, torch.inference_mode(False):
            self._check_limit(sum(slab.shape[0] for slab in slabs))
            mine, counts = list(self.slabs), self.references
            ids = [torch.zeros(0, dtype=torch.int64, device=self.device)]
            for slab in slabs:
                counts = self._insert(mine, counts, slab)
                ids.append(self._slab_ids(mine, _place_of(mine, slab)))
            taken = torch.cat(ids)
            counts = counts.clone()
            counts[taken] = references.to(device=self.device, dtype=torch.int32)
            self._commit(mine, counts)
            self._live += int((references > 0).sum())
            self.shared = self.shared or bool((references > 1).any())
        return taken.to(torch.int32)

    @changes_pages
    def trim(self, room: int | None = None, patience: float = _PATIENCE) -> None:
        """Gives memory back: gathers live pages in as few slabs as they need, drops the others, shortens one.

        Args:
            room (`int`, *optional*): Most bytes of free pages to keep for what comes next; a small share of the live
                ones in any case.
            patience (`float`): Seconds to wait for kernels of other threads that read pages.
        """
        keep = self._live // _GROWTH
        if room is not None:
            keep = min(keep, room // self.page_bytes)
        if self._live and self.pages - self._live <= keep:
            return
        state = on_host(self.references.clamp(max=1).to(torch.int8))  # -1: no page, 0: free, 1: live
        cut = self._cut(state, keep)
        if not cut:
            return
        with self._standstill(patience) as still:
            if not still:  # other threads read pages, and this can wait until the next packing
                return
            try:
                with torch.inference_mode(False):
                    self._cut_off(state, cut)
            except (MemoryError, torch.OutOfMemoryError):
                # A shorter slab is made before the longer one goes. Pages that have moved already are where owners say.
                self.recount()

    def _cut(self, state: torch.Tensor, keep: int) -> dict[int, int]:
        """Which slabs are to be shortened, and how many pages each is left with, so that `keep` free pages stay."""
        sizes = [slab.shape[0] for slab in self.slabs]
        live = self._live_per_slab(state)
        kept: dict[int, int] = {}  # slab: pages it keeps
        pages = 0
        # First slabs first: page ids, and so the reference counts, reach no further than the last slab kept.
        for index, size in enumerate(sizes):
            if pages >= self._live:
                break
            kept[index] = size
            pages += size
        for index in sorted(kept, key=lambda i: sizes[i]):
            if pages - sizes[index] >= self._live:
                pages -= kept.pop(index)
        spare = pages - self._live
        if kept and spare > keep:
            # Every slab left is larger than what is spare, or it would be gone.
            kept[min(kept, key=lambda i: live[i])] -= spare - keep
        return {i: kept.get(i, 0) for i, size in enumerate(sizes) if size and kept.get(i, 0) < size}

    def _cut_off(self, state: torch.Tensor, cut: Mapping[int, int]) -> None:
        """Shortens slabs. Everything that may fail comes before anything is given up."""
        slabs, shorter = list(self.slabs), {index: self.new_slab(pages) for index, pages in cut.items()}
        references = self._gather(state, cut)
        for index, slab in shorter.items():
            first = index << self.slab_shift
            references[first + slab.shape[0] : first + slabs[index].shape[0]] = -1
            slabs[index] = slab.copy_(slabs[index][: slab.shape[0]])
        while slabs and not slabs[-1].shape[0]:
            slabs.pop()
        self._commit(slabs, references[: self._ids(slabs)].clone())

    @contextlib.contextmanager
    def _standstill(self, patience: float) -> Iterator[bool]:
        """Whether no other thread's kernel reads pages; none begins to while this lasts."""
        until = time.monotonic() + patience
        with contextlib.ExitStack() as held:
            for _, reading in list(self._owners.values()):
                if not reading.acquire(timeout=max(0.0, until - time.monotonic())):
                    yield False
                    return
                held.callback(reading.release)
            yield True

    def _gather(self, state: torch.Tensor, kept: Mapping[int, int]) -> torch.Tensor:
        """Moves live pages out of what will be cut off: all but the first `kept[slab]` pages of each named slab.

        Pages are copied, then owners are told. Until the slabs are cut both copies are there, so it may break off
        anywhere.

        Returns:
            `torch.Tensor`: The references as they are to be, `int32` `[page ids]`.
        """
        leaving = torch.zeros_like(state, dtype=torch.bool)
        for index, pages in kept.items():
            first = index << self.slab_shift
            leaving[first + pages : first + self.slabs[index].shape[0]] = True
        references = self.references.clone()
        sources = torch.nonzero(leaving & (state > 0)).flatten()
        if not sources.numel():
            return references
        targets = torch.nonzero(~leaving & (state == 0)).flatten()[: sources.numel()]
        for index in kept:
            chosen = (sources >> self.slab_shift) == index
            self.write(targets[chosen], self.read(sources[chosen]))
        moved = torch.arange(state.numel(), dtype=torch.int32)
        moved[sources] = targets.to(torch.int32)
        sources, targets, moved = (to_device(each, self.device) for each in (sources, targets, moved))
        references[targets] = references[sources]
        for owner in self._alive():
            owner.relocate(moved)
        return references

    def copy_pages(self, ids: torch.Tensor) -> torch.Tensor:
        """Makes private copies of pages.

        Args:
            ids (`torch.Tensor`): Page ids, `int32` `[n]`.

        Returns:
            `torch.Tensor`: Ids of the copies, `int32` `[n]`.

        Raises:
            CacheMemoryError: If there is no room for the copies.
        """
        with self.lock:
            copies = self.allocate(ids.numel())
            try:
                here, there = on_host(ids), on_host(copies)
                for index in torch.unique(here >> self.slab_shift).tolist():
                    chosen = (here >> self.slab_shift) == index
                    self.write(there[chosen], self.read(here[chosen]))
            except BaseException:
                self.release(copies)
                raise
            return copies

    def _slab_ids(self, slabs: Sequence[torch.Tensor], index: int) -> torch.Tensor:
        first = index << self.slab_shift
        return torch.arange(first, first + slabs[index].shape[0], device=self.device)

    def _ids(self, slabs: Sequence[torch.Tensor]) -> int:
        """Page ids in use or not, up to the last page of the last slab."""
        return ((len(slabs) - 1) << self.slab_shift) + slabs[-1].shape[0] if slabs else 0

    def _live_per_slab(self, state: torch.Tensor) -> list[int]:
        if not self.slabs:
            return []
        beyond = (len(self.slabs) << self.slab_shift) - state.numel()
        live: list[int] = (torch.nn.functional.pad(state, (0, beyond)).view(len(self.slabs), -1) > 0).sum(1).tolist()
        return live

    def _grow(self, missing: int) -> None:
        # Ahead by a fraction of what lives, so that a long decode does not allocate at every packing.
        pages = max(missing, min(self._live // _GROWTH, 1 << self.slab_shift))
        if self.max_bytes is not None and (self.pages + pages) * self.page_bytes > self.max_bytes:
            pages = missing
            self._check_limit(pages)
        with torch.inference_mode(False), self._standstill(0.0) as still:
            slabs, references = list(self.slabs), self.references
            if still and self._may_lengthen(slabs):
                added = min(pages, (1 << self.slab_shift) - slabs[-1].shape[0])
                references = self._lengthen(slabs, references, added)
                pages -= added
            while pages > 0:
                slab = self.new_slab(min(pages, 1 << self.slab_shift))
                references = self._insert(slabs, references, slab).clone()
                references[self._slab_ids(slabs, _place_of(slabs, slab))] = 0
                pages -= slab.shape[0]
            self._commit(slabs, references)

    def _check_limit(self, more: int) -> None:
        size = (self.pages + more) * self.page_bytes
        if self.max_bytes is not None and size > self.max_bytes:
            raise CacheMemoryError(
                f"The cache needs {format_bytes(size)} of pages, more than its max_bytes of "
                f"{format_bytes(self.max_bytes)}; raise max_bytes, lower the budget, or shorten the input."
            )

    def _insert(self, slabs: list[torch.Tensor], references: torch.Tensor, slab: torch.Tensor) -> torch.Tensor:
        """Puts a slab in the first free place, and returns the references with room for its pages."""
        index = next((i for i, old in enumerate(slabs) if not old.shape[0]), len(slabs))
        slabs[index : index + 1] = [slab]
        return self._cover(slabs, references)

    def _cover(self, slabs: Sequence[torch.Tensor], references: torch.Tensor) -> torch.Tensor:
        absent = max(0, self._ids(slabs) - references.numel())
        return torch.nn.functional.pad(references, (0, absent), value=-1)

    def _may_lengthen(self, slabs: Sequence[torch.Tensor]) -> bool:
        """Whether the last slab is so small that it is rather copied than followed by another.

        Page ids count up to the end of a slab, so many short slabs would make long tables.
        """
        old = slabs[-1].shape[0] if slabs else 0
        return 0 < old < 1 << self.slab_shift and old * self.page_bytes <= _COPIED_BYTES

    def _lengthen(self, slabs: list[torch.Tensor], references: torch.Tensor, added: int) -> torch.Tensor:
        """Copies the last slab into a longer one, and returns the references with room for its pages."""
        old = slabs[-1].shape[0]
        slab = self.new_slab(old + added)
        slab[:old] = slabs[-1]
        slabs[-1] = slab
        references = self._cover(slabs, references).clone()
        references[self._slab_ids(slabs, len(slabs) - 1)[old:]] = 0
        return references

    def _commit(self, slabs: Sequence[torch.Tensor], references: torch.Tensor) -> None:
        """Takes over slabs and the references to their pages; what may fail has been done before."""
        pool, owners = Slabs.of(slabs, self.device), self._alive()
        self.pool, self.references = pool, references
        for owner in owners:
            owner.slabs_changed()

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


def _place_of(slabs: Sequence[torch.Tensor], slab: torch.Tensor) -> int:
    return next(i for i, each in enumerate(slabs) if each is slab)
