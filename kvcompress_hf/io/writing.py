"""Writes a cache to a file, and reads it over before it takes the place of an older one.

Pages lie in the file as they lie in memory: codes, scales and slot fields, in the order of the backend that wrote them
or in the canonical one (`kernels/include/page_layout.h`), tier by tier. Tables hold page numbers of the file, so a
page that several sequences share is there once.
"""

import contextlib
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kvcompress_hf.errors import CacheFormatError
from kvcompress_hf.io.container import Section, tensor_bytes, write
from kvcompress_hf.io.form import BLOCK, FORMAT, FORMAT_VERSIONS, ORDERS, live_entries, most_capacity
from kvcompress_hf.io.identity import ModelIdentity
from kvcompress_hf.io.reading import check_file
from kvcompress_hf.paging.sequence_tensors import shape_of
from kvcompress_hf.paging.store import PagedStore
from kvcompress_hf.runtime.attention import AttentionState, PagedAttention

__all__ = ["save_cache"]

_NOT_WRITTEN = ("weights", "layers", "shards")  # of an identity: a tensor, and what holds for this process only
_COUNTED = ("layers", "batch", "slots")  # dimensions that the lengths of tails tell of


def save_cache(attention: PagedAttention, identity: ModelIdentity, path: str | os.PathLike[str]) -> None:
    """Writes a cache to a file.

    Args:
        attention (`PagedAttention`): The inside of the cache; not changed.
        identity (`ModelIdentity`): The model whose keys and values it holds.
        path (`str` or `os.PathLike`): Where; a file that is there is replaced once the new one is whole and was found
            good by the checks of [`load_cache`].

    Raises:
        RuntimeError: If a forward pass is under way, or the file would be refused by [`load_cache`].
        OSError: If the file cannot be written; nothing is left behind then.
    """
    state = _consistent(attention.state())
    with contextlib.ExitStack() as still:  # forks in other threads move no pages until these are written
        for store in attention.stores:
            still.enter_context(store.reading)
        _write(attention, state, identity, path)


def _write(
    attention: PagedAttention, state: AttentionState, identity: ModelIdentity, path: str | os.PathLike[str]
) -> None:
    contents = _Contents(attention, state)
    text = json.dumps(
        {
            "versions": {name: version(name) for name in ("kvcompress-hf", "torch", "transformers")},
            "byteorder": sys.byteorder,
            "model": {name: value for name, value in _plain(identity).items() if name not in _NOT_WRITTEN},
            "recipes": [recipe.to_dict() for recipe in attention.recipes],
            "windows": attention.windows,
            "stores": contents.described,
            **{name: value for name, value in _plain(state).items() if name not in ("padding", "gaps", "distortion")},
        }
    )
    small = contents.small | {"model.weights": torch.tensor(identity.weights, dtype=torch.int64)}
    blocks = {name: tensor_bytes(tensor) for name, tensor in small.items()}
    rest = zlib.crc32(text.encode())
    for name in sorted(blocks):
        rest = zlib.crc32(blocks[name], rest)
    # Pages first, where their alignment is the file's; then by the size of elements, as the format's own writer does.
    sections = dict(contents.pages)
    for name in sorted(small, key=lambda name: (-small[name].element_size(), name)):
        sections[name] = Section(small[name].dtype, tuple(small[name].shape), [blocks[name]])
    crcs = contents.crcs
    sections["checksums"] = Section(torch.int64, (len(crcs) + 1,), _checksums(crcs, rest))
    metadata = {"format": FORMAT, "format_version": str(contents.version), "tokens": str(state.seen), "state": text}

    def read_over(unfinished: Path) -> None:
        try:
            check_file(unfinished, identity, attention.windows)
        except CacheFormatError as error:
            raise RuntimeError(
                "This cache cannot be written to a file that could be read again, so no file was made and one that "
                f"was there is as it was; the cache itself can be used on. {error}"
            ) from error

    write(path, metadata, sections, read_over)


def _consistent(state: AttentionState) -> AttentionState:
    """The state without what `crop` leaves behind: numbers of tokens that are no longer there."""
    seen = state.seen
    if not seen:
        ones, zeros = [1] * len(state.groups), [0] * len(state.tail_used)
        return replace(
            state,
            batch=0,
            prompt=0,
            planned=0,
            faded=0,
            unfinished=False,
            groups=ones,
            tail_used=zeros,
            padding=None,
            gaps=None,
            distortion=None,
        )
    return replace(
        state,
        prompt=min(state.prompt, seen),
        planned=min(state.planned, seen),
        faded=min(state.faded, seen),
        padding=None if state.padding is None else state.padding.clamp(max=seen),
    )


class _Contents:
    """The tensors of a file, and what its header says of the stores.

    Args:
        attention (`PagedAttention`): The inside of the cache.
        state (`AttentionState`): What the file says besides.
    """

    def __init__(self, attention: PagedAttention, state: AttentionState) -> None:
        self.pages: dict[str, Section] = {}
        self.small: dict[str, torch.Tensor] = {}
        self.described: list[dict[str, Any]] = []
        # Only what a version cannot say asks for the next.
        rotates = any(store.rotates_values for store in attention.stores)
        self.version = FORMAT_VERSIONS[2 if attention.recipe.keeps_mean else int(rotates)]
        self.crcs: list[int] = []  # of each store's pages, known once they have been written
        if state.padding is not None:
            self.small["padding"] = state.padding
        if state.gaps is not None and bool((state.gaps[..., 0] > 0).any()):  # else all padding came first
            self.small["gaps"] = state.gaps
        if state.distortion is not None:
            self.small["distortion"] = state.distortion
        if state.seen:
            for store, layers in zip(attention.stores, attention.layers_of_stores, strict=True):
                used = max(state.tail_used[layer] for layer in layers)
                self._add(store, layers, used, attention.recipe.when.every)

    def _add(self, store: PagedStore, layers: Sequence[int], used: int, every: int) -> None:
        number = len(self.described)
        tensors = store.state(len(layers))
        _fill_tail(store, tensors, used)
        ids, counts = _number_pages(store, tensors)
        self.small |= {f"store.{number}.{name}": tensor for name, tensor in tensors.items()}
        self.crcs.append(0)
        shape = (ids.numel(), store.layout.page_bytes)
        blocks = _PageBlocks(store, ids, counts, self.crcs, number)
        self.pages[f"store.{number}.pages"] = Section(torch.uint8, shape, blocks)
        geometry = store.geometry
        self.described.append(
            {
                "layers": list(layers),
                "dtype": str(geometry.dtype).removeprefix("torch."),
                "kv_heads": geometry.kv_heads,
                "head_dim": geometry.head_dim,
                "windowed": geometry.windowed,
                "evicted": store.evicted,
                "tail_capacity": min(store.tail_capacity, most_capacity(used, every)),
                "page_bytes": store.layout.page_bytes,
                "pages": counts,
                "order": store.backend.page_order if store.backend.page_order in ORDERS else "canonical",
            }
        )
        if self.version > FORMAT_VERSIONS[0]:
            self.described[-1]["rotates_values"] = store.rotates_values


def _fill_tail(store: PagedStore, tensors: dict[str, torch.Tensor], used: int) -> None:
    """Makes the tail as wide as the cache counts it, with zeros where there is no slot.

    The cache counts padding too, which no row has a slot for. And what lies behind a row's slots is memory as it was
    found; it must not get into a file.
    """
    lengths = tensors["tail_lengths"]
    layers = lengths.shape[0]
    filled = torch.arange(used, device=lengths.device) < lengths[..., None]  # [layers, batch, used]
    if not used or ("tail_keys" in tensors and tensors["tail_keys"].shape[3] == used and bool(filled.all())):
        return
    sizes = {**store.tensors.sizes, "layers": layers, "slots": used}
    for name, each in store.tensors.declared.items():
        if "slots" not in each.dims:
            continue
        shape = shape_of(each, sizes)
        whole = torch.zeros(shape, dtype=each.dtype or store.geometry.dtype, device=lengths.device)
        held = tensors.get(name)
        if held is not None:
            axis = each.dims.index("slots")
            whole.narrow(axis, 0, held.shape[axis]).copy_(held)
            counted = [size if dim in _COUNTED else 1 for dim, size in zip(each.dims, shape, strict=True)]
            whole.masked_fill_(~filled.view(counted), 0)
        tensors[name] = whole


def _checksums(crcs: Sequence[int], rest: int) -> Iterator[memoryview]:
    """Comes last in the file: only then have all pages been read."""
    yield tensor_bytes(torch.tensor([*crcs, rest]))


def _plain(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}


def _number_pages(store: PagedStore, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """Replaces page ids in the tables of a state by numbers in the order of their first mention, tier by tier.

    The numbers do not depend on where the arena keeps the pages, so equal caches make equal files.
    """
    ids: list[torch.Tensor] = []
    counts: list[int] = []
    for tier in range(len(store.layout.tiers)):
        table = tensors[f"table.{tier}"]
        live = live_entries(tensors["lengths"][tier], store.layout.tiers[tier].slots, table.shape[1])
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
        step = max(1, BLOCK // layout.page_bytes)
        crc = 0
        for tier, ids in enumerate(self.ids.split(list(self.counts))):
            for some in ids.split(step):
                pages = self.store.arena.read(some)
                if backend.page_order not in ORDERS:
                    pages = backend.to_canonical(layout, tier, pages)
                block = tensor_bytes(pages)
                crc = zlib.crc32(block, crc)
                yield block
        self.crcs[self.index] = crc
