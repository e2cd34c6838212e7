"""One command for a machine with a GPU: checks every kernel, then measures decoding, and writes JSON.

    python benchmarks/gpu.py --json benchmarks/results/gpu_h100.json
    python benchmarks/gpu.py --parts throughput --json benchmarks/results/gpu_h100_throughput.json

Each meant for ten minutes without network. In order, so that a run that is cut short has the most important part:
`tests/gpu`; the speed of memory; decode attention of one layer against SDPA (and flash-attn where it is installed);
chunk attention of later turns and of drafted tokens against SDPA over the past dequantised before; window scores
against the prefill they belong to; packing; decode steps of a model of Llama-8B's shape with random weights against
`DynamicCache`. `throughput`: how many sequences fit into a fixed KV memory, and tokens per second with
that many. Forms take turns within a setting. What does not fit into memory is reported as such. `--device cpu` runs the
same on the CPU backend in small, to see that the command works.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument
from kvcompress_hf.kernels import Logits, Rows, Tail, get_backend, page_layout
from kvcompress_hf.units import parse_bytes

TIERS = {"native": (0, 0), "k8v8": (8, 8), "k8v4": (8, 4), "k4v4": (4, 4), "k4v2": (4, 2), "k2v2": (2, 2)}
SLAB_BYTES = 4 << 20  # as the cache allocates its pages
RECIPES = ("lossless", "k8v4", "k4v2")
PARTS = ("tests", "decode", "chunk", "prefill", "model", "throughput")
SLICE = 16384  # tokens that go through an MLP at once: the whole prompt's activations would take the cache's room
Form = Callable[[], object]


def clock(forms: dict[str, Form], device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of each form on the device; forms take turns, each starts with the queue empty."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 3):
        for name, form in forms.items():
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize(device)
                begin.record()
                for _ in range(5):  # in a row, so that starting from the host is hidden, as in a model
                    form()
                end.record()
                end.synchronize()
                took = begin.elapsed_time(end) / 5
            else:
                start = time.perf_counter()
                form()
                took = (time.perf_counter() - start) * 1e3
            if turn >= 3:
                times[name].append(took)
    return {name: statistics.median(t) for name, t in times.items()}


def memory_speed(device: torch.device, size: int) -> float:
    """Bytes per second of a plain read of memory (a sum over int64)."""
    buffer = torch.ones(size // 8, dtype=torch.int64, device=device)
    return size / clock({"read": buffer.sum}, device, 9)["read"] * 1e3


def packed_rows(tier: str, context: int, batch: int, args: argparse.Namespace) -> tuple[Rows, int]:
    """Rows with `context` random slots in shuffled pages, and the bytes that decoding reads of them."""
    device, dtype = args.device, args.dtype
    layout = page_layout(args.head_dim, dtype, [TIERS[tier]])
    count = batch * args.kv_heads
    pages = -(-context // layout.tiers[0].slots)
    shift = (SLAB_BYTES // layout.page_bytes).bit_length() - 1
    slabs = [
        torch.zeros(1 << shift, layout.page_bytes, dtype=torch.uint8, device=device)
        for _ in range((pages * count >> shift) + 1)
    ]
    addresses = torch.tensor([slab.data_ptr() for slab in slabs], dtype=torch.int64, device=device)
    table = torch.randperm(len(slabs) << shift)[: pages * count].int().view(count, pages).to(device)
    lengths = torch.zeros(count, dtype=torch.int32, device=device)
    rows = Rows(layout, slabs, addresses, shift, [table], [lengths])
    backend = get_backend(device)
    for start in range(0, context, 4096):
        n = min(4096, context - start)
        k, v = (torch.randn(batch, args.kv_heads, n, args.head_dim, device=device, dtype=dtype) for _ in range(2))
        backend.pack(rows, 0, k, v, torch.full((batch, args.kv_heads), n, dtype=torch.int32, device=device), None, {})
        lengths += n
    return rows, context * count * layout.slot_bytes(0)


def empty_tail(batch: int, args: argparse.Namespace) -> Tail:
    """A tail without room."""
    shape = (batch, args.kv_heads, 0, args.head_dim)
    k, v = (torch.empty(shape, dtype=args.dtype, device=args.device) for _ in range(2))
    lengths = torch.zeros(batch, dtype=torch.int32, device=args.device)
    return Tail(k, v, lengths, torch.zeros(batch, 0, dtype=torch.int32, device=args.device))


def decode_table(args: argparse.Namespace, context: int, batch: int, speed: float) -> list[dict]:
    """Decode attention of one layer: every tier against the dense forms."""
    device, heads = args.device, args.kv_heads * args.group
    q = torch.randn(batch, heads, 1, args.head_dim, device=device, dtype=args.dtype)
    shape = (batch, args.kv_heads, context, args.head_dim)
    k, v = (torch.randn(shape, device=device, dtype=args.dtype) for _ in range(2))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    grouped = q.view(batch, args.kv_heads, args.group, args.head_dim)
    forms: dict[str, Form] = {
        "SDPA, enable_gqa": lambda: sdpa(q, k, v, enable_gqa=True),
        "SDPA, grouped": lambda: sdpa(grouped, k, v),
    }
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        pass
    else:
        flash = (q.transpose(1, 2), k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous())
        forms["flash-attn"] = lambda: flash_attn_with_kvcache(*flash)
    dense = 2 * k.numel() * k.element_size()
    sizes, kept = dict.fromkeys(forms, dense), []
    for tier in args.tiers:
        rows, sizes[tier] = packed_rows(tier, context, batch, args)
        tail = empty_tail(batch, args)
        plan = get_backend(device).plan_decode(rows, tail, logits=Logits(args.head_dim**-0.5), q_heads=heads)
        kept.append(rows)
        forms[tier] = lambda plan=plan: plan.run(q, None, None, 0, append=False)
    times = clock(forms, device, args.rounds)
    best = min(ms for name, ms in times.items() if name not in TIERS)
    print(f"\ndecode, context {context}, batch {batch}: {'MB':>30}{'ms':>9}{'% of floor':>12}{'x best dense':>14}")
    results = []
    for name, ms in times.items():
        floor = sizes[name] / speed * 1e3
        print(f"  {name:54}{sizes[name] / 1e6:9.1f}{ms:9.4f}{100 * floor / ms:11.0f}%{best / ms:14.2f}")
        results.append(
            dict(
                context=context, batch=batch, form=name, bytes=sizes[name], ms=ms, floor_share=floor / ms,
                times_best_dense=best / ms,
            )
        )  # fmt: skip
    return results


def chunk_table(args: argparse.Namespace, context: int) -> list[dict]:
    """Chunk attention of one layer: a few new tokens over a long past, packed, or dequantised before and dense."""
    device, heads, backend = args.device, args.kv_heads * args.group, get_backend(args.device)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    results = []
    packed = {tier: packed_rows(tier, context, 1, args)[0] for tier in args.tiers}
    for queries in args.chunk_queries:
        q = torch.randn(1, heads, queries, args.head_dim, device=device, dtype=args.dtype)
        shape = (1, args.kv_heads, context + queries, args.head_dim)
        k, v = (torch.randn(shape, device=device, dtype=args.dtype) for _ in range(2))
        new_k, new_v = k[:, :, -queries:].contiguous(), v[:, :, -queries:].contiguous()
        mask = torch.ones(queries, context + queries, dtype=torch.bool, device=device).tril(context)
        forms: dict[str, Form] = {"SDPA, dense past": partial(sdpa, q, k, v, attn_mask=mask, enable_gqa=True)}
        options = dict(position=context, logits=Logits(args.head_dim**-0.5))
        for tier, rows in packed.items():
            forms[tier] = partial(backend.chunk_attention, q, new_k, new_v, rows, None, **options)
        times = clock(forms, device, args.rounds)
        dense = times["SDPA, dense past"]
        print(f"\nchunk attention, {queries} new tokens after {context}: {'ms':>28}{'x dense':>10}")
        for name, ms in times.items():
            print(f"  {name:54}{ms:9.4f}{dense / ms:10.2f}")
            results.append(dict(context=context, queries=queries, form=name, ms=ms, times_dense=dense / ms))
    return results


def prefill_table(args: argparse.Namespace, context: int) -> list[dict]:
    """Window scores and packing against the prefill attention of the same tokens, one layer."""
    device, heads, backend = args.device, args.kv_heads * args.group, get_backend(args.device)
    q = torch.randn(1, heads, context, args.head_dim, device=device, dtype=args.dtype)
    k, v = (torch.randn(1, args.kv_heads, context, args.head_dim, device=device, dtype=args.dtype) for _ in range(2))
    rows, _ = packed_rows("k8v4", context, 1, args)
    rows.lengths[0].zero_()
    counts = torch.full((1, args.kv_heads), context, dtype=torch.int32, device=device)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    window = dict(position=context - 32, key_position=0, logits=Logits(args.head_dim**-0.5))
    forms: dict[str, Form] = {
        "prefill attention (SDPA)": lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True),
        "window scores, last 32 queries": lambda: backend.window_scores(q[:, :, -32:], k, rows, None, **window),
        "pack into k8v4": lambda: backend.pack(rows, 0, k, v, counts, None, {}),
    }
    times = clock(forms, device, max(3, args.rounds // 3))
    print(f"\nprefill, context {context}:")
    whole = times["prefill attention (SDPA)"]
    for name, ms in times.items():
        print(f"  {name:54}{ms:9.3f} ms{100 * ms / whole:9.1f}% of the attention")
    return [dict(context=context, form=name, ms=ms, share=ms / whole) for name, ms in times.items()]


def random_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """A model of Llama-8B's shape with random weights; on the CPU a tiny one."""
    torch.manual_seed(0)
    large = args.device.type == "cuda"
    heads, layers, hidden, inner = (32, 32, 4096, 14336) if large else (4, 2, 128, 256)
    config = LlamaConfig(
        vocab_size=32000 if large else 128, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4, head_dim=hidden // heads,
        max_position_embeddings=1 << 20,
    )  # fmt: skip
    with torch.device(args.device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(args.dtype)
        try:
            model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
    for layer in model.model.layers:
        layer.mlp.forward = partial(in_slices, layer.mlp.forward)
    return model


def in_slices(mlp: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """An MLP over some tokens after the other; for every cache alike."""
    flat = x.reshape(-1, x.shape[-1])
    return torch.cat([mlp(part) for part in flat.split(SLICE)]).view(x.shape)


def new_cache(model: LlamaForCausalLM, recipe: kvc.Recipe | None) -> Cache:
    """A `DynamicCache` for the stock model, or the model patched and a cache for the recipe."""
    kvc.unpatch(model)
    if recipe is None:
        return DynamicCache(config=model.config)
    kvc.patch(model, recipe)
    return kvc.CompressedPagedCache(model.config, recipe)


def dense_token(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Bytes of a token in a `DynamicCache`."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


@torch.no_grad()
def model_table(args: argparse.Namespace, model: LlamaForCausalLM, context: int, batch: int) -> list[dict]:
    """Milliseconds per decode step of a random model, one cache after the other."""
    config = model.config
    ids = torch.randint(4, config.vocab_size, (batch, context), device=args.device)
    results: list[dict] = []
    print(f"\nmodel of {config.num_hidden_layers} layers, context {context}, batch {batch}:")
    for name in ("DynamicCache", *RECIPES):
        try:
            cache = new_cache(model, None if name == "DynamicCache" else kvc.get_preset(name))
            model(ids, **as_argument(model, cache), use_cache=True, logits_to_keep=1)
            ms = clock({name: partial(model, ids[:, :1], **as_argument(model, cache), use_cache=True)}, args.device, 5)
            dense = batch * context * dense_token(config, args.dtype)
            size = dense if name == "DynamicCache" else cache.memory().total
            results.append(dict(context=context, batch=batch, cache=name, ms=ms[name], bytes=size))
            stock = next((r["ms"] for r in results if r["cache"] == "DynamicCache" and "ms" in r), None)
            times = f"{stock / ms[name]:8.2f} x stock" if stock else ""
            print(f"  {name:20}{size / 2**20:12.0f} MiB{ms[name]:10.2f} ms a step{times}")
        except torch.OutOfMemoryError:
            results.append(dict(context=context, batch=batch, cache=name, error="out of memory"))
            print(f"  {name:20} out of memory")
        cache = None
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
    kvc.unpatch(model)
    return results


def seconds(start: float, device: torch.device) -> float:
    """Seconds since `start`, everything on the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.no_grad()
def throughput_table(args: argparse.Namespace, model: LlamaForCausalLM) -> list[dict]:
    """Tokens per second with as many sequences as fit into a fixed KV memory."""
    settings: dict[str, kvc.Recipe | None] = {"DynamicCache": None, "auto": kvc.get_preset("auto")}
    for part in args.budgets:
        settings[f"kv-compress 1/{part}"] = kvc.get_preset("kv-compress").with_overrides(budget=1 / part)
    length = args.prompt + args.new
    print(f"\n{args.kv_memory / 2**20:.0f} MiB of KV memory, prompts of {args.prompt}, {args.new} new tokens:")
    results = []
    for name, recipe in settings.items():
        try:
            each = length * dense_token(model.config, args.dtype)
            if recipe is not None:  # what one sequence takes when it is decoded from, and its share of new tokens
                cache = new_cache(model, recipe)
                for tokens in (args.prompt, 1):
                    model(torch.full((1, tokens), 4, device=args.device), **as_argument(model, cache), logits_to_keep=1)
                each = cache.memory().total * length // args.prompt
            batch = max(1, min(args.most_sequences, args.kv_memory // each))
            ids = torch.randint(4, model.config.vocab_size, (batch, args.prompt), device=args.device)
            cache = new_cache(model, recipe)
            start = time.perf_counter()
            model(ids, **as_argument(model, cache), logits_to_keep=1)
            prefill = seconds(start, args.device)
            start = time.perf_counter()
            for _ in range(args.new):
                model(ids[:, :1], **as_argument(model, cache))
            decode = seconds(start, args.device)
            row = dict(setting=name, batch=batch, prefill_s=prefill, decode_s=decode)
            row |= dict(tokens_per_s=batch * args.new / (prefill + decode), decoded_per_s=batch * args.new / decode)
            if recipe is not None:
                events = cache.run_report.statistics
                row |= dict(bytes=cache.memory().total, packing_s=events.seconds_packing)
                row |= dict(planning_s=events.seconds_planning)
            results.append(row)
            speeds = f"{row['tokens_per_s']:12.1f} tokens/s{row['decoded_per_s']:12.1f} decoding"
            print(f"  {name:20}{batch:6} sequences{speeds}")
        except torch.OutOfMemoryError:
            results.append(dict(setting=name, error="out of memory"))
            print(f"  {name:20} out of memory")
        cache = None
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
    kvc.unpatch(model)
    return results


def describe(args: argparse.Namespace) -> dict[str, str]:
    """The machine and the versions."""
    backend = get_backend(args.device)
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else platform.processor()
    return {
        "device": name,
        "backend": f"{backend.name}: {backend.reason}",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--tiers", nargs="+", default=list(TIERS), choices=TIERS)
    parser.add_argument("--contexts", nargs="+", type=int, default=[32768])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--model-batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4, help="query heads per KV head")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float16)
    parser.add_argument("--chunk-queries", nargs="+", type=int, default=[4, 16, 512], help="new tokens of a chunk")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parts", nargs="+", default=list(PARTS[:-1]), choices=PARTS)
    parser.add_argument("--prompt", type=int, default=6000, help="throughput: tokens of a prompt")
    parser.add_argument("--new", type=int, default=500, help="throughput: tokens decoded after each")
    parser.add_argument("--kv-memory", type=parse_bytes, default="20GiB", help="throughput: what all caches may take")
    parser.add_argument("--budgets", nargs="*", type=int, default=[1, 4, 8, 16, 64], help="throughput: 1/n of dense")
    parser.add_argument(
        "--most-sequences", type=int, default=96, help="throughput: a prompt's activations need room too"
    )
    parser.add_argument("--json", type=Path, help="file to write the results to, after every part")
    args = parser.parse_args()
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; --device cpu tries the command on the CPU")
    torch.manual_seed(0)
    machine = describe(args)
    print("\n".join(f"{key:14}{value}" for key, value in machine.items()))
    report: dict = {"machine": machine, "arguments": {k: str(v) for k, v in vars(args).items()}}

    def keep(part: str, value: object) -> None:
        report.setdefault(part, []).extend(value) if isinstance(value, list) else report.update({part: value})
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=1) + "\n")

    if "tests" in args.parts:
        folder = Path(__file__).parents[1] / "tests" / "gpu"
        # From that folder, so that the installed package is found and not the half of it in the repository's root.
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        print(result.stdout[-3000:])
        keep("tests", {"exit_status": result.returncode, "summary": result.stdout.strip().splitlines()[-1]})
    if "decode" in args.parts:
        speed = memory_speed(args.device, (1 << 30) if args.device.type == "cuda" else (1 << 24))
        print(f"memory read {speed / 1e9:.0f} GB/s")
        keep("bytes_per_second", speed)
        for context in args.contexts:
            for batch in args.batches:
                keep("decode", decode_table(args, context, batch, speed))
    for context in args.contexts if "chunk" in args.parts else ():
        keep("chunk", chunk_table(args, context))
    for context in args.contexts if "prefill" in args.parts else ():
        keep("prefill", prefill_table(args, context))
    if {"model", "throughput"} & {*args.parts}:
        model = random_model(args)
        for context in args.contexts if "model" in args.parts else ():
            for batch in args.model_batches:
                keep("model", model_table(args, model, context, batch))
        if "throughput" in args.parts:
            keep("throughput", throughput_table(args, model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
