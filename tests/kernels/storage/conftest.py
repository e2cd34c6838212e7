"""Twin rows for the storage tests: the same pages in the order of the backend under test and of the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from kvcompress_hf.kernels import Backend, PageLayout, ReferenceBackend, Rows, page_layout
from kvcompress_hf.kernels.abi import FEEDBACK_RANK

SLAB_SHIFT = 2  # four pages per slab, so that rows spread over several


@dataclasses.dataclass
class Twins:
    """Rows of the backend under test and rows of the reference, filled alike; tables and lengths are shared."""

    backend: Backend
    reference: ReferenceBackend
    rows: Rows
    expected: Rows
    page_tier: Tensor  # [pages] the tier each page belongs to

    @property
    def layout(self) -> PageLayout:
        return self.rows.layout

    def both(self, operation: str, *args, **kwargs) -> tuple:
        """Calls an operation whose first argument is the rows on both twins; returns both results."""
        return (
            getattr(self.backend, operation)(self.rows, *args, **kwargs),
            getattr(self.reference, operation)(self.expected, *args, **kwargs),
        )

    def pack(self, tier: int, k: Tensor, v: Tensor, counts: Tensor, index=None, fields=None) -> int:
        """Packs on both twins, advances the lengths, and checks that the overflow counts agree."""
        got, wanted = self.both("pack", tier, k, v, counts, index, fields)
        assert got == wanted
        self.rows.lengths[tier] += counts.flatten()
        return got

    def assert_same_pages(self) -> None:
        """Every byte of every page agrees, in canonical order, the unused ones included."""
        got, wanted = torch.cat(self.rows.slabs), torch.cat(self.expected.slabs)
        for tier, layout in enumerate(self.layout.tiers):
            pages = (self.page_tier == tier).nonzero().flatten()
            different = self.backend.to_canonical(self.layout, tier, got[pages]) != wanted[pages]
            if different.any():
                at = different.nonzero()[0]
                raise AssertionError(f"{int(different.sum())} bytes of {layout} differ, first {at.tolist()}")


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests that share a machine do not wait for each other's threads; `threads` overrides this."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_twins(exact: ReferenceBackend) -> Callable[..., Twins]:
    """Makes empty rows with room for `room` slots per row and tier; pages start out with random bytes."""

    def make(
        backend: Backend,
        head_dim: int,
        dtype: torch.dtype,
        tiers: Sequence[tuple[int, int]],
        *,
        count: int = 4,
        room: int = 100,
        fields: Sequence[str] = ("position", "score"),
        page_bytes: int | None = None,
        feedback: bool = False,
    ) -> Twins:
        layout = page_layout(head_dim, dtype, tiers, fields, page_bytes)
        generator = torch.Generator().manual_seed(head_dim)
        per_row = [-(-room // tier.slots) for tier in layout.tiers]
        total = count * sum(per_row)
        order = torch.randperm(total, generator=generator).int()
        slab_pages = 1 << SLAB_SHIFT
        n_slabs = -(-total // slab_pages)
        tables, page_tier, used = [], torch.full((n_slabs * slab_pages,), -1), 0
        for tier, pages in enumerate(per_row):
            ids = order[used : used + count * pages]
            used += count * pages
            page_tier[ids.long()] = tier
            padded = torch.full((count, pages + 1), -7, dtype=torch.int32)  # a row stride of its own
            padded[:, :pages] = ids.view(count, pages)
            tables.append(padded[:, :pages])
        lengths = [torch.zeros(count, dtype=torch.int32) for _ in tiers]
        factors = (torch.randn(count, 2, FEEDBACK_RANK, head_dim, generator=generator) / 4).bfloat16()

        def rows_of(slabs: list[Tensor]) -> Rows:
            addresses = torch.tensor([slab.data_ptr() for slab in slabs], dtype=torch.int64)
            of_keys = factors if feedback else None
            return Rows(layout, slabs, addresses, SLAB_SHIFT, tables, lengths, key_feedback=of_keys)

        shape = (n_slabs * slab_pages, layout.page_bytes)
        expected = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        pages = expected.clone()
        for tier in range(len(tiers)):
            here = page_tier == tier
            pages[here] = backend.from_canonical(layout, tier, expected[here])
        rows, expected_rows = (rows_of([slab.clone() for slab in x.split(slab_pages)]) for x in (pages, expected))
        return Twins(backend, exact, rows, expected_rows, page_tier)

    return make


@pytest.fixture(scope="session")
def make_states() -> Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Makes keys, values `[batch, kv_heads, n, head_dim]` and fields; tokens take turns in being difficult."""

    def make(
        batch: int, kv_heads: int, n: int, head_dim: int, dtype: torch.dtype, seed: int = 0
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)

        def states() -> Tensor:
            x = torch.randn(batch, n, kv_heads, head_dim, generator=generator)
            x[:, 1::8] = 0.37  # constant
            x[:, 2::8] *= 1e5  # leaves fp16's range
            x[:, 3::8] *= 1e-6
            x[:, 4::8, :, head_dim // 3] *= 80  # outlier channel
            x[:, 5::8] = 0.0
            x[:, 6::8] *= 1e-8  # the scale rounds to zero, or to a subnormal
            x[:, 6::8, :, ::2] *= -0.0
            return x.to(dtype).transpose(1, 2)

        shape = (batch, kv_heads, n)
        fields = {
            "position": torch.arange(n, dtype=torch.int32).expand(shape),
            "score": torch.rand(shape, generator=generator),
        }
        return states(), states(), fields

    return make
