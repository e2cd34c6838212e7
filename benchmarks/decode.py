"""Decode attention of one layer: the stored tiers against torch, transformers' QuantizedCache and a dense kernel.

One new token attends to `context` stored tokens (8 KV heads of 128 dims, 4 query heads each, unless told
otherwise). Every call gets another set of buffers, so many that the last-level cache is of no help, and pages lie
in random order. Times are per layer; forms take turns, so that a busy machine hits all alike. The floor is the time
that reading a form's bytes takes at the speed of a plain read of memory in the same run.

    python benchmarks/decode.py --contexts 4096,16384 --threads 1,2 --json decode.json

After the tables: whether cost is linear in stored slots, and flat in tokens seen when a budget keeps few of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from decode_forms import QUANTIZED_LAYERS, TIERS, Form, Setting, dense_forms, quantized_cache_form, tier_form
from dense_bf16 import NotAvailableError
from machine import machine

from kvcompress_hf.kernels import CpuBackend, Logits
from kvcompress_hf.kernels.memory import page_memory
from kvcompress_hf.presets import get_preset, resolve_rows
from kvcompress_hf.runtime.attention import PagedAttention
from kvcompress_hf.runtime.call import AttentionCall

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KEPT, SEEN = 2048, (4096, 65536)  # tokens, for the cost of tokens that were seen and evicted


def bandwidth(size: int = 256 << 20) -> float:
    """Bytes per second of the fastest plain read of memory (a sum over int64), at torch's thread count."""
    best = float("inf")
    for buffer in (torch.ones(size, dtype=torch.uint8), page_memory(size >> 20, 1 << 20).fill_(1)):
        numbers = buffer.view(-1).view(torch.int64)
        for _ in range(9):
            start = time.perf_counter()
            numbers.sum()
            best = min(best, time.perf_counter() - start)
    return size / best


def measure(forms: list[Form], seconds: float) -> dict[str, dict[str, float]]:
    """Median and minimum, in ms, of each form; forms take turns for `seconds` times their number."""
    times: dict[str, list[float]] = {form.name: [] for form in forms}
    for form in forms:
        form.run(0)
    turn, end = 1, time.perf_counter() + seconds * len(forms)
    while time.perf_counter() < end or turn < 6:
        for form in forms:
            for i in range(form.repeat):
                start = time.perf_counter()
                form.run(turn * form.repeat + i)
                times[form.name].append((time.perf_counter() - start) * 1e3)
        turn += 1
    return {name: {"median_ms": statistics.median(t), "min_ms": min(t)} for name, t in times.items()}


@torch.no_grad()
def cost_of_tokens_seen(steps: int = 200) -> dict[int, float]:
    """Least ms of a decode step of one layer that keeps KEPT tokens per head, after each number of SEEN tokens."""
    costs, logits = {}, Logits(0.125)
    for seen in SEEN:
        attention = PagedAttention(resolve_rows(get_preset("streaming").with_overrides(budget=KEPT)), [None])

        def step(n: int, attention: PagedAttention = attention) -> torch.Tensor:
            q, k, v = (torch.randn(1, n, heads, 64).bfloat16().transpose(1, 2) for heads in (8, 2, 2))
            dense = lambda: torch.zeros(1, n, 8, 64, dtype=torch.bfloat16)  # noqa: E731
            return attention.attend(0, AttentionCall(q, k, v, logits), None, dense)

        for _ in range(seen // 1024):
            step(1024)
        best = float("inf")
        for _ in range(steps):
            start = time.perf_counter()
            step(1)
            best = min(best, time.perf_counter() - start)
        costs[seen] = best * 1e3
    return costs


def print_table(forms: list[Form], times: dict[str, dict[str, float]], speed: float) -> list[dict[str, object]]:
    """One line per form; returns the lines."""
    best = {key: min(times[form.name][key] for form in forms if form.dense) for key in ("median_ms", "min_ms")}
    heads = (
        f"{'MB':>8}{'floor ms':>10}{'median ms':>11}{'min ms':>9}{'% of floor':>12}{'at best':>9}{'x best torch':>14}"
    )
    print(f"{'':30}{heads}")
    lines = []
    for form in forms:
        t, floor = times[form.name], form.size / speed * 1e3
        line = {
            "form": form.name,
            "bytes": form.size,
            "floor_ms": floor,
            **t,
            "share_of_floor_median": floor / t["median_ms"],
            "share_of_floor_min": floor / t["min_ms"],
            "times_best_torch_median": best["median_ms"] / t["median_ms"],
            "times_best_torch_min": best["min_ms"] / t["min_ms"],
        }
        print(
            f"{form.name:30}{form.size / 1e6:8.1f}{floor:10.3f}{t['median_ms']:11.3f}{t['min_ms']:9.3f}"
            f"{line['share_of_floor_median']:12.0%}{line['share_of_floor_min']:9.0%}"
            f"{line['times_best_torch_median']:14.2f}"
        )
        lines.append(line)
    return lines


def print_linearity(results: list[dict], threads: int) -> None:
    """Ms per 1,000 stored slots of every tier, by context, where at least two are beyond 8,192 slots."""
    contexts = sorted({r["context"] for r in results if r["context"] > 8192})
    if len(contexts) < 2:
        return
    print(f"\ncost per 1,000 stored slots, us, {threads} thread(s): linear where it stays the same")
    print(f"{'':12}" + "".join(f"{context:>10}" for context in contexts) + f"{'max / min':>12}")
    for tier in TIERS:
        found = [r for r in results if r["form"] == tier and r["threads"] == threads and r["context"] in contexts]
        per_slot = [1e6 * r["median_ms"] / r["context"] for r in found]
        if per_slot:
            print(f"{tier:12}" + "".join(f"{x:10.2f}" for x in per_slot) + f"{max(per_slot) / min(per_slot):12.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="4096,16384", help="stored tokens, comma-separated")
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
    parser.add_argument(
        "--quantized-cache-up-to", type=int, default=16384, help="QuantizedCache takes seconds a call beyond this"
    )
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()

    backend = CpuBackend(args.isa)
    torch.manual_seed(0)
    about = machine() | {"isa": backend.isa}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{args.kv_heads} KV heads x {args.head_dim}, {args.group} query heads each, {args.dtype}")
    results: list[dict] = []
    skipped: dict[str, str] = {}
    counts = [int(n) for n in args.threads.split(",")]
    for context in map(int, args.contexts.split(",")):
        sizes = (args.kv_heads, args.group, args.head_dim, DTYPES[args.dtype])
        setting = Setting(*sizes, context, args.cache_mib << 20)
        q = torch.randn(1, args.kv_heads * args.group, 1, args.head_dim).to(setting.dtype)
        forms = []
        for form in dense_forms(q, setting, not args.skip_gqa):
            if isinstance(form, Form):
                forms.append(form)
            else:
                skipped[form[0]] = form[1]
        for kind in QUANTIZED_LAYERS if context <= args.quantized_cache_up_to else ():
            try:
                forms.append(quantized_cache_form(kind, q, setting))
            except NotAvailableError as error:
                skipped[f"QuantizedCache, {kind}"] = str(error)
        forms += [tier_form(backend, tier, q, setting) for tier in args.tiers.split(",")]
        for threads in counts:
            torch.set_num_threads(threads)
            speed = bandwidth()
            times = measure(forms, args.seconds)
            print(f"\ncontext {context}, {threads} thread(s), memory read {speed / 1e9:.1f} GB/s")
            for line in print_table(forms, times, speed):
                results.append({"context": context, "threads": threads, "bytes_per_second": speed} | line)
    for name, why in skipped.items():
        print(f"not measured: {name}: {why}")
    for threads in counts:
        print_linearity(results, threads)
    torch.set_num_threads(counts[-1])
    flat = cost_of_tokens_seen()
    few, many = SEEN
    print(
        f"\n{KEPT:,} tokens kept per head, 2 KV heads x 64: {flat[few]:.3f} ms a step after {few:,} tokens seen, "
        f"{flat[many]:.3f} ms after {many:,}: x {flat[many] / flat[few]:.2f} for x {many / few:.0f} as many"
    )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        report = {"machine": about, "arguments": arguments, "skipped": skipped, "kept": KEPT, "ms_by_tokens_seen": flat}
        args.json.write_text(json.dumps(report | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
