"""One command for a machine with a GPU: measures decoding, checks every kernel, and writes a line of JSON per item.

    python benchmarks/gpu.py --out benchmarks/results/gpu_h100.jsonl
    python benchmarks/gpu.py --parts throughput --out benchmarks/results/gpu_h100_throughput.jsonl

Each meant for ten minutes without network. In order, so that a run that is cut short has the most important part:

- `decode`: what memory can do; decode attention of one layer, every tier against the best of SDPA's flash and cuDNN
  kernels (and flash-attn where it is installed), with its error against float64 and the host's time for a call; where
  pages come by bulk copies, also without these.
- `sweep`: the same without dense attention from 16 slots on, which tells what a launch costs whatever it does.
- `tests`: `tests/gpu`, every kernel against the reference.
- `statistics`: a step that adds probabilities up.
- `chunk`: later turns and drafted tokens against SDPA over the past dequantised before; `prefill`: window scores, the
  second look (also in plain torch) and packing against the prefill they belong to.
- `model`: a decode step of Llama-8B's shape with random weights against `DynamicCache`, by the clock and by the device,
  run and replayed from a CUDA graph; median of a step, and the mean with packings and captures.
- `throughput`: how many sequences fit into a fixed KV memory, and tokens per second with that many.

Kernels are timed in CUDA graphs over caches that take turns (`gpu_timing.py`). Items run in child processes
(`gpu_runner.py`); one that crashes or hangs is noted, and the rest goes on. Started again with the same file, the
command does what is missing. `--device cpu` runs the same on the CPU backend in small, to see that the command works.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import transformers
from gpu_items import TIERS, layer_items
from gpu_models import model_items
from gpu_runner import Item, Log, run_items, supervise

from kvcompress_hf.kernels import get_backend
from kvcompress_hf.kernels.cuda import CudaBackend
from kvcompress_hf.kernels.cuda.images import KERNELS
from kvcompress_hf.units import parse_bytes

PARTS = ("decode", "sweep", "tests", "statistics", "chunk", "prefill", "model", "throughput")
TESTS = Path(__file__).parents[1] / "tests" / "gpu"
TESTS_LIMIT = 170  # seconds


def machine_item(args: argparse.Namespace) -> dict:
    """The device, the versions, and how many thread blocks of each kernel the device runs at once."""
    backend, cuda = get_backend(args.device), args.device.type == "cuda"
    row: dict[str, object] = {
        "device": torch.cuda.get_device_name(args.device) if cuda else platform.processor(),
        "backend": f"{backend.name}: {backend.reason}",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }
    if isinstance(backend, CudaBackend):
        kernels = [name for names in KERNELS.values() for name in names]
        row["resident_blocks"] = {name: backend.launcher.resident(name, 128, args.device) for name in kernels}
    return row


def tests_item(args: argparse.Namespace) -> dict:
    """`tests/gpu`, in processes side by side where pytest can; all output goes to a file."""
    # From that folder, so that the installed package is found and not the half of it in the repository's root.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=12", str(TESTS)]
    command += ["-n", "8"] if importlib.util.find_spec("xdist") and args.device.type == "cuda" else []
    path = args.out.with_suffix(".tests.log")
    with path.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, cwd=TESTS, timeout=TESTS_LIMIT)
    return dict(exit_status=done.returncode, summary=path.read_text().strip().splitlines()[-1])


def all_items(args: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], dict]]]:
    """Part, name and function of every item there is."""
    yield from layer_items(args)
    yield "tests", "tests", partial(tests_item, args)
    yield from model_items(args)


def chosen_items(args: argparse.Namespace) -> dict[str, Item]:
    """The items of the parts that are asked for, part by part."""
    every = list(all_items(args))
    items: dict[str, Item] = {"machine": partial(machine_item, args)}
    for part in args.parts:
        items |= {name: partial(alone, item) for each, name, item in every if each == part}
    return items


def alone(item: Item) -> dict:
    """Runs an item with the memory of those before it given back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return item()


def breaks_the_device(error: Exception) -> bool:
    """Whether what comes next could only fail too: CUDA errors stay with a process, running out of memory does not."""
    return not isinstance(error, torch.OutOfMemoryError) and (
        "CUDA error" in str(error) or type(error).__name__ in ("DriverError", "AcceleratorError")
    )


def plain_line(name: str, row: dict) -> Iterator[str]:
    """The same caches by the kernels without bulk copies, where there are both."""
    if "without_bulk_copies_ms" in row:
        yield f"{name}{1e3 * row['without_bulk_copies_ms']:10.1f} us without bulk copies"


def lines_of(row: dict) -> Iterator[str]:
    """A result in a line or a few, for people."""
    name = f"{row['item']:34}"
    if "failed" in row:
        yield f"{name} FAILED: {row['failed'][:120]}"
    elif "times_best_dense" in row and "tier" in row:
        yield (
            f"{name}{1e3 * row['ms']:10.1f} us{row['bytes_per_s'] / 1e9:9.0f} GB/s{row['times_best_dense']:8.2f} x "
            f"{row['best_dense']}; host {row['host_us']:.0f} us, error {row.get('error', float('nan')):.1e}"
        )
        yield from plain_line(name, row)
    elif "tier" in row:
        yield f"{name}{1e3 * row['ms']:10.1f} us{row['bytes_per_s'] / 1e9:9.0f} GB/s; host {row['host_us']:.0f} us"
        yield from plain_line(name, row)
    elif isinstance(row.get("ms"), dict):
        yield from (f"{name}{form:32}{ms:10.4f} ms" for form, ms in row["ms"].items())
    elif "cache" in row:
        device = f", on the device {row['gpu_ms']:.2f} ms" if "gpu_ms" in row else ""
        yield f"{name}{row['bytes'] / 2**20:10.0f} MiB{row['ms']:10.2f} ms a step{device}"
    elif "setting" in row:
        speeds = f"{row['tokens_per_s']:12.1f} tokens/s{row['decoded_per_s']:12.1f} decoding"
        yield f"{name}{row['batch']:6} sequences{speeds}"
    else:
        shown = {key: value for key, value in row.items() if key not in ("item", "arguments", "resident_blocks")}
        yield f"{name}{shown}"


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--tiers", nargs="+", default=["k8v4", "k4v2", "native", "k8v8", "k4v4", "k2v2"], choices=TIERS)
    parser.add_argument("--contexts", nargs="+", type=int, default=[32768])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--model-batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4, help="query heads per KV head")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name.removeprefix("torch.")), default=torch.float16)
    parser.add_argument("--chunk-queries", nargs="+", type=int, default=[4, 16, 512], help="new tokens of a chunk")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", nargs="+", default=list(PARTS[:-1]), choices=PARTS)
    parser.add_argument("--prompt", type=int, default=6000, help="throughput: tokens of a prompt")
    parser.add_argument("--new", type=int, default=500, help="throughput: tokens decoded after each")
    parser.add_argument("--kv-memory", type=parse_bytes, default="20GiB", help="throughput: what all caches may take")
    parser.add_argument("--budgets", nargs="*", type=int, default=[1, 4, 8, 16, 64], help="throughput: 1/n of dense")
    parser.add_argument(
        "--most-sequences", type=int, default=96, help="throughput: a prompt's activations need room too"
    )
    parser.add_argument("--out", type=Path, required=True, help="file that results are added to, a line of JSON each")
    parser.add_argument("--limit", type=float, default=570, help="seconds for everything")
    parser.add_argument("--stall", type=float, default=TESTS_LIMIT + 30, help="seconds after which an item hangs")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; --device cpu tries the command on the CPU")
    return args


def main() -> int:
    """The parent, or a child of it."""
    args = parse()
    log = Log(args.out)
    if args.child:
        torch.manual_seed(0)
        return run_items(chosen_items(args), log, breaks_the_device)
    supervise([sys.executable, __file__, *sys.argv[1:], "--child"], log, limit=args.limit, stall=args.stall)
    for row in log.rows():
        if "item" in row:
            print("\n".join(lines_of(row)))
    missing = chosen_items(args).keys() - log.done()
    print(
        f"{len(log.done())} items in {args.out}" + (f"; not reached: {', '.join(sorted(missing))}" if missing else "")
    )
    return 1 if missing or any("failed" in row for row in log.rows()) else 0


if __name__ == "__main__":
    sys.exit(main())
