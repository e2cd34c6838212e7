"""What a page looks like, as computed by the native library (`kvc_layout`, `include/page_layout.h`).

Python never derives an offset: `page_layout()` asks the library, and every backend reads the same numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .abi import KVC_OK, MAX_FIELDS, MAX_TIERS, KvcLayout, KvcTier
from .library import load_library

__all__ = ["PageLayout", "TierLayout", "page_layout"]

MAX_HEAD_DIM = 256
SLOT_MULTIPLE = 16
PAGE_MULTIPLE = 64
BITS = (8, 4, 2)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
POSITION = "position"  # the only int32 field; all others are float32


@dataclass(frozen=True)
class TierLayout:
    """The sections of a page of one tier; offsets and sizes in bytes.

    Args:
        key_bits: Bits of a key code: 8, 4 or 2; 0 in the native tier.
        value_bits: Bits of a value code; 0 in the native tier.
        rotate_keys: Whether keys are stored Hadamard-rotated.
        slots: Slots per page, a multiple of 16.
        keys: Offset of the key codes (native tier: elements).
        key_params: Offset of the fp16 scales, then offsets, of the keys.
        values: Offset of the value codes (native tier: elements).
        value_params: Offset of the fp16 scales, then offsets, of the values.
        fields: Offset of the slot fields, `[n_fields, slots]` of 4 bytes each.
        used: Bytes of the page in use.
    """

    key_bits: int
    value_bits: int
    rotate_keys: bool
    slots: int
    keys: int
    key_params: int
    values: int
    value_params: int
    fields: int
    used: int

    @property
    def native(self) -> bool:
        """Whether slots hold the model's own dtype instead of codes."""
        return self.key_bits == 0


@dataclass(frozen=True)
class PageLayout:
    """The layout of the pages of one cache: one size for all tiers.

    Args:
        head_dim: Elements of a key or value vector.
        dtype: The native dtype: `torch.float32`, `torch.float16` or `torch.bfloat16`.
        tiers: The sections of a page in each tier.
        fields: Names of the slot fields; `"position"` is int32, all others are float32.
        page_bytes: Bytes of a page, in every tier.
        rotation_block: Size of the Hadamard blocks: the largest power of two dividing `head_dim`.
        c: The C struct handed to the backends.
    """

    head_dim: int
    dtype: torch.dtype
    tiers: tuple[TierLayout, ...]
    fields: tuple[str, ...]
    page_bytes: int
    rotation_block: int
    c: KvcLayout = field(repr=False, compare=False)

    def slot_bytes(self, tier: int) -> int:
        """Bytes one slot takes in a tier: codes, parameters and fields.

        Args:
            tier: Index into `tiers`.

        Returns:
            The exact number of bytes; a page's left-over is not included.
        """
        return self.tiers[tier].used // self.tiers[tier].slots

    def field_index(self, name: str) -> int:
        """Index of a slot field.

        Args:
            name: A name in `fields`.

        Returns:
            Its index in pages and in `Tail.fields`.

        Raises:
            ValueError: There is no such field.
        """
        if name not in self.fields:
            raise ValueError(f"there is no slot field {name!r}; this layout has {self.fields}")
        return self.fields.index(name)

    def field_dtype(self, name: str) -> torch.dtype:
        """The dtype of a slot field: int32 for `"position"`, float32 for all others."""
        return torch.int32 if name == POSITION else torch.float32


def page_layout(
    head_dim: int,
    dtype: torch.dtype,
    tiers: Sequence[tuple[int, int]],
    fields: Sequence[str] = (),
    page_bytes: int | None = None,
    resting: Sequence[int] = (),
) -> PageLayout:
    """Computes the page layout of a cache.

    Without `page_bytes`, the size is the one near 8 KiB that wastes least in the worst tier that slots stay in; with
    several such tiers it is at most 96 bytes per head dimension, because every head holds about half a page too much of
    each, and with one it holds at most 64 slots.

    Args:
        head_dim: Elements of a key or value vector: a multiple of 16, at most 256.
        dtype: The native dtype: `torch.float32`, `torch.float16` or `torch.bfloat16`.
        tiers: `(key_bits, value_bits)` of each tier, bits in 8, 4, 2; `(0, 0)` is the native tier. At most 4.
        fields: Names of the slot fields, at most 4.
        page_bytes: Bytes of a page, a multiple of 64; `None` chooses.
        resting: Indices of the tiers that slots stay in, where they only pass through the others: what a page has left
            over in those does not matter. None given: all.

    Returns:
        Size and sections of a page in each tier.

    Raises:
        ValueError: An argument is outside what is listed above, or `page_bytes` cannot hold 16 slots of a tier.
    """
    if head_dim < SLOT_MULTIPLE or head_dim > MAX_HEAD_DIM or head_dim % SLOT_MULTIPLE:
        raise ValueError(
            f"head_dim must be a multiple of {SLOT_MULTIPLE} between {SLOT_MULTIPLE} and {MAX_HEAD_DIM}, got {head_dim}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    tiers = [tuple(bits) for bits in tiers]  # type: ignore[misc]
    if not 1 <= len(tiers) <= MAX_TIERS:
        raise ValueError(f"a layout has 1 to {MAX_TIERS} tiers, got {len(tiers)}")
    for bits in tiers:
        if len(bits) != 2 or (bits != (0, 0) and not all(b in BITS for b in bits)):
            raise ValueError(f"a tier is (key_bits, value_bits) with bits in {BITS}, or (0, 0), got {bits}")
    if len(fields) > MAX_FIELDS or len(set(fields)) != len(fields):
        raise ValueError(f"a layout has at most {MAX_FIELDS} slot fields of different names, got {tuple(fields)}")
    if any(not 0 <= tier < len(tiers) for tier in resting):
        raise ValueError(f"resting are indices of {len(tiers)} tiers, got {tuple(resting)}")
    if page_bytes is not None and (page_bytes <= 0 or page_bytes % PAGE_MULTIPLE):
        raise ValueError(f"page_bytes must be a positive multiple of {PAGE_MULTIPLE}, got {page_bytes}")

    c = KvcLayout(head_dim=head_dim, dtype=DTYPES[dtype], n_tiers=len(tiers), n_fields=len(fields))
    c.page_bytes = page_bytes or 0
    c.resting = sum(1 << tier for tier in set(resting))
    for i, (key_bits, value_bits) in enumerate(tiers):
        c.tier[i].key_bits, c.tier[i].value_bits = key_bits, value_bits
    if load_library().kvc_layout(ctypes.byref(c)) != KVC_OK:
        raise ValueError(
            f"page_bytes={page_bytes} is too small: every tier of {tiers} must fit {SLOT_MULTIPLE} slots of "
            f"head_dim {head_dim} with {len(fields)} fields; leave page_bytes out to have it chosen"
        )
    return PageLayout(
        head_dim=head_dim,
        dtype=dtype,
        tiers=tuple(
            TierLayout(
                **{
                    name: bool(value) if name == "rotate_keys" else value
                    for name, _ in KvcTier._fields_
                    for value in [getattr(c.tier[i], name)]
                }
            )
            for i in range(len(tiers))
        ),
        fields=tuple(fields),
        page_bytes=c.page_bytes,
        rotation_block=c.rotation_block,
        c=c,
    )
