"""Device code for an architecture: from the wheel where it is there, else compiled here and kept in a disk cache."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from .disk_cache import KernelCache
from .nvrtc import BULK, CHUNK_ROWS, SOURCES, compile_source, nvrtc_version, source_texts

__all__ = [
    "ARCHITECTURES",
    "CUBIN_DIR",
    "KERNELS",
    "architecture_of",
    "device_code",
    "has_bulk_kernels",
    "shipped",
    "shipped_architectures",
    "source_hash",
    "units_of",
]

CUBIN_DIR = Path(__file__).parent / "cubin"
MANIFEST = "manifest.json"
#: What `build.py` compiles for: compute capability to architecture.
ARCHITECTURES: dict[tuple[int, int], str] = {
    (8, 0): "sm_80",
    (8, 6): "sm_86",
    (8, 9): "sm_89",
    (9, 0): "sm_90a",
    (10, 0): "sm_100a",
    (12, 0): "sm_120a",
}
#: Major compute capabilities whose decode kernels bring pages to each warp by bulk copies: those with 228 KB of shared
#: memory. With the 100 KB of capability 12, rings would leave room for half as many warps.
BULK_CAPABILITIES = (9, 10)
#: The kernels of each translation unit.
KERNELS: dict[str, tuple[str, ...]] = {
    "storage": (
        "kvc_pack",
        "kvc_move",
        "kvc_retier",
        "kvc_fields",
        "kvc_dense",
        "kvc_slot_sums",
        "kvc_hadamard",
        "kvc_append",
        "kvc_advance",
    ),
    "attention": ("kvc_chunk", "kvc_scores", "kvc_statistics"),
    **{
        unit: tuple(unit.replace("_", f"_{dtype}_", 1).replace("decode", "kvc_decode_") for dtype in ("f16", "bf16"))
        for unit in SOURCES
        if unit.startswith("decode")
    },
    **{
        f"chunk{dim}": tuple(f"kvc_chunk_{dim}_{n}_{dtype}" for n in rows for dtype in ("f16", "bf16"))
        for dim, rows in CHUNK_ROWS.items()
    },
    **{
        f"{name}{dim}": (f"kvc_{name}_{dim}_f16", f"kvc_{name}_{dim}_bf16")
        for name in ("scores", "non_causal")
        for dim in CHUNK_ROWS
    },
}


def architecture_of(capability: tuple[int, int]) -> str:
    """The architecture to compile for.

    Args:
        capability: Compute capability of the device.

    Returns:
        Its name, such as `"sm_90a"`; one that `build.py` does not know is compiled for when it is met.
    """
    return ARCHITECTURES.get(capability, f"sm_{capability[0]}{capability[1]}")


def has_bulk_kernels(arch: str) -> bool:
    """Whether an architecture has the decode kernels that use bulk copies.

    Args:
        arch: Its name, such as `"sm_90a"`.

    Returns:
        Whether it is of one of the `BULK_CAPABILITIES`.
    """
    return int(arch.removeprefix("sm_").rstrip("af")) // 10 in BULK_CAPABILITIES


def units_of(arch: str) -> list[str]:
    """The translation units that there are for an architecture.

    Args:
        arch: Its name, such as `"sm_90a"`.

    Returns:
        Names in `SOURCES`.
    """
    return [unit for unit in SOURCES if not unit.endswith(BULK) or has_bulk_kernels(arch)]


@functools.cache
def source_hash() -> str:
    """SHA-256 of all kernel sources, headers and options: device code from others is not used."""
    return hashlib.sha256(json.dumps([source_texts(), SOURCES], sort_keys=True).encode()).hexdigest()


def shipped(unit: str, arch: str) -> bytes | None:
    """The device code that came with the package.

    Args:
        unit: A name in `SOURCES`.
        arch: The architecture.

    Returns:
        The cubin; `None` when there is none, or it is not from these sources, or not what was built.
    """
    try:
        manifest = json.loads((CUBIN_DIR / MANIFEST).read_text())
        code = (CUBIN_DIR / f"{unit}.{arch}.cubin").read_bytes()
    except (OSError, ValueError):
        return None
    known = manifest.get("cubins", {}).get(f"{unit}.{arch}", {}).get("sha256")
    if manifest.get("sources") != source_hash() or known != hashlib.sha256(code).hexdigest():
        return None
    return code


def shipped_architectures() -> list[str]:
    """The architectures that the package brings all its device code for."""
    return [arch for arch in ARCHITECTURES.values() if all(shipped(unit, arch) is not None for unit in units_of(arch))]


def device_code(unit: str, arch: str, *, use_shipped: bool = True) -> tuple[bytes, str]:
    """Device code of a translation unit.

    Args:
        unit: A name in `SOURCES`.
        arch: The architecture.
        use_shipped: Whether the package's own cubins will do; a driver older than their compiler refuses them.

    Returns:
        `(cubin, origin)`; the origin in a few words.

    Raises:
        NvrtcError: It has to be compiled, and that did not work.
    """
    code = shipped(unit, arch) if use_shipped else None
    if code is not None:
        return code, f"shipped cubins for {arch}"
    version = ".".join(map(str, nvrtc_version()))
    origin = f"compiled on this machine for {arch} by NVRTC {version}"
    kept = KernelCache.of_user()
    key = f"{unit}.{arch}.{version}.{source_hash()[:16]}"
    code = kept.read(key)
    if code is None:
        code = compile_source(unit, arch).cubin
        kept.write(key, code)
    return code, origin
