"""`kvcompress presets` and `kvcompress doctor`: what there is, and what this machine uses of it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from .table import columns


def add_commands(commands: Any) -> None:
    """Add both subcommands to the parser's subparsers action."""
    presets = commands.add_parser("presets", help="list the named recipes, or print one as JSON")
    presets.add_argument("name", nargs="?", help="print this preset as JSON")
    presets.add_argument("--debug", action="store_true", help="show the traceback of an error")
    presets.set_defaults(run=run_presets)
    doctor = commands.add_parser("doctor", help="show versions, and which backend is used and why")
    doctor.add_argument(
        "--transformers", action="store_true", help="check that the installed transformers has all that is needed of it"
    )
    doctor.add_argument("--debug", action="store_true", help="show the traceback of an error")
    doctor.set_defaults(run=run_doctor)


def run_presets(args: argparse.Namespace) -> int:
    """Print every preset with its one-line description, or one as JSON."""
    import kvcompress_hf as kvc

    if args.name:
        from kvcompress_hf.presets import get_preset

        print(get_preset(args.name).to_json())
        return 0
    print(columns([[name, line] for name, line in kvc.presets().items()]))
    return 0


def version_of(distribution: str) -> str:
    """The installed version of a distribution, or `"not installed"`."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The CPU's name as the system gives it; its architecture where there is none."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def run_doctor(args: argparse.Namespace) -> int:
    """Print versions, what the CUDA kernels depend on, and per device the backend and the reason it was chosen."""
    if args.transformers:
        return run_contract()
    import torch

    from kvcompress_hf.compat import TESTED
    from kvcompress_hf.kernels import cuda, get_backend

    rows = [
        ["python", platform.python_version()],
        ["machine", f"{processor()}, {platform.machine()}, {os.cpu_count()} CPUs"],
    ]
    needs = next(
        (r.split(";")[0] for r in importlib.metadata.requires("kvcompress-hf") or () if r.startswith("transformers")),
        "",
    )
    for name in (
        "kvcompress-hf",
        "torch",
        "transformers",
        "accelerate",
        "safetensors",
        "numpy",
        "matplotlib",
    ):
        note = ""
        if name == "transformers":
            note = f"   (required: {needs.removeprefix('transformers')}, tested: {TESTED[0]} to {TESTED[-1]})"
        rows.append([name, version_of(name) + note])
    rows.append(["torch threads", str(torch.get_num_threads())])
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    rows.append(["torch is built", built])
    rows += [[what, text] for what, text in cuda.describe()]
    backend = get_backend("cpu")
    rows.append(["backend on cpu", f"{backend.name}: {backend.reason}"])
    if not torch.cuda.is_available():
        rows.append(["backend on cuda", "none: PyTorch sees no CUDA device"])
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append([f"cuda:{index}", f"{properties.name}, compute capability {properties.major}.{properties.minor}"])
        backend = get_backend(torch.device("cuda", index))
        rows.append([f"backend on cuda:{index}", f"{backend.name}: {backend.reason}"])
    print(columns(rows))
    return 0


def run_contract() -> int:
    """Print one line per item that the package needs of transformers; 1 if any does not hold."""
    from kvcompress_hf.compat import TESTED, installed_version, is_tested
    from kvcompress_hf.patches.core import contract_results

    version, results = installed_version(), contract_results()
    print(columns([["ok" if holds else "BROKEN", name, what] for name, holds, what in results]))
    broken = sum(not holds for _, holds, _ in results)
    tested = "tested" if is_tested(version) else f"not tested (tested: {TESTED[0]} to {TESTED[-1]})"
    print(f"transformers {version}, {tested}: " + (f"{broken} items broken" if broken else "the contract holds"))
    return 1 if broken else 0
