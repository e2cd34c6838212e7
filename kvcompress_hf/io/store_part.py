"""One store of a file: its tables and lengths checked against each other, then made into a `PagedStore`.

Work goes over blocks of rows, so that checking takes little memory besides the tensors themselves.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from kvcompress_hf import kernels
from kvcompress_hf.io.container import StoredFile
from kvcompress_hf.io.form import BLOCK, live_entries, most_capacity
from kvcompress_hf.io.header import Header
from kvcompress_hf.paging import stored_rows
from kvcompress_hf.paging.arena import Arena
from kvcompress_hf.paging.evicted import EVICTED_MEANS
from kvcompress_hf.paging.key_centring import KEY_SHIFT
from kvcompress_hf.paging.key_feedback import KEY_FEEDBACK
from kvcompress_hf.paging.means import MEANS
from kvcompress_hf.paging.queries import QUERIES
from kvcompress_hf.paging.sequence_tensors import of_layers, shape_of
from kvcompress_hf.paging.store import Geometry, PagedStore
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.runtime.attention import AttentionState, layout_for

__all__ = ["StorePart", "check_stores"]

_ALIGNMENT = 64  # of a slab's first byte: vector loads never straddle a cache line
_ENTRIES = 2**17  # of tables and lengths that are worked on at a time
_SPARE_TAIL = 24 * 2**20  # bytes of all tails of a file that are allocated for tokens to come
_CPU = torch.device("cpu")
_MEANS = [each.name for each in MEANS]
_EVICTED = [each.name for each in EVICTED_MEANS]


class StorePart:
    """One store of a file: every tensor of it read and checked, except the pages, which are only located.

    Args:
        file (`StoredFile`): The file.
        header (`Header`): Its description.
        index (`int`): Which store.
        recipe (`Recipe`): The recipe of the cache.
        state (`AttentionState`): What the cache knows besides its stores.

    Raises:
        CacheFormatError: If something is missing, out of range, or contradicts something else.
    """

    def __init__(self, file: StoredFile, header: Header, index: int, recipe: Recipe, state: AttentionState) -> None:
        self._file = file
        self._name = f"store.{index}"
        self.geometry = header.geometry(index)
        values = header.store(index, len(recipe.tiers), most_capacity(max(state.tail_used), recipe.when.every))
        if recipe.page_bytes not in (None, values.page_bytes):
            raise file.error(f"pages of {values.page_bytes} bytes, where the recipe makes {recipe.page_bytes}")
        try:
            self.layout = layout_for([recipe], self.geometry, values.page_bytes)
        except ValueError as error:
            raise file.error(f"there are no such pages ({error})") from error
        tiers = self.layout.tiers
        self.layers, counts, self._evicted, self.order = values.layers, values.pages, values.evicted, values.order
        self._rotates_values = values.rotates_values
        if values.rotates_values and not recipe.rotates_values:
            raise file.error("rotated values, where the recipe keeps them as they are")
        self.pages = file.expect(f"{self._name}.pages", torch.uint8, (sum(counts), values.page_bytes))
        self._batch, self._capacity = state.batch, values.tail_capacity
        self._spare = _SPARE_TAIL // len(header.stores)
        self._starts = [sum(counts[:tier]) for tier in range(len(tiers) + 1)]
        self._declared = {each.name: each for each in stored_rows.declare(self.layout, _CPU)}
        heads, dim = self.geometry.kv_heads, self.geometry.head_dim
        self._sizes = dict(layers=len(self.layers), batch=state.batch, kv_heads=heads, head_dim=dim)
        self._sizes |= dict(tiers=len(tiers), fields=len(self.layout.fields))
        newest = 0 if recipe.observer is None else recipe.observer.newest_queries
        self._sizes |= dict(group=state.groups[self.layers[0]], newest=newest)
        self._tensors = self._read(recipe, state)
        self._check_tail(state)
        self._check_lengths(state)
        self._references = torch.cat([self._check_table(tier) for tier in range(len(tiers))])

    def _read(self, recipe: Recipe, state: AttentionState) -> dict[str, torch.Tensor]:
        used = max(state.tail_used[layer] for layer in self.layers)
        present = {name for name in self._file.entries if name.startswith(f"{self._name}.")}
        tail = used > 0 or f"{self._name}.tail_keys" in present
        # What else a file may lack is only taken where the recipe has a use for it.
        optional = {name: recipe.observer is not None and bool(recipe.observer.describes) for name in _MEANS}
        optional[KEY_SHIFT.name] = recipe.centres_keys
        optional[KEY_FEEDBACK.name] = recipe.feeds_back
        optional |= dict.fromkeys(_EVICTED, recipe.keeps_mean and not self.geometry.windowed)
        optional |= _queries_of(recipe)
        shapes: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {}
        for name, each in self._declared.items():
            wanted = tail if "slots" in each.dims else each.always or f"{self._name}.{name}" in present
            if wanted and each.saved and optional.get(name, True):
                shape = zip(each.dims, shape_of(each, {**self._sizes, "slots": used}), strict=True)
                dims = tuple(None if dim == "columns" else size for dim, size in shape)
                shapes[name] = each.dtype or self.geometry.dtype, dims
        for name, what in shapes.items():  # nothing is read before all of it is known to fit
            self._file.expect(f"{self._name}.{name}", *what)
        unknown = present - {f"{self._name}.{name}" for name in (*shapes, "pages")}
        if unknown:
            raise self._file.error(f"tensors that do not belong there: {', '.join(sorted(unknown))}")
        return {name: self._file.read(f"{self._name}.{name}", *what) for name, what in shapes.items()}

    def _check_tail(self, state: AttentionState) -> None:
        tail = self._tensors["tail_lengths"]
        most = torch.tensor([state.tail_used[layer] for layer in self.layers])
        if bool((tail < 0).any()):
            raise self._file.error("negative lengths of a tail")
        if bool((tail > most[:, None]).any()):
            raise self._file.error("a tail is longer than the memory for it")
        if "tail_positions" in self._tensors:
            positions = self._tensors["tail_positions"]
            used = torch.arange(positions.shape[-1]) < tail[..., None]
            if bool((used & ((positions < 0) | (positions >= state.seen))).any()):
                raise self._file.error(f"positions in the tail beyond the {state.seen} tokens seen")

    def _check_lengths(self, state: AttentionState) -> None:
        tails = self._tensors["tail_lengths"].flatten()
        evicted = self._check_evicted()
        for first, lengths in _blocks(self._tensors["lengths"].T, len(self.layout.tiers)):
            if bool((lengths < 0).any()):
                raise self._file.error("negative lengths")
            row = torch.arange(first, first + lengths.shape[0])
            slots = lengths.long().sum(1) + tails[row // self.geometry.kv_heads]
            if evicted is not None and bool((slots + evicted[row] > state.seen).any()):
                raise self._file.error(f"more slots kept and evicted in a row than the {state.seen} tokens seen")
            if bool((slots > state.seen).any()):
                raise self._file.error(f"{int(slots.max())} slots in a row, more than the {state.seen} tokens seen")

    def _check_evicted(self) -> torch.Tensor | None:
        """How many slots were evicted from each row, `int32` `[rows]`, where means of them are there."""
        missing = [name for name in _EVICTED if name not in self._tensors]
        if len(missing) == len(_EVICTED):
            return None
        if missing:
            raise self._file.error(f"means of evicted slots without {missing[0]}")
        counts = self._tensors["evicted_counts"].flatten()
        if bool((counts < 0).any()):
            raise self._file.error("negative numbers of evicted slots")
        if not self._evicted and bool(counts.any()):
            raise self._file.error("means of evicted slots in a store that says nothing was")
        return counts

    def _check_table(self, tier: int) -> torch.Tensor:
        """Checks a table, and counts how often each page of the tier is mentioned: `int32` `[pages]`."""
        table, lengths = self._tensors[f"table.{tier}"], self._tensors["lengths"][tier]
        columns, heads = table.shape[1], self.geometry.kv_heads
        slots = self.layout.tiers[tier].slots
        start, count = self._starts[tier], self._starts[tier + 1] - self._starts[tier]
        if columns > count:
            raise self._file.error(f"a table of {columns} columns for {count} pages")
        references = torch.zeros(count, dtype=torch.int32)
        # Sequences may share a page, but only at the same place of the same layer and head.
        rows = torch.arange(table.shape[0])
        place_of_row = (rows // (self._batch * heads) * heads + rows % heads) * columns
        place_of, column = torch.full((count,), -1), torch.arange(columns)
        for first, entries in _blocks(table, columns):
            filled = lengths[first : first + entries.shape[0]]
            if int(filled.max()) > columns * slots:
                raise self._file.error(f"{int(filled.max())} slots in a row whose table names {columns} pages")
            live = live_entries(filled, slots, columns)
            place = place_of_row[first : first + entries.shape[0], None] + column
            if bool(live.all()):
                pages, place = entries.flatten().long(), place.flatten()
            else:
                pages, place = entries[live].long(), place[live]
                entries.masked_fill_(~live, 0)
            pages -= start
            if pages.numel() and not 0 <= int(pages.min()) <= int(pages.max()) < count:
                raise self._file.error(f"page numbers outside {start} to {start + count - 1}, where the tier's lie")
            references.index_add_(0, pages, torch.ones_like(pages, dtype=torch.int32))
            before = place_of[pages]
            place_of[pages] = place
            if bool(((before >= 0) & (before != place)).any()) or not torch.equal(place_of[pages], place):
                raise self._file.error("a page in two different places")
        if bool((references == 0).any()):
            raise self._file.error("pages that no table names")
        return references

    def fits_in_place(self, device: torch.device) -> bool:
        """Whether the pages can be used where they are in the file.

        Args:
            device (`torch.device`): Where they are needed.

        Returns:
            `bool`: True on the CPU, if they are in its order and aligned.
        """
        own_order = self.order == kernels.get_backend(device).page_order
        return device.type == "cpu" and own_order and self.pages.start % _ALIGNMENT == 0

    def make_store(self, device: torch.device, arena: Arena, layers: Sequence[int]) -> PagedStore:
        """Makes the store of some of the layers, on the device where they run.

        Args:
            device (`torch.device`): The device.
            arena (`Arena`): Its arena for pages of this size.
            layers (`Sequence[int]`): Indices into `self.layers`.

        Returns:
            `PagedStore`: The filled store.
        """
        backend = kernels.get_backend(device)
        old = self.geometry
        geometry = Geometry(device, old.dtype, old.kv_heads, old.head_dim, old.windowed)
        whole = list(layers) == list(range(len(self.layers)))
        tensors = self._tensors if whole else self._of_layers(layers)
        wanted = torch.arange(self.pages.shape[0]) if whole else self._named(tensors)
        limit = 1 << arena.slab_shift
        sizes = [min(limit, wanted.numel() - i) for i in range(0, wanted.numel(), limit)]
        if whole and self.fits_in_place(device):
            slabs = [self._file.view(self.pages, i * limit, size) for i, size in enumerate(sizes)]
        else:
            slabs = [arena.new_slab(size) for size in sizes]
            for slab, numbers in zip(slabs, wanted.split(sizes) if sizes else (), strict=True):
                self._fill(slab, numbers, backend)
        ids = arena.adopt(slabs, self._references if whole else self._references_of(tensors)[wanted])
        # From page numbers of the file to ids of the arena; mostly they are the same.
        new_id = torch.zeros(self.pages.shape[0], dtype=torch.int32)
        new_id[wanted] = ids.cpu()
        same = torch.equal(new_id, torch.arange(new_id.numel(), dtype=torch.int32))
        for tier in range(0 if same else len(self.layout.tiers)):
            for entries, live in self._live_blocks(tensors, tier):
                entries[live] = new_id[entries[live].long()]
        made_of = (self.layout, arena, backend, self._rotates_values)
        store = PagedStore(geometry, len(layers), self._batch, *made_of)
        store.load_state({name: tensor.to(device) for name, tensor in tensors.items()}, self._evicted)
        # Sums over a tail round by its capacity, so to go on with the same bits it must be what it was. But nothing in
        # the file answers for more than is used, so a large tail gets its room when the next token arrives.
        slot = 2 * geometry.head_dim * geometry.dtype.itemsize + 4 * len(self.layout.fields)
        if 0 < self._capacity * store.rows_per_layer * store.layers * slot <= self._spare:
            store.reserve_tail(self._capacity)
        return store

    def _of_layers(self, layers: Sequence[int]) -> dict[str, torch.Tensor]:
        """The tensors of some layers."""
        chosen = torch.tensor(list(layers))
        return {
            name: of_layers(self._declared[name], tensor, chosen, self._sizes) for name, tensor in self._tensors.items()
        }

    def _live_blocks(
        self, tensors: Mapping[str, torch.Tensor], tier: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The entries of a table, some rows at a time, and which of them have a page."""
        table, lengths = tensors[f"table.{tier}"], tensors["lengths"][tier]
        for first, entries in _blocks(table, table.shape[1]):
            filled = lengths[first : first + entries.shape[0]]
            yield entries, live_entries(filled, self.layout.tiers[tier].slots, table.shape[1])

    def _named(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The numbers of the pages that tables name, ascending."""
        return torch.nonzero(self._references_of(tensors)).flatten()

    def _references_of(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        counts = torch.zeros_like(self._references)
        for tier in range(len(self.layout.tiers)):
            for entries, live in self._live_blocks(tensors, tier):
                named = entries[live].long()
                counts.index_add_(0, named, torch.ones_like(named, dtype=torch.int32))
        return counts

    def _fill(self, slab: torch.Tensor, numbers: torch.Tensor, backend: kernels.Backend) -> None:
        """Copies pages out of the file into a slab, in the backend's order."""
        step = max(1, BLOCK // self.layout.page_bytes)
        # The CPU's backend knows both orders that a file can have.
        reader = kernels.get_backend(_CPU)
        for tier in range(len(self.layout.tiers)):
            inside = (numbers >= self._starts[tier]) & (numbers < self._starts[tier + 1])
            for place in torch.nonzero(inside).flatten().split(step):
                pages = self._file.rows(self.pages, numbers[place])
                if self.order != backend.page_order:
                    pages = pages if self.order == "canonical" else reader.to_canonical(self.layout, tier, pages)
                    pages = backend.from_canonical(self.layout, tier, pages.to(slab.device))
                slab[place.to(slab.device)] = pages.to(slab.device)


def _queries_of(recipe: Recipe) -> dict[str, bool]:
    """Which tensors of remembered queries a recipe has a use for."""
    observer = recipe.observer
    centres, newest = (False, 0) if observer is None else (observer.learns_centres, observer.newest_queries)
    wanted = {"queries_seen": centres or newest > 0, "newest_queries": newest > 0}
    return {each.name: wanted.get(each.name, centres) for each in QUERIES}


def _blocks(rows: torch.Tensor, entries_per_row: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Some rows at a time, each block with the number of its first row."""
    step = max(1, _ENTRIES // max(1, entries_per_row))
    for first in range(0, rows.shape[0], step):
        yield first, rows[first : first + step]


def check_stores(
    file: StoredFile, parts: Sequence[StorePart], windows: Sequence[int | None], state: AttentionState
) -> None:
    """Checks what concerns several stores."""
    layers = [layer for part in parts for layer in part.layers]
    if len(set(layers)) != len(layers):
        raise file.error("a layer in two stores")
    for part in parts:
        if any((windows[layer] is not None) != part.geometry.windowed for layer in part.layers):
            raise file.error(f"layers {part.layers} do not all attend alike")
    if len({part.geometry for part in parts}) != len(parts):
        raise file.error("two stores of the same shape")
    if any(used and layer not in layers for layer, used in enumerate(state.tail_used)):
        raise file.error("a tail of a layer that is in no store")
    heads = sum(part.geometry.kv_heads * len(part.layers) for part in parts)
    if state.distortion is not None and state.distortion.shape[1] != heads:
        raise file.error(f"measured losses of {state.distortion.shape[1]} heads, where there are {heads}")
