"""The CUDA kernels on the CPU (`kernels/host_shim`), and random caches that hold the same bytes as the reference's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvcompress_hf import kernels
from kvcompress_hf.kernels import Logits, ReferenceBackend, Rows, Tail, page_layout
from kvcompress_hf.kernels.cuda import CudaBackend
from kvcompress_hf.kernels.host_shim import ORDERS, ShimError, build_shim, shim_backend
from kvcompress_hf.kernels.host_shim.recording import RecordingLauncher, TapeCapturer
from kvcompress_hf.patches import graph

SHIM_DIR = Path(__file__).parents[2] / "build" / "host_shim"
SLAB_SHIFT = 2  # four pages per slab, so that rows spread over several


@pytest.fixture(scope="session")
def shim_library() -> Path:
    """The kernels compiled for the CPU; built when a source is newer."""
    try:
        return build_shim(SHIM_DIR)
    except ShimError as error:
        if "was not found" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session", params=ORDERS)
def backend(request: pytest.FixtureRequest, shim_library: Path) -> CudaBackend:
    """The CUDA backend on the CPU, once for each schedule of the threads."""
    return shim_backend(shim_library, request.param)


@pytest.fixture(scope="session")
def shim(shim_library: Path) -> CudaBackend:
    """The CUDA backend on the CPU, for tests where the schedule cannot matter."""
    return shim_backend(shim_library, "shuffled")


@pytest.fixture
def capturers(monkeypatch, shim_library):
    """The capturers that calls of `generate` have made; caches made from here on use a backend that they record."""
    launcher, made = RecordingLauncher(shim_library, "shuffled"), []

    def new(device):
        made.append(TapeCapturer(launcher))
        return made[-1]

    backend = CudaBackend(launcher)
    monkeypatch.setattr(kernels, "get_backend", lambda device: backend)
    monkeypatch.setattr(graph, "capturer_for", new)
    return made


@dataclasses.dataclass
class Twins:
    """The same rows and tail twice: for the CUDA backend and for the reference, whose page order it shares."""

    rows: Rows
    tail: Tail
    expected_rows: Rows
    expected_tail: Tail
    batch: int
    kv_heads: int
    group: int
    generator: torch.Generator

    def randn(self, heads: int, tokens: int) -> Tensor:
        """`[batch, heads, tokens, head_dim]` as transformers makes it: a transposed view, not contiguous."""
        shape = (self.batch, tokens, heads, self.rows.layout.head_dim)
        return torch.randn(shape, generator=self.generator).to(self.rows.layout.dtype).transpose(1, 2)

    def assert_same_pages(self) -> None:
        """Every byte of every page agrees, unused ones included."""
        for got, wanted in zip(self.rows.slabs, self.expected_rows.slabs, strict=True):
            assert torch.equal(got, wanted)

    def assert_same_tail(self) -> None:
        """The tails agree up to their lengths, statistics aside."""
        assert torch.equal(self.tail.lengths, self.expected_tail.lengths)
        for b, n in enumerate(self.tail.lengths.tolist()):
            for name in ("k", "v"):
                got, wanted = (getattr(tail, name)[b, :, :n] for tail in (self.tail, self.expected_tail))
                assert torch.equal(got, wanted)
            assert torch.equal(self.tail.positions[b, :n], self.expected_tail.positions[b, :n])

    @staticmethod
    def asked(scale: float, softcap=None, window=None, sinks=None, **options) -> dict:
        """Options of an attention operation, how logits are made among them."""
        return {"logits": Logits(scale, softcap, window, sinks), **options}


def _make(
    *,
    tiers: Sequence[tuple[int, int]] = ((8, 4),),
    head_dim: int = 64,
    dtype: torch.dtype = torch.float16,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 4,
    lengths: Sequence[Sequence[int]] | None = None,
    most: int = 90,
    tail_lengths: Sequence[int] = (5, 0),
    capacity: int = 21,
    fields: Sequence[str] = ("position", "sum", "square"),
    page_bytes: int | None = None,
    seed: int = 0,
) -> Twins:
    generator = torch.Generator().manual_seed(seed)
    layout = page_layout(head_dim, dtype, tiers, fields, page_bytes)
    count = batch * kv_heads
    reference = ReferenceBackend()
    counts = [
        torch.randint(0, most + 1, (count,), generator=generator).int() if lengths is None else torch.tensor(lengths[t])
        for t in range(len(tiers))
    ]
    room = max(most, max((int(c.max()) for c in counts), default=0)) + 40
    per_row = [-(-room // tier.slots) for tier in layout.tiers]
    slabs = -(-count * sum(per_row) // (1 << SLAB_SHIFT))
    order = torch.randperm(slabs << SLAB_SHIFT, generator=generator).int()
    tables, used = [], 0
    for pages in per_row:
        table = torch.full((count, pages + 1), -7, dtype=torch.int32)  # a row stride of its own
        table[:, :pages] = order[used : used + count * pages].view(count, pages)
        tables.append(table[:, :pages])
        used += count * pages

    def rows_of(pages: Tensor) -> Rows:
        parts = list(pages.clone().split(1 << SLAB_SHIFT))
        parts = [part.clone() for part in parts]
        addresses = torch.tensor([part.data_ptr() for part in parts], dtype=torch.int64)
        return Rows(layout, parts, addresses, SLAB_SHIFT, tables, [c.clone().int() for c in counts])

    # Unwritten bytes are all ones: NaN in every float format, so that nothing unused may count.
    filled = rows_of(torch.full((slabs << SLAB_SHIFT, layout.page_bytes), 255, dtype=torch.uint8))
    for tier, length in enumerate(filled.lengths):
        tokens = max(int(length.max()), 1)
        shape = (batch, kv_heads, tokens)
        k, v = (torch.randn(*shape, head_dim, generator=generator) for _ in range(2))
        k[..., :3] += 4.0  # a few channels with a mean, as real keys have
        values = {
            name: torch.arange(tokens, dtype=torch.int32).mul(2).add(tier).expand(shape)
            if name == "position"
            else torch.rand(shape, generator=generator)
            for name in fields
        }
        todo = length.view(batch, kv_heads).clone()
        length.zero_()
        reference.pack(filled, tier, k.to(dtype), (v + 0.5).to(dtype), todo, None, values)
        length.copy_(todo.flatten())
    pages = torch.cat(filled.slabs)

    def tail() -> Tail:
        own = torch.Generator().manual_seed(seed + 1)
        shape = (batch, kv_heads, capacity, head_dim)
        t = Tail(
            k=torch.full(shape, float("nan"), dtype=dtype),
            v=torch.full(shape, float("nan"), dtype=dtype),
            lengths=torch.tensor([tail_lengths[b % len(tail_lengths)] for b in range(batch)], dtype=torch.int32),
            positions=torch.zeros(batch, capacity, dtype=torch.int32),
            fields=torch.zeros(len(fields), batch, kv_heads, capacity, dtype=torch.int32) if fields else None,
        )
        for b, n in enumerate(t.lengths.tolist()):
            t.k[b, :, :n] = torch.randn(kv_heads, n, head_dim, generator=own).to(dtype)
            t.v[b, :, :n] = torch.randn(kv_heads, n, head_dim, generator=own).to(dtype)
            t.positions[b, :n] = torch.arange(n, dtype=torch.int32) + 2 * room
        return t

    return Twins(rows_of(pages), tail(), rows_of(pages), tail(), batch, kv_heads, group, generator)


@pytest.fixture(scope="session")
def make_twins() -> Callable[..., Twins]:
    """Makes random `Twins`."""
    return _make


@pytest.fixture(scope="session")
def exact() -> ReferenceBackend:
    return ReferenceBackend(compute=torch.float64)


@pytest.fixture(scope="session")
def close() -> Callable[[Tensor, Tensor, torch.dtype], None]:
    """Checks vectors of the last dimension: their relative error against what the dtype can hold."""

    def check(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
        assert actual.shape == expected.shape and actual.dtype == dtype
        got, wanted = actual.double(), expected.double()
        norm = wanted.norm(dim=-1)
        error = (got - wanted).norm(dim=-1)
        assert torch.isfinite(error).all()
        assert (error[norm == 0] == 0).all()
        limit = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
        assert (error <= limit * norm).all(), f"relative error {float((error / norm)[norm > 0].max()):.1e}"

    return check
