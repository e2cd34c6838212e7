"""The safetensors container: written in one pass without a copy of the whole, read through a memory map.

The `safetensors` package reads these files as well. It is not used here because its writer wants every tensor in
memory at once and its reader does not say where in the file a tensor lies, which mapping pages in place needs.
Format: 8 bytes of header length, a JSON header, the data (https://huggingface.co/docs/safetensors).
"""

import json
import math
import mmap
import os
import secrets
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvcompress_hf.errors import CacheFormatError

__all__ = ["Entry", "Mapped", "Section", "tensor_bytes", "write"]

DTYPES = {
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the safetensors package's own limit
_DATA_START = 4096  # data begin at a multiple of it, so that mapped pages keep the alignment they had in memory
_CRC_BLOCK = 16 * 2**20


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
        `memoryview`: Its bytes.
    """
    array: Any = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
    return memoryview(array)


def write(path: str | os.PathLike[str], metadata: dict[str, str], sections: dict[str, Section]) -> None:
    """Writes a file, whole or not at all: it appears under its name when everything is on disk.

    Args:
        path (`str` or `os.PathLike`): Where; a file that is there is replaced.
        metadata (`dict[str, str]`): Free text by name.
        sections (`dict[str, Section]`): The tensors, written in this order.

    Raises:
        OSError: If the folder does not exist or the disk is full; nothing is left behind then.
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
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
    try:
        with open(unfinished, "xb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for name, section in sections.items():
                written = sum(file.write(block) for block in section.blocks)
                if written != section.nbytes:
                    raise RuntimeError(f"Tensor {name} has {written} bytes, not {section.nbytes}.")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


class Mapped:
    """A safetensors file, mapped into memory; its header is checked, its data are read when they are asked for.

    Args:
        path (`str` or `os.PathLike`): The file. It must not be changed in place while the map is in use;
            [`write`] never does that.

    Raises:
        CacheFormatError: If it is not a whole safetensors file.
        OSError: If it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size < 8:
                raise self.error(f"it has {self.size} bytes, less than the 8 that a safetensors file begins with")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # Private: what a cache writes into its pages stays in memory and never reaches the file.
            self._private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if len(self._bytes) != self.size or len(self._private) != self.size:
            raise self.error("it is being written to")
        self.metadata, self.entries = self._read_header()

    def error(self, reason: str) -> CacheFormatError:
        """What to raise about this file.

        Args:
            reason (`str`): What is wrong with it.

        Returns:
            `CacheFormatError`: The error, not raised.
        """
        return CacheFormatError(f"{self.path} is not a valid cache file: {reason}.")

    def _read_header(self) -> tuple[dict[str, str], dict[str, Entry]]:
        length = int.from_bytes(self._bytes[:8], "little")
        if not 2 <= length <= min(_MAX_HEADER, self.size - 8):
            raise self.error(f"its header would be {length:,} bytes long, but the file has {self.size:,}")
        try:
            header = json.loads(self._bytes[8 : 8 + length], object_pairs_hook=_no_repeats)
        except (ValueError, RecursionError) as error:
            raise self.error(f"its header is not JSON ({error})") from error
        if not isinstance(header, dict):
            raise self.error("its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise self.error("its metadata are not texts by name")
        entries = {name: self._entry(name, values, 8 + length) for name, values in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != end:
                raise self.error(f"tensor {name} begins at byte {entry.start:,} instead of {end:,}")
            end = entry.stop
        if end != self.size:
            raise self.error(f"its tensors end at byte {end:,}, but the file has {self.size:,} bytes (cut off?)")
        return metadata, entries

    def _entry(self, name: str, values: Any, base: int) -> Entry:
        if not isinstance(values, dict) or set(values) != {"dtype", "shape", "data_offsets"}:
            raise self.error(f"tensor {name} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self.error(f"tensor {name} is of dtype {dtype!r}, not one of {', '.join(DTYPES)}")
        if not _are_sizes(shape) or len(shape) > 8:
            raise self.error(f"tensor {name} has no valid shape ({shape!r})")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise self.error(f"tensor {name} has no valid data_offsets ({offsets!r})")
        start, stop = offsets
        needed = math.prod(shape) * DTYPES[dtype].itemsize
        if stop - start != needed or base + stop > self.size:
            raise self.error(
                f"tensor {name} of {needed:,} bytes would lie at bytes {start:,} to {stop:,} of {self.size - base:,}"
            )
        return Entry(DTYPES[dtype], tuple(shape), base + start, base + stop)

    def expect(self, name: str, dtype: torch.dtype, shape: Sequence[int | None]) -> Entry:
        """Looks a tensor up.

        Args:
            name (`str`): Its name.
            dtype (`torch.dtype`): What dtype it must have.
            shape (`Sequence[int | None]`): What shape it must have; `None` for any size.

        Returns:
            `Entry`: Where it is.

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
            `torch.Tensor`: The tensor.

        Raises:
            CacheFormatError: If it is missing or other than expected.
        """
        entry = self.expect(name, dtype, shape)
        if entry.start == entry.stop:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(bytearray(self._bytes[entry.start : entry.stop]), dtype=dtype).view(entry.shape)

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

    def crc(self, entry: Entry, crc: int = 0) -> int:
        """CRC-32 of a tensor as it is in the file.

        Args:
            entry (`Entry`): The tensor.
            crc (`int`): To go on from.

        Returns:
            `int`: The checksum.
        """
        with memoryview(self._bytes) as data:
            for start in range(entry.start, entry.stop, _CRC_BLOCK):
                crc = zlib.crc32(data[start : min(start + _CRC_BLOCK, entry.stop)], crc)
        return crc


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name comes twice")
    return result


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**63 for size in values
    )
