"""What a cache file holds: written from a cache, and checked piece by piece before a cache is made of it.

Pages lie in the file as they lie in memory: codes, scales and slot fields, in the order of the backend that wrote them
or in the canonical one (`kernels/include/page_layout.h`), tier by tier. Tables hold page numbers of the file, so a
page that several sequences share is there once. Nothing in the file is trusted: sizes, counts, lengths and page
numbers are compared with each other and with what the recipe implies before any of them is used.
"""

import json
import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

import torch

from kvcompress_hf import kernels
from kvcompress_hf.errors import CacheFormatError
from kvcompress_hf.io.container import DTYPES, Entry, Mapped, Section, tensor_bytes, write
from kvcompress_hf.io.identity import ModelIdentity
from kvcompress_hf.paging.arena import Arena
from kvcompress_hf.paging.store import Geometry, PagedStore
from kvcompress_hf.presets import resolve_rows
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.runtime.attention import AttentionState, PagedAttention, layout_for
from kvcompress_hf.units import parse_bytes

__all__ = ["FORMAT", "FORMAT_VERSION", "LoadedCache", "UnreadPages", "load_cache", "save_cache"]

FORMAT = "kvcompress_hf.cache"
FORMAT_VERSION = 1
_ORDERS = ("canonical", "cpu")  # inner orders of pages that may be in a file
_BLOCK = 8 * 2**20  # bytes of pages gathered at a time
_ALIGNMENT = 64  # of a slab's first byte: vector loads never straddle a cache line
_MOST = 2**31 - 1  # positions and lengths are int32
_MOST_PAGE_BYTES = 2**24
_MOST_BYTES = 2**60
_MOST_TAIL = 4096  # tokens that a tail has room for without having held as many; `When.every` goes as far
_CPU = torch.device("cpu")


# -- writing -----------------------------------------------------------------------------------------------------------


def save_cache(attention: PagedAttention, identity: ModelIdentity, path: str | os.PathLike[str]) -> None:
    """Writes a cache to a file.

    Args:
        attention (`PagedAttention`): The inside of the cache; not changed.
        identity (`ModelIdentity`): The model whose keys and values it holds.
        path (`str` or `os.PathLike`): Where; a file that is there is replaced once the new one is whole.

    Raises:
        RuntimeError: If a forward pass is under way.
        OSError: If the file cannot be written; nothing is left behind then.
    """
    state = attention.state()
    pages: dict[str, Section] = {}
    small: dict[str, torch.Tensor] = {"model.weights": torch.tensor(identity.weights, dtype=torch.int64)}
    if state.padding is not None:
        small["padding"] = state.padding
    if state.gaps is not None and bool((state.gaps[..., 0] > 0).any()):  # else all padding came first
        small["gaps"] = state.gaps
    if state.distortion is not None:
        small["distortion"] = state.distortion
    described = []
    crcs: list[int] = []
    for i, (store, layers) in enumerate(zip(attention.stores, attention.layers_of_stores, strict=True)):
        tensors = store.state(len(layers))
        ids, counts = _number_pages(store, tensors)
        small |= {f"store.{i}.{name}": tensor for name, tensor in tensors.items()}
        crcs.append(0)
        shape = (ids.numel(), store.layout.page_bytes)
        pages[f"store.{i}.pages"] = Section(torch.uint8, shape, _PageBlocks(store, ids, counts, crcs, i))
        geometry = store.geometry
        described.append(
            {
                "layers": layers,
                "dtype": str(geometry.dtype).removeprefix("torch."),
                "kv_heads": geometry.kv_heads,
                "head_dim": geometry.head_dim,
                "windowed": geometry.windowed,
                "evicted": store.evicted,
                "tail_capacity": store.tail_capacity,
                "page_bytes": store.layout.page_bytes,
                "pages": counts,
                "order": _file_order(store),
            }
        )
    text = json.dumps(
        {
            "versions": {name: version(name) for name in ("kvcompress-hf", "torch", "transformers")},
            "byteorder": sys.byteorder,
            "model": {name: value for name, value in _plain(identity).items() if name != "weights"},
            "recipes": [recipe.to_dict() for recipe in attention.recipes],
            "windows": attention.windows,
            "stores": described,
            **{name: value for name, value in _plain(state).items() if name not in ("padding", "gaps", "distortion")},
        }
    )
    blocks = {name: tensor_bytes(tensor) for name, tensor in small.items()}
    rest = zlib.crc32(text.encode())
    for name in sorted(blocks):
        rest = zlib.crc32(blocks[name], rest)
    # Pages first, where their alignment is the file's; then by the size of elements, as the format's own writer does.
    order = sorted(small, key=lambda name: (-small[name].element_size(), name))
    sections = dict(pages)
    for name in order:
        sections[name] = Section(small[name].dtype, tuple(small[name].shape), [blocks[name]])
    sections["checksums"] = Section(torch.int64, (len(crcs) + 1,), _checksums(crcs, rest))
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "tokens": str(state.seen), "state": text}
    write(path, metadata, sections)


def _checksums(crcs: Sequence[int], rest: int) -> Iterator[memoryview]:
    """Comes last in the file: only then have all pages been read."""
    yield tensor_bytes(torch.tensor([*crcs, rest]))


def _plain(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}


def _file_order(store: PagedStore) -> str:
    return store.backend.page_order if store.backend.page_order in _ORDERS else "canonical"


def _number_pages(store: PagedStore, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """Replaces page ids in the tables of a state by numbers in the order of their first mention, tier by tier.

    The numbers do not depend on where the arena keeps the pages, so equal caches make equal files.
    """
    ids: list[torch.Tensor] = []
    counts: list[int] = []
    for tier in range(len(store.layout.tiers)):
        table = tensors[f"table.{tier}"]
        live = _live(tensors["lengths"][tier], store.layout.tiers[tier].slots, table.shape[1])
        mentioned = table[live].long()
        unique, inverse = torch.unique(mentioned, return_inverse=True)
        place = torch.arange(mentioned.numel(), device=mentioned.device)
        first = torch.full_like(unique, mentioned.numel()).scatter_reduce_(0, inverse, place, "amin")
        order = first.argsort()
        rank = torch.empty_like(order)
        rank[order] = torch.arange(order.numel(), device=order.device)
        table[live] = (rank[inverse] + sum(counts)).to(table.dtype)
        ids.append(unique[order])
        counts.append(order.numel())
    return torch.cat(ids), counts


def _live(lengths: torch.Tensor, slots: int, columns: int) -> torch.Tensor:
    """Which table entries have a page behind them: `bool` `[rows, columns]`."""
    pages = (lengths.long() + (slots - 1)) // slots
    return torch.arange(columns, device=lengths.device) < pages[:, None]


@dataclass
class _PageBlocks:
    """Yields the pages of a store in blocks, and notes their checksum."""

    store: PagedStore
    ids: torch.Tensor
    counts: Sequence[int]
    crcs: list[int]
    index: int

    def __iter__(self) -> Iterator[memoryview]:
        layout, backend = self.store.layout, self.store.backend
        step = max(1, _BLOCK // layout.page_bytes)
        crc = 0
        for tier, ids in enumerate(self.ids.split(list(self.counts))):
            for some in ids.split(step):
                pages = self.store.arena.read(some)
                if backend.page_order not in _ORDERS:
                    pages = backend.to_canonical(layout, tier, pages)
                block = tensor_bytes(pages)
                crc = zlib.crc32(block, crc)
                yield block
        self.crcs[self.index] = crc


# -- reading -----------------------------------------------------------------------------------------------------------


class UnreadPages:
    """Mapped pages whose checksum has not been compared yet, because nobody has read them.

    Args:
        file (`Mapped`): The file.
        expected (`Sequence[tuple[Entry, int]]`): Pages and their checksums.
    """

    def __init__(self, file: Mapped, expected: Sequence[tuple[Entry, int]]) -> None:
        self._file: Mapped | None = file
        self._expected = expected

    def check(self) -> None:
        """Reads the pages through and compares their checksums, the first time it is called.

        Raises:
            CacheFormatError: If they are not what was written.
        """
        if self._file is not None:
            for entry, crc in self._expected:
                if self._file.crc(entry) != crc:
                    raise self._file.error("its pages are damaged (their checksum differs); make the cache again")
            self._file = None


@dataclass(frozen=True)
class LoadedCache:
    """A cache as it comes from a file.

    Args:
        attention (`PagedAttention`): Its inside.
        unread (`UnreadPages`, *optional*): To be checked before anything is read from its pages.
    """

    attention: PagedAttention
    unread: UnreadPages | None


def load_cache(
    path: str | os.PathLike[str],
    identity: ModelIdentity,
    windows: Sequence[int | None],
    devices: Sequence[torch.device],
    max_bytes: int | None = None,
    sharing: Sequence[str | None] | None = None,
) -> LoadedCache:
    """Reads a cache from a file.

    On the CPU its pages stay where they are in the file, mapped, if they are in the backend's own order.

    Args:
        path (`str` or `os.PathLike`): The file.
        identity (`ModelIdentity`): The model that is going to use the cache.
        windows (`Sequence[int | None]`): Sliding window of each of the model's layers.
        devices (`Sequence[torch.device]`): Where the keys and values of each layer will arrive.
        max_bytes (`int`, *optional*): Most bytes of pages per device.
        sharing (`Sequence[str | None]`, *optional*): Which layers read keys and values of others, as for
            `PagedAttention`.

    Returns:
        `LoadedCache`: The cache.

    Raises:
        CacheFormatError: If the file is damaged, of another version, or was made with another model.
        CacheMemoryError: If it holds more than `max_bytes`.
        OSError: If it cannot be opened.
    """
    file = Mapped(path)
    header = _Header(file)
    header.check_model(identity, windows)
    recipes = header.recipes()
    state = header.state(len(windows), len(recipes[0].tiers))
    if state.batch and len(recipes) not in (1, state.batch):
        raise file.error(f"{len(recipes)} recipes for {state.batch} sequences")
    attention = PagedAttention(recipes, windows, state.prompt_tokens, max_bytes, sharing)
    arenas: dict[tuple[torch.device, int], Arena] = {}
    stores: list[tuple[PagedStore, Sequence[int]]] = []
    unread: list[tuple[Entry, int]] = []
    with torch.inference_mode(False):
        parts = [_StorePart(file, header, i, recipes[0], state) for i in range(len(header.stores))]
        _check_stores(file, parts, windows, state)
        # Everything has been checked; from here on things are made.
        for part, crc in zip(parts, header.page_checksums, strict=True):
            mapped = True
            for device in dict.fromkeys(devices[layer] for layer in part.layers):
                key = (device, part.layout.page_bytes)
                arena = arenas.setdefault(key, Arena(part.layout.page_bytes, device, max_bytes))
                mine = [i for i, layer in enumerate(part.layers) if devices[layer] == device]
                mapped &= part.fits_in_place(device)
                if not mapped:
                    UnreadPages(file, [(part.pages, crc)]).check()
                stores.append((part.make_store(device, arena, mine), [part.layers[i] for i in mine]))
            if mapped:
                unread.append((part.pages, crc))
        attention.load_state(state, stores)
    return LoadedCache(attention, UnreadPages(file, unread) if unread else None)


class _Header:
    """The metadata of a file, with every value checked for its type and range."""

    def __init__(self, file: Mapped) -> None:
        self.file = file
        metadata = file.metadata
        if metadata.get("format") != FORMAT:
            raise file.error(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        if metadata.get("format_version") != str(FORMAT_VERSION):
            raise file.error(
                f"its format version is {metadata.get('format_version')!r}, but this package reads {FORMAT_VERSION}; "
                "make the cache again, or use the package version that wrote it"
            )
        text = metadata.get("state", "")
        try:
            values = json.loads(text, parse_int=_small_int)
        except (ValueError, RecursionError) as error:
            raise file.error(f"its state is not JSON ({error})") from error
        if not isinstance(values, dict):
            raise file.error("its state is not a JSON object")
        self._values = values
        self.stores = self._list(values, "stores", dict)
        self._check_checksum(text)
        if values.get("byteorder") != sys.byteorder:
            raise file.error(f"it is in byte order {values.get('byteorder')!r}, this machine in {sys.byteorder!r}")

    def _check_checksum(self, text: str) -> None:
        sums = self.file.read("checksums", torch.int64, (len(self.stores) + 1,)).tolist()
        crc = zlib.crc32(text.encode("utf-8", "surrogatepass"))
        pages = {f"store.{i}.pages" for i in range(len(self.stores))}
        for name in sorted(self.file.entries.keys() - pages - {"checksums"}):
            crc = self.file.crc(self.file.entries[name], crc)
        if crc != sums[-1]:
            raise self.file.error("its tables or its description are damaged (their checksum differs)")
        self.page_checksums = sums[:-1]

    def check_model(self, identity: ModelIdentity, windows: Sequence[int | None]) -> None:
        model = self._values.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("config"), dict):
            raise self.file.error("it does not say which model it belongs to")
        dtype, parameters = model.get("dtype"), model.get("parameters")
        weights = self.file.read("model.weights", torch.int64, (None,))
        saved = ModelIdentity(model["config"], model.get("rope"), dtype, tuple(weights.tolist()), parameters or 0)
        difference = saved.difference(identity)
        if difference is None and self._values.get("windows") != list(windows):
            difference = f"its sliding windows are {list(windows)}, not {self._values.get('windows')}"
        if difference is not None:
            raise CacheFormatError(
                f"{self.file.path} belongs to another model than the one given: {difference}. Load it with the model "
                "it was made with, or prefill again."
            )

    def recipes(self) -> tuple[Recipe, ...]:
        try:
            recipes = resolve_rows([_read_recipe(values) for values in self._list(self._values, "recipes", dict)])
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise self.file.error(f"its recipe cannot be used: {error}") from error
        return recipes

    def state(self, layers: int, tiers: int) -> AttentionState:
        values, file = self._values, self.file
        seen = self._int(values, "seen", 0, _MOST)
        # No store holds more than the file does, so this bounds the batch as well.
        batch = self._int(values, "batch", 1 if self.stores else 0, _MOST if self.stores else 0)
        if (seen > 0) != bool(self.stores):
            raise file.error(f"it says {seen} tokens, but has {len(self.stores)} stores")
        prompt_tokens = None if values.get("prompt_tokens") is None else self._int(values, "prompt_tokens", 0, _MOST)
        groups = self._list(values, "groups", int, layers)
        tail_used = self._list(values, "tail_used", int, layers)
        if any(not 1 <= group <= 65536 for group in groups):
            raise file.error(f"its groups of query heads are {groups}")
        if any(not 0 <= used <= seen for used in tail_used):
            raise file.error(f"its tails would hold {tail_used} tokens, but it has seen {seen}")
        padding = gaps = distortion = None
        if "padding" in file.entries:
            padding = file.read("padding", torch.int64, (batch,))
            if bool(((padding < 0) | (padding > seen)).any()):
                raise file.error(f"padding is not between 0 and the {seen} tokens seen")
            gaps = torch.stack([torch.zeros_like(padding), padding], dim=-1)[:, None]
            if "gaps" in file.entries:
                gaps = file.read("gaps", torch.int64, (batch, None, 2))
                outside = (gaps < 0).any() | (gaps > seen).any() | (gaps.sum(-1) > seen).any()
                if bool(outside | (gaps[..., 1].sum(1) > padding).any()):
                    raise file.error(f"its runs of padding are not within the {seen} tokens seen")
        if "distortion" in file.entries:
            distortion = file.read("distortion", torch.float32, (batch, None, tiers))
            if bool((distortion.isinf() | (distortion < 0)).any()):
                raise file.error("its measured losses are not numbers of at least 0")
        return AttentionState(
            seen=seen,
            batch=batch,
            prompt=self._int(values, "prompt", 0, seen),
            prompt_tokens=prompt_tokens,
            planned=self._int(values, "planned", 0, seen),
            faded=self._int(values, "faded", 0, seen),
            recording=self._bool(values, "recording"),
            unfinished=self._bool(values, "unfinished"),
            groups=groups,
            tail_used=tail_used,
            padding=padding,
            gaps=gaps,
            distortion=distortion,
        )

    def geometry(self, index: int) -> Geometry:
        values = self.stores[index]
        dtype = values.get("dtype")
        known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values() if dtype.is_floating_point}
        if not isinstance(dtype, str) or dtype not in known:
            raise self.file.error(f"keys of dtype {dtype!r}, not one of {', '.join(known)}")
        heads, dim = self._int(values, "kv_heads", 1, 65536), self._int(values, "head_dim", 1, 65536)
        return Geometry(_CPU, known[dtype], heads, dim, self._bool(values, "windowed"))

    def tail_capacity(self, index: int, most: int) -> int:
        return self._int(self.stores[index], "tail_capacity", 0, most)

    def store(self, index: int, tiers: int, layers: int) -> tuple[list[int], list[int], bool, int, str]:
        values = self.stores[index]
        mine = self._list(values, "layers", int)
        if not mine or len(set(mine)) != len(mine) or not all(0 <= layer < layers for layer in mine):
            raise self.file.error(f"a store of layers {mine}, where the model has {layers}")
        counts = self._list(values, "pages", int, tiers)
        if any(not 0 <= count <= _MOST for count in counts):
            raise self.file.error(f"a store of {counts} pages")
        order = values.get("order")
        if order not in _ORDERS:
            raise self.file.error(f"pages in the order {order!r}, not one of {', '.join(_ORDERS)}")
        page_bytes = self._int(values, "page_bytes", 1, _MOST_PAGE_BYTES)
        return mine, counts, self._bool(values, "evicted"), page_bytes, order

    def _int(self, values: Mapping[str, Any], name: str, low: int, high: int) -> int:
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.file.error(f"{name} is {value!r}, not an integer between {low} and {high}")
        return value

    def _bool(self, values: Mapping[str, Any], name: str) -> bool:
        value = values.get(name)
        if not isinstance(value, bool):
            raise self.file.error(f"{name} is {value!r}, not true or false")
        return value

    def _list(self, values: Mapping[str, Any], name: str, kind: type, count: int | None = None) -> list[Any]:
        value = values.get(name)
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise self.file.error(f"{name} is {value!r}, not a list of {kind.__name__}")
        if count is not None and len(value) != count:
            raise self.file.error(f"{name} has {len(value)} entries, not {count}")
        return value


class _StorePart:
    """One store of a file: every tensor of it read and checked, except the pages, which are only located."""

    def __init__(self, file: Mapped, header: _Header, index: int, recipe: Recipe, state: AttentionState) -> None:
        self._file = file
        self._name = f"store.{index}"
        self.geometry = header.geometry(index)
        try:
            if recipe.page_bytes is not None and recipe.page_bytes > _MOST_PAGE_BYTES:
                raise ValueError(f"page_bytes is {recipe.page_bytes}")
            self.layout = layout_for(recipe, self.geometry)
        except ValueError as error:
            raise file.error(f"there are no such pages ({error})") from error
        tiers = self.layout.tiers
        self.layers, counts, self._evicted, page_bytes, self.order = header.store(index, len(tiers), len(state.groups))
        if page_bytes != self.layout.page_bytes:
            raise file.error(f"pages of {page_bytes} bytes, where the recipe makes them {self.layout.page_bytes}")
        self.pages = file.expect(f"{self._name}.pages", torch.uint8, (sum(counts), page_bytes))
        # Sums over a tail round by its capacity, so to go on with the same bits it must be what it was.
        self._capacity = header.tail_capacity(index, max(_MOST_TAIL, 2 * (state.seen + 1)))
        self._batch = state.batch
        self._starts = [sum(counts[:tier]) for tier in range(len(tiers) + 1)]
        self._tensors = self._read(recipe, state)
        self._check_lengths(state)
        self._references = torch.cat([self._check_table(tier) for tier in range(len(tiers))])

    def _read(self, recipe: Recipe, state: AttentionState) -> dict[str, torch.Tensor]:
        layers, batch, heads, dim = len(self.layers), self._batch, self.geometry.kv_heads, self.geometry.head_dim
        rows, dtype, n_fields = layers * batch * heads, self.geometry.dtype, len(self.layout.fields)
        used = max(state.tail_used[layer] for layer in self.layers)
        int32 = torch.int32
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        shapes["lengths"] = (int32, (len(self.layout.tiers), rows))
        shapes["tail_lengths"] = (int32, (layers, batch))
        present = {name for name in self._file.entries if name.startswith(f"{self._name}.")}
        optional: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "tail_keys": (dtype, (layers, batch, heads, used, dim)),
            "tail_values": (dtype, (layers, batch, heads, used, dim)),
            "tail_positions": (int32, (layers, batch, used)),
        }
        if n_fields:
            optional["tail_fields"] = (int32, (layers, n_fields, batch, heads, used))
        if f"{self._name}.tail_keys" in present:
            shapes |= optional
        if recipe.observer is not None and recipe.observer.describes and f"{self._name}.sums" in present:
            shapes["sums"] = (torch.float32, (2, layers, batch, heads, dim))
            shapes["summed"] = (torch.float32, (layers, batch))
        if recipe.centres_keys and f"{self._name}.key_shift" in present:
            shapes["key_shift"] = (dtype, (layers, batch, heads, 1, dim))
        # The sizes of what is always there come first: they bound the batch by the bytes of the file.
        tensors = {name: self._file.read(f"{self._name}.{name}", *what) for name, what in shapes.items()}
        for tier in range(len(self.layout.tiers)):
            name = f"table.{tier}"
            tensors[name] = self._file.read(f"{self._name}.{name}", int32, (rows, None))
        unknown = present - {f"{self._name}.{name}" for name in (*tensors, "pages")}
        if unknown:
            raise self._file.error(f"tensors that do not belong there: {', '.join(sorted(unknown))}")
        return tensors

    def _check_lengths(self, state: AttentionState) -> None:
        lengths, tail = self._tensors["lengths"].long(), self._tensors["tail_lengths"].long()
        if bool((lengths < 0).any()) or bool((tail < 0).any()):
            raise self._file.error("negative lengths")
        most = torch.tensor([state.tail_used[layer] for layer in self.layers])
        if "tail_keys" not in self._tensors:
            most = torch.zeros_like(most)
        if bool((tail > most[:, None]).any()):
            raise self._file.error("a tail is longer than the memory for it")
        slots = lengths.sum(0).view(len(self.layers), self._batch, self.geometry.kv_heads) + tail[:, :, None]
        if bool((slots > state.seen).any()):
            raise self._file.error(f"{int(slots.max())} slots in a row, more than the {state.seen} tokens seen")
        if "tail_positions" in self._tensors:
            positions = self._tensors["tail_positions"]
            used = torch.arange(positions.shape[-1]) < tail[..., None]
            if bool((used & ((positions < 0) | (positions >= state.seen))).any()):
                raise self._file.error(f"positions in the tail beyond the {state.seen} tokens seen")

    def _check_table(self, tier: int) -> torch.Tensor:
        """Checks a table, and counts how often each page of the tier is mentioned: `int64` `[pages]`."""
        table = self._tensors[f"table.{tier}"].long()
        slots, lengths = self.layout.tiers[tier].slots, self._tensors["lengths"][tier].long()
        if bool((lengths > table.shape[1] * slots).any()):
            raise self._file.error(f"{int(lengths.max())} slots in a row whose table names {table.shape[1]} pages")
        live = _live(lengths, slots, table.shape[1])
        first, count = self._starts[tier], self._starts[tier + 1] - self._starts[tier]
        pages = table[live] - first
        if bool(((pages < 0) | (pages >= count)).any()):
            raise self._file.error(f"page numbers outside {first} to {first + count - 1}, where the tier's pages are")
        references = torch.bincount(pages, minlength=count)
        if bool((references == 0).any()):
            raise self._file.error("pages that no table names")
        # Sequences may share a page, but only at the same place of the same layer and head.
        row, column = torch.nonzero(live, as_tuple=True)
        heads = self.geometry.kv_heads
        owner = row // (self._batch * heads) * heads + row % heads
        place = owner * table.shape[1] + column
        lowest = torch.full((count,), torch.iinfo(torch.int64).max).scatter_reduce_(0, pages, place, "amin")
        highest = torch.full((count,), -1).scatter_reduce_(0, pages, place, "amax")
        if bool((lowest != highest).any()):
            raise self._file.error("a page in two different places")
        self._tensors[f"table.{tier}"] = torch.where(live, table, 0).to(torch.int32)
        return references

    def fits_in_place(self, device: torch.device) -> bool:
        """Whether the pages can be used where they are in the file."""
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
        tensors, wanted = self._of_layers(layers)
        limit = 1 << arena.slab_shift
        sizes = [min(limit, wanted.numel() - i) for i in range(0, wanted.numel(), limit)]
        whole = wanted.numel() == self.pages.shape[0]
        if whole and self.fits_in_place(device):
            slabs = [self._file.view(self.pages, i * limit, size) for i, size in enumerate(sizes)]
        else:
            slabs = [arena.new_slab(size) for size in sizes]
            for slab, numbers in zip(slabs, wanted.split(sizes) if sizes else (), strict=True):
                self._fill(slab, numbers, backend)
        ids = arena.adopt(slabs, self._references_of(tensors, wanted))
        # From page numbers of the file to ids of the arena.
        new_id = torch.zeros(self.pages.shape[0], dtype=torch.int32)
        new_id[wanted] = ids.cpu()
        for tier, tier_layout in enumerate(self.layout.tiers):
            table = tensors[f"table.{tier}"]
            live = _live(tensors["lengths"][tier], tier_layout.slots, table.shape[1])
            table[live] = new_id[table[live].long()]
        store = PagedStore(geometry, len(layers), self._batch, self.layout, arena, backend)
        store.load_state({name: tensor.to(device) for name, tensor in tensors.items()}, self._evicted)
        if self._capacity:
            store.reserve_tail(self._capacity)
        return store

    def _of_layers(self, layers: Sequence[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The tensors of some layers, and the numbers of the pages they name, ascending."""
        per_layer = self._batch * self.geometry.kv_heads
        chosen = torch.tensor(list(layers))
        rows = (chosen[:, None] * per_layer + torch.arange(per_layer)).flatten()
        tensors = {}
        for name, tensor in self._tensors.items():
            if name.startswith("table."):
                tensors[name] = tensor[rows]
            elif name == "lengths":
                tensors[name] = tensor[:, rows].contiguous()
            else:
                tensors[name] = tensor[:, chosen].contiguous() if name == "sums" else tensor[chosen]
        named = [
            tensors[f"table.{tier}"][_live(tensors["lengths"][tier], layout.slots, tensors[f"table.{tier}"].shape[1])]
            for tier, layout in enumerate(self.layout.tiers)
        ]
        return tensors, torch.unique(torch.cat(named).long())

    def _references_of(self, tensors: Mapping[str, torch.Tensor], wanted: torch.Tensor) -> torch.Tensor:
        if wanted.numel() == self._references.numel():
            return self._references
        counts = torch.zeros_like(self._references)
        for tier, layout in enumerate(self.layout.tiers):
            table = tensors[f"table.{tier}"]
            named = table[_live(tensors["lengths"][tier], layout.slots, table.shape[1])].long()
            counts += torch.bincount(named, minlength=counts.numel())
        return counts[wanted]

    def _fill(self, slab: torch.Tensor, numbers: torch.Tensor, backend: kernels.Backend) -> None:
        """Copies pages out of the file into a slab, in the backend's order."""
        step = max(1, _BLOCK // self.layout.page_bytes)
        # The CPU's backend knows both orders that a file can have.
        reader = kernels.get_backend(_CPU)
        for tier in range(len(self.layout.tiers)):
            inside = (numbers >= self._starts[tier]) & (numbers < self._starts[tier + 1])
            for place in torch.nonzero(inside).flatten().split(step):
                pages = self._gather(numbers[place])
                if self.order != backend.page_order:
                    pages = pages if self.order == "canonical" else reader.to_canonical(self.layout, tier, pages)
                    pages = backend.from_canonical(self.layout, tier, pages.to(slab.device))
                slab[place.to(slab.device)] = pages.to(slab.device)

    def _gather(self, numbers: torch.Tensor) -> torch.Tensor:
        whole = self._file.view(self.pages, 0, self.pages.shape[0])
        return whole[numbers]


def _check_stores(
    file: Mapped, parts: Sequence[_StorePart], windows: Sequence[int | None], state: AttentionState
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


def _read_recipe(values: dict[str, Any]) -> Recipe:
    if any(not -_MOST <= number <= _MOST for number in _integers(values)):
        raise ValueError("it has numbers beyond 32 bits")
    recipe = Recipe.from_dict(values)
    amount = None if recipe.budget is None else recipe.budget.amount
    if isinstance(amount, str) and parse_bytes(amount) > _MOST_BYTES:
        raise ValueError(f"its budget is {amount}")
    return recipe


def _integers(value: Any) -> Iterator[int]:
    """All integers in nested dicts and lists."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _integers(inner)


def _small_int(text: str) -> int:
    value = int(text)
    if abs(value) >= 2**63:
        raise ValueError(f"{text[:40]} does not fit 64 bits")
    return value
