"""Compiles every kernel for every architecture, without a GPU, and holds them to their registers and to no spills.

    python -m kvcompress_hf.kernels.cuda.build            # report, check and write the cubins for a wheel
    python -m kvcompress_hf.kernels.cuda.build --check    # report and check only

Needs `pip install nvidia-cuda-nvrtc` in the version named below: cubins of CUDA 13.0 load on every driver of CUDA 13.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence

from .images import ARCHITECTURES, CUBIN_DIR, KERNELS, MANIFEST, source_hash, units_of
from .nvrtc import BULK, SOURCES, KernelResources, compile_source, nvrtc_version

__all__ = ["NVRTC_VERSION", "REGISTERS", "main", "problems", "resident_warps"]

NVRTC_VERSION = (13, 0)
#: Most registers per thread: a multiprocessor has room for four blocks of 128 threads with 128, three with 168, two
#: with 255.
REGISTERS: dict[str, int] = {
    "storage": 80,
    "attention": 168,
    "decode64_8": 168,
    "decode64_16": 224,
    "decode128_8": 168,
    "decode128_8_k8v4": 168,  # before sm_90; since then 128
    "decode128_8_k4v4": 128,
    "decode128_8_k4v2": 128,
    "decode128_8_k2v2": 128,
    "decode128_16": 255,
    "decode256_8": 255,
    "decode256_16": 255,
    "chunk64": 255,
    "chunk128": 255,
    "chunk256": 255,
    "scores64": 128,
    "scores128": 168,
    "scores256": 255,
    "non_causal64": 168,
    "non_causal128": 168,
    "non_causal256": 255,
}
REGISTERS |= {unit: REGISTERS[unit.removesuffix(BULK)] for unit in SOURCES if unit.endswith(BULK)}
#: What a multiprocessor has room for: warps, blocks, bytes of shared memory (CUDA programming guide, by capability).
ROOM: dict[str, tuple[int, int, int]] = {
    "sm_80": (64, 32, 164 << 10),
    "sm_86": (48, 16, 100 << 10),
    "sm_89": (48, 24, 100 << 10),
    "sm_90a": (64, 32, 228 << 10),
    "sm_100a": (64, 32, 228 << 10),
    "sm_120a": (48, 24, 100 << 10),
}
ALL_REGISTERS = 1 << 16  # of a multiprocessor; a warp takes them in units of 256
RESERVED_SHARED = 1024  # bytes of every block
WARPS = {"kvc_advance": 1}  # of a block, where they are not four


def resident_warps(kernel: KernelResources, arch: str) -> int:
    """Warps of a kernel that a multiprocessor holds at once.

    Args:
        kernel: What the assembler reported.
        arch: An architecture in `ROOM`.

    Returns:
        The number of warps.
    """
    most_warps, most_blocks, shared = ROOM[arch]
    warps = WARPS.get(kernel.name, 4)
    by_registers = ALL_REGISTERS // (-(-32 * kernel.registers // 256) * 256) // warps
    by_shared = shared // (kernel.shared_bytes + RESERVED_SHARED)
    return warps * min(most_warps // warps, most_blocks, by_registers, by_shared)


def problems(unit: str, kernels: Sequence[KernelResources]) -> list[str]:
    """What is wrong with a compiled unit.

    Args:
        unit: A name in `SOURCES`.
        kernels: What the assembler reported.

    Returns:
        One line per fault: spills, more registers than `REGISTERS` allows, a kernel missing or unknown.
    """
    found = []
    names = {kernel.name for kernel in kernels}
    for name in sorted(names ^ set(KERNELS[unit])):
        found.append(f"{name} is {'not listed' if name in names else 'missing'} in {unit}")
    for kernel in kernels:
        if kernel.spill_bytes:
            found.append(f"{kernel.name} spills {kernel.spill_bytes} bytes")
        if kernel.registers > REGISTERS[unit]:
            found.append(f"{kernel.name} takes {kernel.registers} registers, more than {REGISTERS[unit]}")
    return found


def _warps(kernel: KernelResources, arch: str) -> str:
    return str(resident_warps(kernel, arch)) if arch in ROOM else "?"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments; `None` takes them from the command line.

    Returns:
        0, or 1 where a kernel has a fault.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES.values()), help="architectures")
    parser.add_argument("--unit", nargs="+", default=list(SOURCES), choices=list(SOURCES), help="translation units")
    args = parser.parse_args(argv)
    if not args.check and nvrtc_version() != NVRTC_VERSION:
        parser.error(f"cubins are built with NVRTC {NVRTC_VERSION}, this is {nvrtc_version()}")
    faults, cubins = [], {}
    for arch in args.arch:
        for unit in (unit for unit in args.unit if unit in units_of(arch)):
            compiled = compile_source(unit, arch)
            for kernel in compiled.kernels:
                sys.stdout.write(
                    f"{arch:8} {kernel.name:22} {kernel.registers:4} registers {kernel.spill_bytes:5} bytes spilled "
                    f"{kernel.shared_bytes:6} bytes shared {_warps(kernel, arch):>3} warps per multiprocessor\n"
                )
            sys.stdout.flush()
            faults += [f"{arch}: {line}" for line in problems(unit, compiled.kernels)]
            cubins[f"{unit}.{arch}"] = compiled.cubin
    for fault in faults:
        sys.stderr.write(f"{fault}\n")
    if faults:
        return 1
    if not args.check:
        CUBIN_DIR.mkdir(exist_ok=True)
        for old in CUBIN_DIR.glob("*.cubin"):
            old.unlink()
        for name, code in cubins.items():
            (CUBIN_DIR / f"{name}.cubin").write_bytes(code)
        hashes = {name: {"sha256": hashlib.sha256(code).hexdigest()} for name, code in cubins.items()}
        manifest = {"sources": source_hash(), "nvrtc": list(NVRTC_VERSION), "cubins": hashes}
        (CUBIN_DIR / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
