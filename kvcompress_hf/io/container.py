"""The safetensors container: written in one pass without a copy of the whole, read in pieces and mapped in place.

The `safetensors` package reads these files as well. It is not used here because its writer wants every tensor in
memory at once and its reader does not say where in the file a tensor lies, which mapping pages in place needs.
Format: 8 bytes of header length, a JSON header, the data (https://huggingface.co/docs/safetensors).
"""

import functools
import json
import math
import mmap
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvcompress_hf.bounded_json import parse_json
from kvcompress_hf.errors import CacheFormatError
from kvcompress_hf.io.replace import replace_file

__all__ = ["Entry", "StoredFile", "Section", "parse_bounded", "tensor_bytes", "write"]

DTYPES = {
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The `safetensors` package allows headers of 100 MB, which take seconds and gigabytes to parse. A cache's header takes
# a few kB, and about 1.3 kB more for every recipe where sequences have recipes of their own.
_MOST_HEADER = 2 * 2**20
_MOST_VALUES = 50_000
_MOST_DEPTH = 32
_MOST_REASON = 500  # characters of a message that may quote the file
_DATA_START = 4096  # data begin at a multiple of it, so that mapped pages keep the alignment they had in memory
_BLOCK = 2**20  # bytes read at a time for a checksum
_MOST_AT_ONCE = 2**30  # some systems read no more than 2 GiB in one call


@dataclass(frozen=True)
class Section:
    """A tensor to be written.

    Args:
        dtype (`torch.dtype`): Its dtype.
        shape (`tuple[int, ...]`): Its shape.
        blocks (`Iterable[memoryview]`): Its bytes in order; iterated over once, when its turn comes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Iterable[memoryview]

    @property
    def nbytes(self) -> int:
        """`int`: Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Args:
        dtype (`torch.dtype`): Its dtype.
        shape (`tuple[int, ...]`): Its shape.
        start (`int`): Offset of its first byte in the file.
        stop (`int`): Offset behind its last byte.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order.

    Args:
        tensor (`torch.Tensor`): On any device; copied only if it is not contiguous on the CPU.

    Returns:
        `memoryview`: The bytes of the tensor's elements, not copied.
    """
    array: Any = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
    return memoryview(array)


def parse_bounded(text: str | bytes | bytearray) -> Any:
    """Parses JSON from a file.

    Args:
        text (`str` or `bytes`): The JSON.

    Returns:
        `Any`: The parsed value: dicts, lists, numbers, strings.

    Raises:
        ValueError: If it is not JSON, or larger than the JSON of any cache.
    """
    return parse_json(text, most_bytes=_MOST_HEADER, most_values=_MOST_VALUES, most_depth=_MOST_DEPTH)


def write(
    path: str | os.PathLike[str],
    metadata: dict[str, str],
    sections: dict[str, Section],
    check: Callable[[Path], None] | None = None,
) -> None:
    """Writes a file, whole or not at all; see [`replace_file`].

    Args:
        path (`str` or `os.PathLike`): Where; a file that is there is replaced.
        metadata (`dict[str, str]`): Free text by name.
        sections (`dict[str, Section]`): The tensors, written in this order.
        check (`Callable`, *optional*): Given the path of the finished file before it is put in place.

    Raises:
        OSError: If it cannot be written; nothing is left behind then.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, section in sections.items():
        header[name] = {
            "dtype": _NAMES[section.dtype],
            "shape": list(section.shape),
            "data_offsets": [offset, offset + section.nbytes],
        }
        offset += section.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _DATA_START)

    def content(file: Any) -> None:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, section in sections.items():
            written = sum(file.write(block) for block in section.blocks)
            if written != section.nbytes:
                raise RuntimeError(f"Tensor {name} has {written} bytes, not {section.nbytes}.")

    replace_file(path, content, check)


class StoredFile:
    """A safetensors file; its header is checked, its data are read when they are asked for.

    Args:
        path (`str` or `os.PathLike`): The file. It must not be changed in place while [`StoredFile.view`]s of it are in
            use; [`write`] never does that.

    Raises:
        CacheFormatError: If it is not a whole safetensors file, or no ordinary file at all.
        OSError: If it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file = self._open()
        self.size = os.fstat(self._file.fileno()).st_size
        self.metadata, self.entries = self._read_header()

    def _open(self) -> Any:
        # Opening a pipe waits for a writer, and opening a device may do something, so they are not even opened.
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise self.error("it is not an ordinary file but a folder, device, pipe or socket")
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        file = os.fdopen(os.open(self.path, flags), "rb", buffering=0)
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise self.error("it is no ordinary file any more")
        return file

    def error(self, reason: str) -> CacheFormatError:
        """What to raise about this file.

        Args:
            reason (`str`): What is wrong with it.

        Returns:
            `CacheFormatError`: The error, for the caller to raise.
        """
        if len(reason) > _MOST_REASON:
            reason = reason[:_MOST_REASON] + " [...]"
        return CacheFormatError(f"{self.path} is not a valid cache file: {reason.removesuffix('.')}.")

    def _read_header(self) -> tuple[dict[str, str], dict[str, Entry]]:
        if self.size < 8:
            raise self.error(f"it has {self.size} bytes, less than the 8 that a safetensors file begins with")
        length = int.from_bytes(self._bytes(0, 8), "little")
        if not 2 <= length <= self.size - 8:
            raise self.error(f"its header would be {length:,} bytes long, but the file has {self.size:,}")
        if length > _MOST_HEADER:
            raise self.error(f"its header is {length:,} bytes long, more than the {_MOST_HEADER:,} allowed")
        try:
            header = parse_bounded(self._bytes(8, 8 + length))
        except (ValueError, RecursionError) as error:
            raise self.error(f"its header is not the JSON of a cache ({error})") from error
        if not isinstance(header, dict):
            raise self.error("its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise self.error("its metadata are not texts by name")
        entries = {name: self._entry(name, values, 8 + length) for name, values in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != end:
                raise self.error(f"tensor {name[:80]} begins at byte {entry.start:,} instead of {end:,}")
            end = entry.stop
        if end != self.size:
            raise self.error(f"its tensors end at byte {end:,}, but the file has {self.size:,} bytes (cut off?)")
        return metadata, entries

    def _entry(self, name: str, values: Any, base: int) -> Entry:
        name = name[:80]
        if not isinstance(values, dict) or set(values) != {"dtype", "shape", "data_offsets"}:
            raise self.error(f"tensor {name} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self.error(f"tensor {name} is of dtype {str(dtype)[:80]!r}, not one of {', '.join(DTYPES)}")
        if not _are_sizes(shape) or len(shape) > 8:
            raise self.error(f"tensor {name} has no valid shape ({str(shape)[:80]})")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise self.error(f"tensor {name} has no valid data_offsets ({str(offsets)[:80]})")
        start, stop = offsets
        needed = math.prod(shape) * DTYPES[dtype].itemsize
        if stop - start != needed or base + stop > self.size:
            raise self.error(
                f"tensor {name} of {needed:,} bytes would lie at bytes {start:,} to {stop:,} of {self.size - base:,}"
            )
        return Entry(DTYPES[dtype], tuple(shape), base + start, base + stop)

    def _bytes(self, start: int, stop: int) -> bytearray:
        data = bytearray(stop - start)
        self._fill(memoryview(data), start)
        return data

    def _fill(self, target: memoryview, start: int) -> None:
        """Reads bytes straight into memory."""
        # By offset: forks of a cache in other threads and processes read from the same open file.
        while target:
            count = os.preadv(self._file.fileno(), [target[:_MOST_AT_ONCE]], start)
            if not count:
                raise self.error("it became shorter while it was read")
            target, start = target[count:], start + count

    def expect(self, name: str, dtype: torch.dtype, shape: Sequence[int | None]) -> Entry:
        """Looks a tensor up.

        Args:
            name (`str`): Its name.
            dtype (`torch.dtype`): What dtype it must have.
            shape (`Sequence[int | None]`): What shape it must have; `None` for any size.

        Returns:
            `Entry`: Where the tensor lies in the file, its dtype and shape.

        Raises:
            CacheFormatError: If it is missing or other than expected.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise self.error(f"tensor {name} is missing")
        fits = len(entry.shape) == len(shape) and all(
            want is None or have == want for have, want in zip(entry.shape, shape, strict=True)
        )
        if entry.dtype is not dtype or not fits:
            wanted = ", ".join("any" if want is None else str(want) for want in shape)
            raise self.error(f"tensor {name} is {entry.dtype} {list(entry.shape)}, not {dtype} [{wanted}]")
        return entry

    def read(self, name: str, dtype: torch.dtype, shape: Sequence[int | None]) -> torch.Tensor:
        """Copies a tensor into memory.

        Args:
            name (`str`): Its name.
            dtype (`torch.dtype`): What dtype it must have.
            shape (`Sequence[int | None]`): What shape it must have; `None` for any size.

        Returns:
            `torch.Tensor`: The tensor as it was saved.

        Raises:
            CacheFormatError: If it is missing or other than expected.
        """
        entry = self.expect(name, dtype, shape)
        tensor = torch.empty(entry.shape, dtype=dtype)
        self._fill(tensor_bytes(tensor), entry.start)
        return tensor

    @functools.cached_property
    def _private(self) -> mmap.mmap:
        # Private: what a cache writes into its pages stays in memory and never reaches the file.
        try:
            return mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_COPY)
        except ValueError as error:
            raise self.error("it became shorter while it was read") from error

    def view(self, entry: Entry, first: int, count: int) -> torch.Tensor:
        """Some leading indices of a tensor in place, each view with a storage of exactly its size.

        Args:
            entry (`Entry`): The tensor.
            first (`int`): First index along its first dimension.
            count (`int`): How many, at least 1.

        Returns:
            `torch.Tensor`: A view of the mapped file; writing to it does not change the file.
        """
        step = (entry.stop - entry.start) // entry.shape[0]
        elements = count * step // entry.dtype.itemsize
        view = torch.frombuffer(self._private, dtype=entry.dtype, count=elements, offset=entry.start + first * step)
        return view.view(count, *entry.shape[1:])

    def rows(self, entry: Entry, numbers: torch.Tensor) -> torch.Tensor:
        """Copies some leading indices of a tensor into memory.

        Args:
            entry (`Entry`): The tensor.
            numbers (`torch.Tensor`): Which, `int64`, ascending.

        Returns:
            `torch.Tensor`: A tensor of as many leading indices.
        """
        if not numbers.numel():
            return torch.empty((0, *entry.shape[1:]), dtype=entry.dtype)
        first, count = int(numbers[0]), int(numbers[-1] - numbers[0]) + 1
        if count > numbers.numel():
            return self.view(entry, first, count)[numbers - first]
        step = (entry.stop - entry.start) // entry.shape[0]
        rows = torch.empty((count, *entry.shape[1:]), dtype=entry.dtype)
        self._fill(tensor_bytes(rows), entry.start + first * step)
        return rows

    def crc(self, entry: Entry, crc: int = 0) -> int:
        """CRC-32 of a tensor as it is in the file.

        Args:
            entry (`Entry`): The tensor.
            crc (`int`): Checksum to go on from.

        Returns:
            `int`: Checksum of what `crc` was of and the tensor together.

        Raises:
            CacheFormatError: If the file has become shorter.
        """
        block = memoryview(bytearray(min(_BLOCK, entry.stop - entry.start)))
        for start in range(entry.start, entry.stop, _BLOCK):
            part = block[: min(_BLOCK, entry.stop - start)]
            self._fill(part, start)
            crc = zlib.crc32(part, crc)
        return crc


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(size) is int and 0 <= size < 2**63 for size in values)
