"""Chunk attention on tensor cores: tiles of queries, splits over a long past, every tier, shape and mask."""

from __future__ import annotations

import pytest
import torch

from kvcompress_hf.kernels.cuda import CudaBackend
from kvcompress_hf.kernels.host_shim import ShimLauncher

F16, BF16 = torch.float16, torch.bfloat16
TIERS = [(0, 0), (8, 8), (8, 4), (4, 4), (4, 2), (2, 2)]


class Noting(ShimLauncher):
    """Keeps the names of the kernels that were started, with their blocks."""

    def __init__(self, library, order):
        super().__init__(library, order)
        self.started = []

    def launch(self, kernel, grid, block, arguments, device):
        self.started.append((kernel, grid))
        super().launch(kernel, grid, block, arguments, device)


def compare(twins, backend, exact, close, n_q, *, n_k=None, bare=False, **options):
    heads, n_k = twins.kv_heads * twins.group, n_q if n_k is None else n_k
    q, k, v = twins.randn(heads, n_q), twins.randn(twins.kv_heads, n_k), twins.randn(twins.kv_heads, n_k)
    options = twins.asked(**dict(position=3000, scale=q.shape[-1] ** -0.5) | options)
    tails = (None, None) if bare else (twins.tail, twins.expected_tail)
    actual = backend.chunk_attention(q, k, v, twins.rows, tails[0], **options)
    expected = exact.chunk_attention(q, k, v, twins.expected_rows, tails[1], **options)
    close(actual, expected, twins.rows.layout.dtype)
    twins.assert_same_pages()
    twins.assert_same_tail()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("tier", [*TIERS, (2, 8), (8, 2)], ids=str)
def test_every_tier(make_twins, shim, exact, close, tier, head_dim, dtype):
    twins = make_twins(tiers=[tier], head_dim=head_dim, dtype=dtype, group=2, most=150, fields=())
    compare(twins, shim, exact, close, 5)


@pytest.mark.parametrize("group, n_q", [(1, 1), (1, 70), (2, 9), (3, 11), (5, 13), (7, 7), (8, 8), (16, 3), (16, 9)])
def test_tiles_of_queries(make_twins, backend, exact, close, group, n_q):
    twins = make_twins(tiers=[(8, 4), (4, 2)], group=group, lengths=[[100, 80, 0, 31], [64, 17, 0, 200]])
    sinks = torch.linspace(-3, 3, 2 * group)
    compare(twins, backend, exact, close, n_q, sinks=sinks)


@pytest.mark.parametrize("head_dim, dtype", [(64, F16), (128, BF16), (256, F16)])
def test_all_tiers_mixed(make_twins, backend, exact, close, head_dim, dtype):
    for tiers in (TIERS[:4], TIERS[2:]):
        compare(make_twins(tiers=tiers, head_dim=head_dim, dtype=dtype), backend, exact, close, 20)


@pytest.mark.parametrize("n_q, group, rows", [(3, 4, 16), (7, 4, 32), (16, 4, 64), (40, 4, 64)])
@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_a_long_past_is_shared(make_twins, shim_library, exact, close, order, n_q, group, rows):
    launcher = Noting(shim_library, order)
    launcher.blocks = 18
    twins = make_twins(tiers=[(8, 4), (0, 0)], group=group, lengths=[[1500, 3, 0, 64], [64, 900, 0, 1]])
    for _ in range(2):
        compare(twins, CudaBackend(launcher), exact, close, n_q)
    items = -(-n_q * group // rows) * 4
    assert launcher.started == [(f"kvc_chunk_64_{rows}_f16", 18)] * 2 and items <= 18


@pytest.mark.parametrize("n_q, n_k, key_position", [(130, 130, 3000), (60, 200, 2860), (9, 70, 2990), (5, 0, 3000)])
@pytest.mark.parametrize("window", [None, 50])
def test_causality_among_many_new_tokens(make_twins, backend, exact, close, n_q, n_k, key_position, window):
    twins = make_twins(most=40, kv_heads=1, group=2, capacity=5, tail_lengths=(4, 0))
    compare(twins, backend, exact, close, n_q, n_k=n_k, key_position=key_position, window=window)


@pytest.mark.parametrize("head_dim, dtype", [(64, F16), (128, BF16), (256, BF16)])
@pytest.mark.parametrize(
    "options",
    [
        dict(window=150, position=310),
        dict(window=3),
        dict(softcap=0.5),
        dict(softcap=30.0, bias=True),
        dict(allowed=0.4, key_position=2990),
        dict(allowed=0.0, bare=True, most=0),
        dict(allowed=0.3, bias=True, window=200, position=300),
        dict(scale=1e-3),
        dict(scale=1.0, tiers=[(8, 8), (0, 0)]),
        dict(sinks=True, window=1, bare=True),
    ],
    ids=str,
)
def test_options(make_twins, shim, exact, close, head_dim, dtype, options):
    options = dict(options)
    tiers, most = options.pop("tiers", [(8, 8), (4, 4)]), options.pop("most", 100)
    twins = make_twins(tiers=tiers, head_dim=head_dim, dtype=dtype, most=most)
    if "allowed" in options:
        options["allowed"] = torch.rand(2, 18, 80) < options["allowed"]
    if options.pop("bias", False):
        options["bias"] = torch.randn(2, 18, 80)
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-4, 4, 8)
    compare(twins, shim, exact, close, 18, n_k=80, **options)


def test_new_tokens_that_are_not_aligned(make_twins, shim, exact, close):
    twins = make_twins()
    randn = twins.randn

    def shifted(heads, tokens):
        x = randn(heads, tokens)
        odd = torch.empty(*x.shape[:3], 67, dtype=x.dtype)[..., 1:65]
        return odd.copy_(x)

    twins.randn = shifted
    compare(twins, shim, exact, close, 9)


def test_extremes_of_scales(make_twins, shim, exact, close):
    """Values that are constant, tiny or huge within a slot, so that scales are 0, 2^-24 and thousands."""
    twins = make_twins(tiers=[(8, 4)], lengths=[[0] * 4], most=120, fields=())
    k, v = twins.randn(2, 100).clone(), twins.randn(2, 100).clone()
    v[:, :, ::4] = 0.25
    v[:, :, 1::4] *= 1e-6
    v[:, :, 2::4] *= 3000
    k[:, :, ::3] = 0.5
    counts = torch.full((2, 2), 100, dtype=torch.int32)
    for backend, rows in ((shim, twins.rows), (exact, twins.expected_rows)):
        backend.pack(rows, 0, k, v, counts)
        rows.lengths[0] += 100
    compare(twins, shim, exact, close, 4, bare=True)
