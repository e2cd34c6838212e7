"""What is measured of single layers on a GPU: each item a function from the settings to what it found."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_timing import Form, clock, copies_for, gpu_milliseconds, graph_clock, host_microseconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from kvcompress_hf.kernels import Backend, DecodePlan, Logits, Rotation, Rows, Tail, get_backend, page_layout
from kvcompress_hf.kernels.cuda import CudaBackend, launcher_for
from kvcompress_hf.kernels.non_causal import non_causal_scores

TIERS = {"native": (0, 0), "k8v8": (8, 8), "k8v4": (8, 4), "k4v4": (4, 4), "k4v2": (4, 2), "k2v2": (2, 2)}
SLAB_BYTES = 4 << 20  # as the cache allocates its pages
MOST_CHECKED = 1 << 26  # elements of keys that are multiplied in float64
SWEEP = (16, 1024, 4096, 8192, 16384, 65536, 131072)
sdpa = torch.nn.functional.scaled_dot_product_attention


def packed_rows(args: argparse.Namespace, tier: str, context: int, batch: int, fields: tuple[str, ...] = ()) -> Rows:
    """Rows with `context` random slots each, in shuffled pages."""
    device, dtype = args.device, args.dtype
    layout = page_layout(args.head_dim, dtype, [TIERS[tier]], fields)
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
        shape = (batch, args.kv_heads, min(4096, context - start))
        k, v = (torch.randn(*shape, args.head_dim, device=device, dtype=dtype) for _ in range(2))
        values = {name: torch.zeros(shape, dtype=layout.field_dtype(name), device=device) for name in fields}
        counts = torch.full(shape[:2], shape[2], dtype=torch.int32, device=device)
        backend.pack(rows, 0, k, v, counts, None, values)
        lengths += shape[2]
    return rows


def without_bulk_copies(device: torch.device) -> Backend | None:
    """A backend whose decode kernels load pages as those of older devices do; `None` where they always do."""
    backend = get_backend(device)
    if not isinstance(backend, CudaBackend) or not backend.launcher.bulk_copies:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return CudaBackend(launcher_for(index, bulk_copies=False))


def new_plan(args: argparse.Namespace, rows: Rows, backend: Backend, field: str | None = None) -> DecodePlan:
    """A plan for decoding over packed slots, the tail empty; with a field, it adds statistics to that."""
    batch = rows.count // args.kv_heads
    shape = (batch, args.kv_heads, 16 if field else 0, args.head_dim)
    k, v = (torch.empty(shape, dtype=args.dtype, device=args.device) for _ in range(2))
    zeros = partial(torch.zeros, dtype=torch.int32, device=args.device)
    tail = Tail(k, v, zeros(batch), zeros(batch, shape[2]), zeros(1, *shape[:3]) if field else None)
    logits = Logits(args.head_dim**-0.5)
    options = dict(logits=logits, q_heads=args.kv_heads * args.group, sum_field=field)
    return backend.plan_decode(rows, tail, **options)


def relative_error(args: argparse.Namespace, rows: Rows, q: torch.Tensor, out: torch.Tensor) -> float:
    """Largest relative error of a head's output against float64, over the slots as they are dequantised."""
    batch, context = q.shape[0], rows.width(0)
    shape = (batch, args.kv_heads, context, args.head_dim)
    k, v = (x.double().view(shape) for x in get_backend(args.device).read_slots(rows, 0, context))
    grouped = q.double().view(batch, args.kv_heads, args.group, args.head_dim)
    exact = (grouped @ k.transpose(2, 3) * args.head_dim**-0.5).softmax(-1) @ v
    error = (out.double().view_as(exact) - exact).norm(dim=-1) / exact.norm(dim=-1)
    return float(error.max())


def attempts(forms: dict[str, list[Form]], device: torch.device) -> tuple[dict[str, list[Form]], dict[str, str]]:
    """The forms that can be called here, and why the others cannot."""
    works, refused = {}, {}
    for name, calls in forms.items():
        try:
            calls[0]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except RuntimeError as error:
            refused[name] = str(error).strip().splitlines()[-1][:80]
        else:
            works[name] = calls
    return works, refused


def _within(backend: SDPBackend, call: Form) -> object:
    with sdpa_kernel(backend):
        return call()


def on_backends(device: torch.device, forms: dict[str, list[Form]]) -> dict[str, list[Form]]:
    """Every form on each of PyTorch's fast attention backends; on a CPU on that which PyTorch picks."""
    if device.type != "cuda":
        return {f"SDPA, {name}": calls for name, calls in forms.items()}
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    return {
        f"SDPA {label}, {name}": [partial(_within, backend, call) for call in calls]
        for label, backend in backends.items()
        for name, calls in forms.items()
    }


def dense_forms(args: argparse.Namespace, q: torch.Tensor, context: int) -> dict[str, list[Form]]:
    """Decode attention over dense keys and values: each call over a cache of its own."""
    batch, device = q.shape[0], args.device
    shape = (batch, args.kv_heads, context, args.head_dim)
    size = 2 * q.element_size() * batch * args.kv_heads * context * args.head_dim
    pairs = [
        tuple(torch.randn(shape, device=device, dtype=args.dtype) for _ in range(2))
        for _ in range(min(8, copies_for(size, device)))
    ]
    grouped = q.view(batch, args.kv_heads, args.group, args.head_dim)
    forms: dict[str, list[Form]] = {
        "enable_gqa": [partial(sdpa, q, k, v, enable_gqa=True) for k, v in pairs],
        "grouped": [partial(sdpa, grouped, k, v) for k, v in pairs],
    }
    forms = on_backends(device, forms)
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return forms
    turned = [tuple(x.transpose(1, 2).contiguous() for x in pair) for pair in pairs]
    forms["flash-attn"] = [partial(flash_attn_with_kvcache, q.transpose(1, 2), k, v) for k, v in turned]
    return forms


def decode_item(
    args: argparse.Namespace, tier: str, context: int, batch: int, field: str | None = None, dense: bool = True
) -> dict:
    """A tier against the best dense attention, each over caches that no cache of the GPU holds, in CUDA graphs."""
    device = args.device
    q = torch.randn(batch, args.kv_heads * args.group, 1, args.head_dim, device=device, dtype=args.dtype)
    layout = page_layout(args.head_dim, args.dtype, [TIERS[tier]])
    size = context * batch * args.kv_heads * layout.slot_bytes(0)
    fields = (field,) if field else ()
    pasts = [packed_rows(args, tier, context, batch, fields) for _ in range(copies_for(size, device))]

    def steps(backend: Backend) -> list[Form]:
        plans = [new_plan(args, rows, backend, field) for rows in pasts]
        return [partial(plan.run, q, None, None, 0, append=False) for plan in plans]

    calls, plain = steps(get_backend(device)), without_bulk_copies(device)
    loads = {"without bulk copies": steps(plain)} if plain else {}
    row: dict[str, object] = dict(tier=tier, context=context, batch=batch, bytes=size, copies=len(pasts))
    out = calls[0]()
    if context * batch * args.kv_heads * args.head_dim <= MOST_CHECKED:
        row["error"] = relative_error(args, pasts[0], q, out)
    others, row["refused"] = attempts(dense_forms(args, q, context) if dense else {}, device)
    times = graph_clock({tier: calls, **loads, **others}, device, args.rounds)
    row |= dict(ms=times[tier], bytes_per_s=size / times[tier] * 1e3)
    if loads:
        row["without_bulk_copies_ms"] = times["without bulk copies"]
    row["same_cache_ms"] = graph_clock({tier: calls[:1]}, device, args.rounds)[tier]
    row["host_us"] = host_microseconds(calls[0], device)
    if others:
        best = min(others, key=lambda name: times[name])
        row |= dict(dense_ms={name: times[name] for name in others}, best_dense=best)
        row["times_best_dense"] = times[best] / times[tier]
    return row


def dense_chunks(args: argparse.Namespace, q: torch.Tensor, context: int) -> dict[str, list[Form]]:
    """A causal chunk over a dense past, in the forms that PyTorch has kernels for; each call over a past of its own."""
    queries = q.shape[2]
    shape = (1, args.kv_heads, context + queries, args.head_dim)
    size = 2 * q.element_size() * args.kv_heads * shape[2] * args.head_dim
    pairs = [
        tuple(torch.randn(shape, device=args.device, dtype=args.dtype) for _ in range(2))
        for _ in range(min(4, copies_for(size, args.device)))
    ]
    repeated = [tuple(x.repeat_interleave(args.group, 1) for x in pair) for pair in pairs[:2]]
    causal = causal_lower_right(queries, shape[2])  # the mask that flash kernels know
    mask = torch.ones(queries, shape[2], dtype=torch.bool, device=args.device).tril(context)
    return {
        "SDPA, causal, enable_gqa": [partial(sdpa, q, k, v, attn_mask=causal, enable_gqa=True) for k, v in pairs],
        "SDPA, causal, heads repeated": [partial(sdpa, q, k, v, attn_mask=causal) for k, v in repeated],
        "SDPA, mask, enable_gqa": [partial(sdpa, q, k, v, attn_mask=mask, enable_gqa=True) for k, v in pairs],
    }


def chunk_item(args: argparse.Namespace, queries: int, context: int) -> dict:
    """Chunk attention of one layer: a few new tokens over a long past, packed, or dequantised before and dense."""
    device, heads, backend = args.device, args.kv_heads * args.group, get_backend(args.device)
    q = torch.randn(1, heads, queries, args.head_dim, device=device, dtype=args.dtype)
    k, v = (torch.randn(1, args.kv_heads, queries, args.head_dim, device=device, dtype=args.dtype) for _ in range(2))
    options = dict(position=context, logits=Logits(args.head_dim**-0.5))
    packed: dict[str, list[Form]] = {}
    for tier in args.tiers:
        layout = page_layout(args.head_dim, args.dtype, [TIERS[tier]])
        copies = min(8, copies_for(context * args.kv_heads * layout.slot_bytes(0), device))
        pasts = [packed_rows(args, tier, context, 1) for _ in range(copies)]
        packed[tier] = [partial(backend.chunk_attention, q, k, v, rows, None, **options) for rows in pasts]
    dense, refused = attempts(dense_chunks(args, q, context), device)
    times = graph_clock({**dense, **packed}, device, args.rounds)
    best = min(times[name] for name in dense)
    ratios = {tier: best / times[tier] for tier in packed}
    return dict(context=context, queries=queries, ms=times, refused=refused, times_best_dense=ratios)


def prefill_item(args: argparse.Namespace, context: int) -> dict:
    """Window scores, the second look and packing against the prefill attention of the same tokens, one layer."""
    device, heads, backend = args.device, args.kv_heads * args.group, get_backend(args.device)
    q = torch.randn(1, heads, context, args.head_dim, device=device, dtype=args.dtype)
    k, v = (torch.randn(1, args.kv_heads, context, args.head_dim, device=device, dtype=args.dtype) for _ in range(2))
    rows = packed_rows(args, "k8v4", context, 1)
    rows.lengths[0].zero_()
    counts = torch.full((1, args.kv_heads), context, dtype=torch.int32, device=device)
    logits = Logits(args.head_dim**-0.5)
    window = dict(position=context - 32, key_position=0, logits=logits)
    turns = Rotation(5e5 ** -(torch.arange(0, args.head_dim, 2) / args.head_dim))
    look = partial(backend.non_causal_scores, q, k, logits=logits, rotation=turns)
    look_in_torch = partial(non_causal_scores, q, k, logits, turns, None, q.dtype)
    forms: dict[str, Form] = {
        "prefill attention (SDPA)": partial(sdpa, q, k, v, is_causal=True, enable_gqa=True),
        "window scores, last 32 queries": partial(backend.window_scores, q[:, :, -32:], k, rows, None, **window),
        "second look": look,
        "second look in torch": look_in_torch,
        "pack into k8v4": partial(backend.pack, rows, 0, k, v, counts, None, {}),
    }
    times = clock(forms, device, max(3, args.rounds // 3))
    whole = times["prefill attention (SDPA)"]
    gpu = {name: gpu_milliseconds(form, device).get("gpu_ms") for name, form in forms.items()}
    expected = look_in_torch()
    return dict(
        context=context,
        ms=times,
        gpu_ms=gpu,
        share={name: ms / whole for name, ms in times.items()},
        times_look_in_torch=times["second look in torch"] / times["second look"],
        difference_of_looks=float((look() - expected).norm() / expected.norm()),
    )


def ceilings_item(args: argparse.Namespace) -> dict:
    """What the device can do at all: read and copy memory, and start one small kernel after another."""
    device = args.device
    size = 1 << 30 if device.type == "cuda" else 1 << 24
    source = torch.ones(size // 8, dtype=torch.int64, device=device)
    target, small = torch.empty_like(source), torch.zeros(32, device=device)
    times = clock({"read": source.sum, "copy": partial(target.copy_, source)}, device, args.rounds)
    gap = graph_clock({"small": [partial(small.add_, 1)] * 64}, device, args.rounds)["small"]
    speeds = dict(read_bytes_per_s=size / times["read"] * 1e3, copy_bytes_per_s=2 * size / times["copy"] * 1e3)
    return dict(**speeds, small_kernel_us=1e3 * gap)


def layer_items(args: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], dict]]]:
    """Part, name and function of each item, the most telling first."""
    yield "decode", "ceilings", partial(ceilings_item, args)
    for context in args.contexts:
        for batch in args.batches:
            for tier in args.tiers:
                yield "decode", f"decode {tier} {context} b{batch}", partial(decode_item, args, tier, context, batch)
    for context in SWEEP if args.device.type == "cuda" else args.contexts:
        for tier in (tier for tier in args.tiers if tier in ("k8v4", "k4v2")):
            yield "sweep", f"sweep {tier} {context}", partial(decode_item, args, tier, context, 1, dense=False)
            item = partial(decode_item, args, tier, context, 1, field="sum", dense=False)
            yield "statistics", f"statistics {tier} {context}", item
    for context in args.contexts:
        for queries in args.chunk_queries:
            yield "chunk", f"chunk {queries} after {context}", partial(chunk_item, args, queries, context)
        yield "prefill", f"prefill {context}", partial(prefill_item, args, context)
