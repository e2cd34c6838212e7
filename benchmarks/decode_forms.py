"""The forms of decode attention that decode.py compares: one new token over `context` stored tokens of one layer.

A `Form` is called with a number and works on the buffers of that number, modulo the sets that there are: so many that
the last-level cache is of no help.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from dense_bf16 import NotAvailableError, dense_bf16
from torch import Tensor
from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

from kvcompress_hf.kernels import CpuBackend, Logits, Rows, Tail, page_layout
from kvcompress_hf.kernels.memory import page_memory

TIERS = {"native": (0, 0), "k8v8": (8, 8), "k8v4": (8, 4), "k4v4": (4, 4), "k4v2": (4, 2), "k2v2": (2, 2)}
SLAB_BYTES = 4 << 20  # as the cache allocates its pages
QUANTIZED_LAYERS = {"quanto": QuantoQuantizedLayer, "hqq": HQQQuantizedLayer}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of the layer; `rotate_bytes` of buffers are gone through before any is used again."""

    kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype
    context: int
    rotate_bytes: int

    @property
    def dense_bytes(self) -> int:
        return 2 * self.context * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def sets(self, size: int) -> int:
        """Number of sets of `size` bytes each."""
        return max(2, self.rotate_bytes // size + 1)


@dataclasses.dataclass(frozen=True)
class Form:
    """Something to time: `run(i)` attends once, to `size` bytes of keys and values, in the buffers of set i."""

    name: str
    run: Callable[[int], object]
    size: int
    repeat: int = 5  # calls per turn
    dense: bool = False  # a form of torch's own


def tensors(setting: Setting, tokens: int) -> Tensor:
    return torch.randn(1, setting.kv_heads, tokens, setting.head_dim).to(setting.dtype)


def packed_rows(backend: CpuBackend, tier: str, setting: Setting) -> tuple[list[Rows], int]:
    """Rows with all slots in one tier, pages in random order; and the bytes of a set."""
    layout = page_layout(setting.head_dim, setting.dtype, [TIERS[tier]])
    heads, context = setting.kv_heads, setting.context
    pages = -(-context // layout.tiers[0].slots)
    n_sets = setting.sets(pages * heads * layout.page_bytes)
    slab_shift = (SLAB_BYTES // layout.page_bytes).bit_length() - 1
    n_slabs = (pages * heads * n_sets >> slab_shift) + 1
    slabs = [page_memory(1 << slab_shift, layout.page_bytes) for _ in range(n_slabs)]
    addresses = torch.tensor([slab.data_ptr() for slab in slabs], dtype=torch.int64)
    order = torch.randperm(n_slabs << slab_shift, generator=torch.Generator().manual_seed(0)).int()
    sets = []
    for i in range(n_sets):
        table = order[i * pages * heads :][: pages * heads].view(heads, pages)
        rows = Rows(layout, slabs, addresses, slab_shift, [table], [torch.zeros(heads, dtype=torch.int32)])
        for start in range(0, context, 4096):
            n = min(4096, context - start)
            counts = torch.full((1, heads), n, dtype=torch.int32)
            backend.pack(rows, 0, tensors(setting, n), tensors(setting, n), counts, None, {})
            rows.lengths[0] += n
        sets.append(rows)
    return sets, context * heads * layout.slot_bytes(0)


def tier_form(backend: CpuBackend, tier: str, q: Tensor, setting: Setting) -> Form:
    """Ours, through prepared plans, one per set; nothing is appended, so that sets stay as they are."""
    sets, size = packed_rows(backend, tier, setting)
    empty = tensors(setting, 0)
    tail = Tail(empty, empty, torch.zeros(1, dtype=torch.int32), torch.zeros(1, 0, dtype=torch.int32))
    plans = [backend.plan_decode(rows, tail, logits=Logits(setting.scale), q_heads=q.shape[1]) for rows in sets]
    return Form(tier, lambda i: plans[i % len(plans)].run(q, None, None, 0, append=False), size)


def dense_forms(q: Tensor, setting: Setting, gqa: bool) -> Iterator[Form | tuple[str, str]]:
    """Contiguous keys and values in the model's dtype: torch's forms, and our dense kernel or why there is none."""
    size = setting.dense_bytes
    sets = [(tensors(setting, setting.context), tensors(setting, setting.context)) for _ in range(setting.sets(size))]
    packed = q.view(1, setting.kv_heads, setting.group, setting.head_dim)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def matmul(i: int) -> Tensor:
        k, v = sets[i % len(sets)]
        return torch.matmul(torch.softmax(torch.matmul(packed * setting.scale, k.transpose(-1, -2)), -1), v)

    yield Form("torch matmul-softmax-matmul", matmul, size, dense=True)
    yield Form("torch SDPA packed", lambda i: sdpa(packed, *sets[i % len(sets)]), size, dense=True)
    if gqa:
        run = lambda i: sdpa(q, *sets[i % len(sets)], enable_gqa=True)  # noqa: E731
        yield Form("torch SDPA enable_gqa", run, size, repeat=1, dense=True)
    name = "dense bf16, our own"
    try:
        if setting.dtype != torch.bfloat16:
            raise NotAvailableError("measured for bfloat16 only")
        kernel = dense_bf16(setting.group, setting.head_dim)
        yield Form(name, lambda i: kernel(packed[0], *(x[0] for x in sets[i % len(sets)]), setting.scale), size)
    except NotAvailableError as error:
        yield name, str(error)


def quantized_cache_form(kind: str, q: Tensor, setting: Setting) -> Form:
    """transformers' `QuantizedCache` of 4 bits: its `update` gives all keys and values back dense, then attention.

    Args:
        kind: "quanto" or "hqq".

    Raises:
        NotAvailableError: The library that it needs is not installed.
    """
    # As transformers' documentation recommends for each.
    axis = 1 if kind == "hqq" else 0
    try:
        layer = QUANTIZED_LAYERS[kind](nbits=4, axis_key=axis, axis_value=axis, q_group_size=64, residual_length=128)
        layer.update(tensors(setting, setting.context), tensors(setting, setting.context))
    except ImportError as error:
        raise NotAvailableError(str(error)) from error
    k, v, nothing = tensors(setting, 1), tensors(setting, 1), layer.keys
    packed = q.view(1, setting.kv_heads, setting.group, setting.head_dim)

    def run(_: int) -> Tensor:
        keys, values = layer.update(k, v)
        layer.keys = layer.values = nothing  # the new token is forgotten, so that every call finds the same
        return torch.matmul(torch.softmax(torch.matmul(packed * setting.scale, keys.transpose(-1, -2)), -1), values)

    bits = setting.dense_bytes // setting.dtype.itemsize // 2  # 4 bits an element; scales come on top
    return Form(f"QuantizedCache, {kind}", run, bits, repeat=1)
