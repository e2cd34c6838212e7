"""chunk_attention of every instruction set against the reference in float64 on the same stored values."""

from __future__ import annotations

import pytest
import torch

from kvcompress_hf.kernels import Logits

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def run_both(cache, backend, exact, n_q: int = 9, n_k: int | None = None, **options):
    n_k = n_q if n_k is None else n_k
    q, k, v = cache.hf(cache.q_heads, n_q), cache.hf(cache.kv_heads, n_k), cache.hf(cache.kv_heads, n_k)
    options = cache.asked(**dict(position=1000, scale=q.shape[-1] ** -0.5) | options)
    actual = backend.chunk_attention(q, k, v, cache.rows, cache.tail, **options)
    expected = exact.chunk_attention(q, k, v, cache.expected_rows, cache.expected_tail, **options)
    return actual, expected


def check(cache, backend, exact, relative_error, tolerance, **options):
    actual, expected = run_both(cache, backend, exact, **options)
    assert actual.shape == expected.shape and actual.dtype == cache.dtype
    assert relative_error(actual, expected) <= tolerance(cache)


@pytest.mark.parametrize(
    "tier, dtype",
    [((8, 8), F32), ((8, 4), BF16), ((4, 2), F32), ((2, 2), F16), ((0, 0), F32), ((0, 0), F16), ((0, 0), BF16)],
)
def test_every_tier(build_cache, backend, exact, relative_error, tolerance, tier, dtype):
    cache = build_cache(backend, tiers=[tier], dtype=dtype)
    check(cache, backend, exact, relative_error, tolerance)


@pytest.mark.parametrize("group, head_dim", [(1, 16), (3, 48), (4, 80), (8, 96), (1, 128), (4, 256)])
def test_shapes(build_cache, backend, exact, relative_error, tolerance, group, head_dim):
    cache = build_cache(backend, tiers=[(8, 4), (4, 2), (0, 0)], group=group, head_dim=head_dim, dtype=BF16, most=90)
    check(cache, backend, exact, relative_error, tolerance, n_q=5)


@pytest.mark.parametrize("n_q", [1, 2, 17, 150])
def test_query_counts(build_cache, backend, exact, relative_error, tolerance, n_q, threads):
    cache = build_cache(backend, tiers=[(8, 4), (4, 4)], most=300)
    check(cache, backend, exact, relative_error, tolerance, n_q=n_q)


def test_only_new_keys(build_cache, backend, exact, relative_error, tolerance):
    cache = build_cache(backend, tiers=[(0, 0)], most=0, tail_lengths=None)
    check(cache, backend, exact, relative_error, tolerance, n_q=130)


@pytest.mark.parametrize("key_position", [None, 998, 1004, 1030])
def test_new_keys_elsewhere(build_cache, backend, exact, relative_error, tolerance, key_position):
    cache = build_cache(backend, most=70)
    check(cache, backend, exact, relative_error, tolerance, n_q=20, n_k=27, key_position=key_position)


@pytest.mark.parametrize("window", [None, 1, 20, 64, 100])
@pytest.mark.parametrize("group", [1, 3])
def test_new_keys_that_no_query_of_a_block_sees(build_cache, backend, exact, relative_error, tolerance, group, window):
    """They are passed over, whether causality, the window or a mask says so."""
    cache = build_cache(backend, tiers=[(0, 0)], most=0, tail_lengths=None, group=group)
    check(cache, backend, exact, relative_error, tolerance, n_q=300, position=0, window=window)
    at = torch.arange(300)
    allowed = (at[:, None] >= at).expand(2, -1, -1).clone()
    allowed[0, :, :70] = False  # padding
    check(cache, backend, exact, relative_error, tolerance, n_q=300, position=0, window=window, allowed=allowed)


def test_queries_that_see_nothing(build_cache, backend, exact, relative_error, tolerance):
    cache = build_cache(backend, most=0, tail_lengths=None)
    actual, expected = run_both(cache, backend, exact, n_q=6, key_position=1003)
    assert (actual[:, :3] == 0).all() and (actual[:, 3:] != 0).any(-1).all()
    assert relative_error(actual, expected) <= tolerance(cache)


@pytest.mark.parametrize("window", [1, 50, 400])
def test_window(build_cache, backend, exact, relative_error, tolerance, window):
    cache = build_cache(backend, tiers=[(8, 4), (0, 0)], most=[[100, 80, 150, 3], [0, 90, 60, 1]])
    check(cache, backend, exact, relative_error, tolerance, n_q=80, window=window, position=345)


@pytest.mark.parametrize("window", [None, 30])
def test_allowed_and_bias(build_cache, backend, exact, relative_error, tolerance, window):
    cache = build_cache(backend, tiers=[(8, 4), (0, 0)], most=[[0, 0, 100, 30], [0, 0, 0, 90]], tail_lengths=(0, 3))
    n_q, n_k = 21, 70
    allowed = torch.rand(2, n_q, n_k, generator=cache.generator) < 0.4
    allowed[0, 5] = False  # in this sequence nothing is stored: the query sees nothing
    bias = torch.randn(2, n_q, n_k, generator=cache.generator)
    check(
        cache, backend, exact, relative_error, tolerance,
        n_q=n_q, n_k=n_k, allowed=allowed, bias=bias, window=window, position=205,
    )  # fmt: skip


def test_bias_with_causality(build_cache, backend, exact, relative_error, tolerance):
    cache = build_cache(backend)
    check(cache, backend, exact, relative_error, tolerance, bias=torch.randn(2, 9, 9, generator=cache.generator))


def test_softcap_and_sinks(build_cache, backend, exact, relative_error, tolerance):
    cache = build_cache(backend, tiers=[(8, 8), (0, 0)], group=3)
    sinks = torch.linspace(-4, 4, cache.q_heads)
    check(cache, backend, exact, relative_error, tolerance, softcap=5.0, sinks=sinks)


def test_nothing_is_stored(build_cache, backend, exact):
    cache = build_cache(backend)
    slabs = [slab.clone() for slab in cache.rows.slabs]
    lengths = cache.tail.lengths.clone()
    run_both(cache, backend, exact)
    assert all(torch.equal(a, b) for a, b in zip(slabs, cache.rows.slabs, strict=True))
    assert torch.equal(cache.tail.lengths, lengths)


def test_one_query_equals_decode(build_cache, backend, relative_error):
    cache = build_cache(backend, tiers=[(8, 8), (0, 0)], dtype=F32)
    q, k, v = cache.hf(cache.q_heads, 1), cache.hf(cache.kv_heads, 1), cache.hf(cache.kv_heads, 1)
    chunk = backend.chunk_attention(q, k, v, cache.rows, cache.tail, position=900, logits=Logits(0.125))
    step = backend.decode_attention(q, k, v, cache.rows, cache.tail, position=900, logits=Logits(0.125))
    assert relative_error(chunk, step) <= 1e-4
