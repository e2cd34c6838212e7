"""Random caches for the attention tests: the same contents in pages of the CPU order and of the reference's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from kvcompress_hf.kernels import Logits, ReferenceBackend, Rows, Tail, page_layout
from kvcompress_hf.kernels.cpu import CpuBackend, instruction_sets

SLAB_SHIFT = 2  # four pages per slab, so that every case spans many


@dataclasses.dataclass
class Cache:
    """Packed slots and tail, twice: for the backend under test and for the reference in float64."""

    rows: Rows
    tail: Tail
    expected_rows: Rows
    expected_tail: Tail
    batch: int
    kv_heads: int
    group: int
    generator: torch.Generator

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.layout.dtype

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator).mul(scale).to(self.dtype)

    def hf(self, heads: int, tokens: int) -> Tensor:
        """`[batch, heads, tokens, head_dim]` as transformers makes it: a transposed view, not contiguous."""
        return self.randn(self.batch, tokens, heads, self.rows.layout.head_dim).transpose(1, 2)

    @staticmethod
    def asked(scale: float, softcap=None, window=None, sinks=None, **options) -> dict:
        """Options of an attention operation, how logits are made among them."""
        return {"logits": Logits(scale, softcap, window, sinks), **options}


def _copy_tail(tail: Tail) -> Tail:
    return Tail(
        tail.k.clone(),
        tail.v.clone(),
        tail.lengths.clone(),
        tail.positions.clone(),
        None if tail.fields is None else tail.fields.clone(),
    )


def _build(
    backend,
    *,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 4,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    tiers: Sequence[tuple[int, int]] = ((8, 4),),
    most: int | Sequence[Sequence[int]] = 150,
    tail_lengths: Sequence[int] | None = (5, 0),
    tail_capacity: int = 40,
    fields: Sequence[str] = ("position", "sum", "square"),
    page_bytes: int | None = None,
    seed: int = 0,
) -> Cache:
    generator = torch.Generator().manual_seed(seed)
    layout = page_layout(head_dim, dtype, tiers, fields, page_bytes)
    n_rows = batch * kv_heads
    if isinstance(most, int):
        lengths = [torch.randint(0, most + 1, (n_rows,), generator=generator).int() for _ in tiers]
    else:
        lengths = [torch.tensor(most[t], dtype=torch.int32) for t in range(len(tiers))]

    pages = [-(-n // layout.tiers[t].slots) for t, n in enumerate(lengths)]
    total = int(sum(int(n.sum()) for n in pages))
    n_slabs = (total >> SLAB_SHIFT) + 1
    order = torch.randperm(n_slabs << SLAB_SHIFT, generator=generator).int()
    tables, used = [], 0
    for counts in pages:
        table = torch.full((n_rows, int(counts.max()) + 1), -1, dtype=torch.int32)
        for row, count in enumerate(counts.tolist()):
            table[row, :count] = order[used : used + count]
            used += count
        tables.append(table)

    def rows_of(slabs: list[Tensor]) -> Rows:
        addresses = torch.tensor([slab.data_ptr() for slab in slabs], dtype=torch.int64)
        return Rows(layout, slabs, addresses, SLAB_SHIFT, tables, lengths)

    # Unwritten bytes are all ones: NaN in every float format, so that nothing unused may be read.
    slabs = [torch.full((1 << SLAB_SHIFT, layout.page_bytes), 255, dtype=torch.uint8) for _ in range(n_slabs)]
    rows = rows_of(slabs)
    for tier, length in enumerate(lengths):
        tokens = max(int(length.max()), 1)
        k = torch.randn(batch, kv_heads, tokens, head_dim, generator=generator)
        k[..., :3] += 4.0  # a few channels with a mean, as real keys have
        v = torch.randn(batch, kv_heads, tokens, head_dim, generator=generator) + 0.5
        shape = (batch, kv_heads, tokens)
        values: dict[str, Tensor] = {}
        for name in fields:
            if name == "position":
                values[name] = torch.arange(tokens, dtype=torch.int32).mul(2).add(tier).expand(shape)
            else:
                values[name] = torch.rand(shape, generator=generator)
        counts = length.view(batch, kv_heads).clone()
        length.zero_()
        backend.pack(rows, tier, k.to(dtype), v.to(dtype), counts, None, values)
        length.copy_(counts.flatten())

    expected = rows_of([slab.clone() for slab in slabs])
    for tier, counts in enumerate(pages):
        ids = torch.cat([tables[tier][row, :count] for row, count in enumerate(counts.tolist())]).tolist()
        if not ids:
            continue
        places = [(page >> SLAB_SHIFT, page & ((1 << SLAB_SHIFT) - 1)) for page in ids]
        canonical = backend.to_canonical(layout, tier, torch.stack([slabs[slab][inside] for slab, inside in places]))
        for (slab, inside), page in zip(places, canonical, strict=True):
            expected.slabs[slab][inside] = page

    lengths_of_tail = list(tail_lengths or [0])[:batch]
    lengths_of_tail += lengths_of_tail[-1:] * (batch - len(lengths_of_tail))
    capacity = tail_capacity if tail_lengths is not None else 0
    longest = max([int(length.max()) for length in lengths], default=0)
    tail_shape = (batch, kv_heads, capacity, head_dim)
    tail = Tail(
        k=torch.full(tail_shape, float("nan"), dtype=dtype),
        v=torch.full(tail_shape, float("nan"), dtype=dtype),
        lengths=torch.tensor(lengths_of_tail, dtype=torch.int32),
        positions=torch.zeros(batch, capacity, dtype=torch.int32),
        fields=torch.zeros(len(fields), batch, kv_heads, capacity, dtype=torch.int32) if fields else None,
    )
    for b, n in enumerate(lengths_of_tail):
        tail.k[b, :, :n] = torch.randn(kv_heads, n, head_dim, generator=generator).to(dtype)
        tail.v[b, :, :n] = torch.randn(kv_heads, n, head_dim, generator=generator).to(dtype)
        tail.positions[b, :n] = torch.arange(n, dtype=torch.int32) + 2 * longest + 1
    return Cache(rows, tail, expected, _copy_tail(tail), batch, kv_heads, group, generator)


def _error(actual: Tensor, expected: Tensor) -> float:
    """Largest relative error over the vectors of the last dimension (zeros must be zeros)."""
    actual, expected = actual.double(), expected.double()
    norm = expected.norm(dim=-1)
    difference = (actual - expected).norm(dim=-1)
    assert torch.isfinite(difference).all()
    assert (difference[norm == 0] == 0).all()
    return float((difference / norm.clamp_min(1e-30))[norm > 0].max()) if (norm > 0).any() else 0.0


@pytest.fixture(scope="session")
def build_cache() -> Callable[..., Cache]:
    """Makes a random `Cache` for a backend."""
    return _build


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    return _error


@pytest.fixture(scope="session")
def tolerance(backend: CpuBackend) -> Callable[[Cache], float]:
    """Relative error allowed in the output: arithmetic, and the rounding of the native dtype."""

    def limit(cache: Cache) -> float:
        bits = [b for tier in cache.rows.layout.tiers for b in (tier.key_bits, tier.value_bits) if b]
        arithmetic = 3e-4 if bits else 1e-5  # integer dots: 16-bit queries and probabilities for 8-bit codes
        if bits and min(bits) < 8 and backend.isa != "scalar":
            arithmetic = 1.5e-2  # 8-bit ones; test_precision.py holds them against the codes' own error
        return max(arithmetic, {torch.float32: 0.0, torch.float16: 6e-4, torch.bfloat16: 5e-3}[cache.dtype])

    return limit


@pytest.fixture(scope="session")
def exact() -> ReferenceBackend:
    return ReferenceBackend(compute=torch.float64)


@pytest.fixture(scope="session", params=instruction_sets())
def backend(request: pytest.FixtureRequest) -> CpuBackend:
    """The CPU backend, once for each instruction set of this machine."""
    return CpuBackend(request.param)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, one_thread: None) -> int:
    """Runs the test with one thread, then with two."""
    torch.set_num_threads(request.param)
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    """Small tests run faster on one thread, and do not wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
