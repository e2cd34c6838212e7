"""Reads a cache from a file: everything is checked before anything is made of it.

Nothing in the file is trusted: sizes, counts, lengths and page numbers are compared with each other, with what the
recipe implies and with how many bytes the file has, before any of them is used. So memory and time are in proportion to
the file, whatever it says.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvcompress_hf.io.container import Entry, StoredFile
from kvcompress_hf.io.header import Header
from kvcompress_hf.io.identity import ModelIdentity
from kvcompress_hf.io.store_part import StorePart, check_stores
from kvcompress_hf.paging.arena import Arena
from kvcompress_hf.paging.store import PagedStore
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.runtime.attention import AttentionState, PagedAttention

__all__ = ["LoadedCache", "UnreadPages", "check_file", "load_cache"]


class UnreadPages:
    """StoredFile pages whose checksum has not been compared yet, because nobody has read them.

    Args:
        file (`StoredFile`): The file.
        expected (`Sequence[tuple[Entry, int]]`): Pages and their checksums.
    """

    def __init__(self, file: StoredFile, expected: Sequence[tuple[Entry, int]]) -> None:
        self._file: StoredFile | None = file
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
        `LoadedCache`: What the file holds, checked.

    Raises:
        CacheFormatError: If the file is damaged, of another version, or was made with another model.
        CacheMemoryError: If it holds more than `max_bytes`.
        OSError: If it cannot be opened.
    """
    file, recipes, state, parts, checksums = _read(path, identity, windows)
    try:
        attention = PagedAttention(recipes, windows, state.prompt_tokens, max_bytes, sharing)
    except ValueError as error:
        raise file.error(f"its recipe cannot be used with this model: {error}") from error
    arenas: dict[tuple[torch.device, int], Arena] = {}
    stores: list[tuple[PagedStore, Sequence[int]]] = []
    unread: list[tuple[Entry, int]] = []
    with torch.inference_mode(False):
        for part, crc in zip(parts, checksums, strict=True):
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


def check_file(path: str | os.PathLike[str], identity: ModelIdentity, windows: Sequence[int | None]) -> None:
    """Checks all of a file but its pages, without making a cache of it.

    Args:
        path (`str` or `os.PathLike`): The file.
        identity (`ModelIdentity`): The model that is going to use it.
        windows (`Sequence[int | None]`): Sliding window of each of the model's layers.

    Raises:
        CacheFormatError: If [`load_cache`] would refuse it.
    """
    _read(path, identity, windows)


class _Checked(NamedTuple):
    """A file in which everything has been checked but the pages."""

    file: StoredFile
    recipes: tuple[Recipe, ...]
    state: AttentionState
    parts: list[StorePart]
    page_checksums: list[int]


def _read(path: str | os.PathLike[str], identity: ModelIdentity, windows: Sequence[int | None]) -> _Checked:
    file = StoredFile(path)
    header = Header(file, len(windows))
    header.check_model(identity, windows)
    recipes = header.recipes()
    state = header.state(len(recipes[0].tiers))
    known = {"checksums", "model.weights", "padding", "gaps", "distortion"}
    stores = tuple(f"store.{i}." for i in range(len(header.stores)))
    strange = [name for name in file.entries if name not in known and not name.startswith(stores)]
    if strange:
        raise file.error(f"tensors that do not belong there: {', '.join(sorted(strange))}")
    for geometry in map(header.geometry, range(len(header.stores))):
        difference = identity.shape_difference(geometry.kv_heads, geometry.head_dim)
        if difference is not None:
            raise header.other_model(difference)
    with torch.inference_mode(False):
        parts = [StorePart(file, header, i, recipes[0], state) for i in range(len(header.stores))]
    check_stores(file, parts, windows, state)
    missing = sorted(set(identity.layers) - {layer for part in parts for layer in part.layers})
    if parts and missing:
        raise header.other_model(f"it has layers {missing} as well")
    return _Checked(file, recipes, state, parts, header.page_checksums)
