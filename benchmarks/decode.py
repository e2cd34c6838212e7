"""Decode attention of one layer: the stored tiers against the best forms torch has.

One new token attends to `context` stored tokens (8 KV heads of 128 dims, 4 query heads each, unless told
otherwise). Every call gets another set of buffers, so many that the last-level cache is of no help, and pages lie
in random order. Times are per layer; forms take turns, so that a busy machine hits all alike.

    python benchmarks/decode.py --contexts 8192,32768 --threads 1,2 --json decode.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import kvcompress_hf
from kvcompress_hf.kernels import CpuBackend, Rows, Tail, page_layout
from kvcompress_hf.kernels.memory import page_memory

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TIERS = {"native": (0, 0), "k8v8": (8, 8), "k8v4": (8, 4), "k4v4": (4, 4), "k4v2": (4, 2), "k2v2": (2, 2)}
SLAB_BYTES = 4 << 20  # as the cache allocates its pages
Form = Callable[[int], object]  # runs once on the buffers of a set


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def packed_sets(
    backend: CpuBackend, bits: tuple[int, int], args: argparse.Namespace, context: int, cache_bytes: int
) -> tuple[list[Rows], int]:
    """Rows with `context` slots in one tier, as many sets as leave the last-level cache; bytes of one set."""
    dtype = DTYPES[args.dtype]
    layout = page_layout(args.head_dim, dtype, [bits])
    pages = -(-context // layout.tiers[0].slots)
    size = pages * args.kv_heads * layout.page_bytes
    n_sets = max(2, cache_bytes // size + 1)
    slab_shift = (SLAB_BYTES // layout.page_bytes).bit_length() - 1
    n_slabs = (pages * args.kv_heads * n_sets >> slab_shift) + 1
    slabs = [page_memory(1 << slab_shift, layout.page_bytes) for _ in range(n_slabs)]
    addresses = torch.tensor([slab.data_ptr() for slab in slabs], dtype=torch.int64)
    order = torch.randperm(n_slabs << slab_shift, generator=torch.Generator().manual_seed(0)).int()
    lengths = torch.zeros(args.kv_heads, dtype=torch.int32)
    sets = []
    for i in range(n_sets):
        table = order[i * pages * args.kv_heads :][: pages * args.kv_heads].view(args.kv_heads, pages)
        rows = Rows(layout, slabs, addresses, slab_shift, [table], [lengths.clone()])
        for start in range(0, context, 4096):
            n = min(4096, context - start)
            k, v = (torch.randn(1, args.kv_heads, n, args.head_dim).to(dtype) for _ in range(2))
            counts = torch.full((1, args.kv_heads), n, dtype=torch.int32)
            backend.pack(rows, 0, k, v, counts, None, {})
            rows.lengths[0] += n
        sets.append(rows)
    return sets, context * args.kv_heads * layout.slot_bytes(0)


def our_form(backend: CpuBackend, sets: list[Rows], q: Tensor, args: argparse.Namespace) -> Form:
    """Attention through prepared plans, one per set; nothing is appended, so that sets stay as they are."""
    shape = (1, args.kv_heads, 0, args.head_dim)
    tail = Tail(
        torch.empty(shape, dtype=q.dtype),
        torch.empty(shape, dtype=q.dtype),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(1, 0, dtype=torch.int32),
    )
    plans = [backend.plan_decode(rows, tail, scale=args.head_dim**-0.5, q_heads=q.shape[1]) for rows in sets]
    return lambda i: plans[i % len(plans)].run(q, None, None, 0, append=False)


def torch_forms(q: Tensor, args: argparse.Namespace, context: int, cache_bytes: int) -> dict[str, Form]:
    """The dense alternatives: keys and values in the model's dtype, contiguous."""
    dtype = DTYPES[args.dtype]
    size = 2 * context * args.kv_heads * args.head_dim * dtype.itemsize
    n_sets = max(2, cache_bytes // size + 1)
    shape = (1, args.kv_heads, context, args.head_dim)
    sets = [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(n_sets)]
    packed = q.view(1, args.kv_heads, args.group, args.head_dim)
    scale = args.head_dim**-0.5
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def matmul(i: int) -> Tensor:
        k, v = sets[i % n_sets]
        return torch.matmul(torch.softmax(torch.matmul(packed * scale, k.transpose(-1, -2)), -1), v)

    def sdpa_packed(i: int) -> Tensor:
        k, v = sets[i % n_sets]
        return sdpa(packed, k, v)

    def sdpa_gqa(i: int) -> Tensor:
        k, v = sets[i % n_sets]
        return sdpa(q, k, v, enable_gqa=True)

    forms: dict[str, Form] = {"torch matmul-softmax-matmul": matmul, "torch SDPA packed": sdpa_packed}
    if not args.skip_gqa:
        forms["torch SDPA enable_gqa"] = sdpa_gqa
    return forms


def bandwidth(size: int = 256 << 20) -> float:
    """Bytes per second of the fastest plain read of memory (a sum over int64), at torch's thread count."""
    buffer = torch.ones(size // 8, dtype=torch.int64)
    best = float("inf")
    for _ in range(9):
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return size / best


def measure(forms: dict[str, Form], seconds: float) -> dict[str, dict[str, float]]:
    """Median and minimum, in ms, of each form; forms take turns for `seconds` times their number."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        form(0)
    turn, end = 1, time.perf_counter() + seconds * len(forms)
    while time.perf_counter() < end or turn < 6:
        for name, form in forms.items():
            repeat = 1 if name == "torch SDPA enable_gqa" else 5
            for i in range(repeat):
                start = time.perf_counter()
                form(turn * repeat + i)
                times[name].append((time.perf_counter() - start) * 1e3)
        turn += 1
    return {name: {"median_ms": statistics.median(t), "min_ms": min(t)} for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="8192,32768", help="stored tokens, comma-separated")
    parser.add_argument("--threads", default="1,2", help="thread counts, comma-separated")
    parser.add_argument("--tiers", default="native,k8v8,k8v4,k4v4,k4v2", help=f"of {', '.join(TIERS)}")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4, help="query heads per KV head")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--isa", default=None, help="avx512vnni, avx2 or scalar; default: the best here")
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time per form and setting")
    parser.add_argument("--cache-mib", type=int, default=160, help="bytes of buffers to rotate through, at least")
    parser.add_argument("--skip-gqa", action="store_true", help="leave out SDPA enable_gqa, which is very slow")
    parser.add_argument("--json", default=None, help="file to write the results to")
    args = parser.parse_args()

    backend = CpuBackend(args.isa)
    torch.manual_seed(0)
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "isa": backend.isa,
        "torch": torch.__version__,
        "kvcompress_hf": getattr(kvcompress_hf, "__version__", "source"),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{args.kv_heads} KV heads x {args.head_dim}, {args.group} query heads each, {args.dtype}")
    results = []
    for context in map(int, args.contexts.split(",")):
        q = torch.randn(1, args.kv_heads * args.group, 1, args.head_dim).to(DTYPES[args.dtype])
        forms = torch_forms(q, args, context, args.cache_mib << 20)
        dense_bytes = 2 * context * args.kv_heads * args.head_dim * DTYPES[args.dtype].itemsize
        sizes = dict.fromkeys(forms, dense_bytes)
        for tier in args.tiers.split(","):
            sets, sizes[tier] = packed_sets(backend, TIERS[tier], args, context, args.cache_mib << 20)
            forms[tier] = our_form(backend, sets, q, args)
        for threads in map(int, args.threads.split(",")):
            torch.set_num_threads(threads)
            speed = bandwidth()
            times = measure(forms, args.seconds)
            dense = [t for name, t in times.items() if name.startswith("torch")]
            best = {key: min(t[key] for t in dense) for key in ("median_ms", "min_ms")}
            print(f"\ncontext {context}, {threads} thread(s), memory read {speed / 1e9:.1f} GB/s")
            heads = f"{'MB':>8}{'floor ms':>10}{'median ms':>11}{'min ms':>9}{'% of floor':>12}{'x best torch':>14}"
            print(f"{'':30}{heads}")
            for name, t in times.items():
                floor = sizes[name] / speed * 1e3
                ratio = {key: best[key] / t[key] for key in best}
                print(
                    f"{name:30}{sizes[name] / 1e6:8.1f}{floor:10.3f}{t['median_ms']:11.3f}{t['min_ms']:9.3f}"
                    f"{100 * floor / t['min_ms']:11.0f}%{ratio['median_ms']:14.2f}"
                )
                ratios = {"times_best_torch_median": ratio["median_ms"], "times_best_torch_min": ratio["min_ms"]}
                setting = dict(context=context, threads=threads, form=name, bytes=sizes[name])
                results.append(setting | dict(bytes_per_second=speed, floor_ms=floor) | t | ratios)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        with open(args.json, "w") as file:
            json.dump({"machine": machine, "arguments": vars(args), "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
