"""Attention and scores of every instruction set on random shapes and a very long row, against the float64 reference."""

from __future__ import annotations

import random

import pytest
import torch

TIERS = [(8, 8), (8, 4), (8, 2), (4, 8), (4, 4), (4, 2), (2, 2), (0, 0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check_decode(cache, backend, exact, relative_error, tolerance, **options):
    q, k, v = cache.hf(cache.q_heads, 1), cache.hf(cache.kv_heads, 1), cache.hf(cache.kv_heads, 1)
    options = cache.asked(q.shape[-1] ** -0.5, **options)
    actual = backend.decode_attention(q, k, v, cache.rows, cache.tail, **options)
    expected = exact.decode_attention(q, k, v, cache.expected_rows, cache.expected_tail, **options)
    assert relative_error(actual, expected) <= tolerance(cache)


def check_chunk(cache, backend, exact, relative_error, tolerance, n_q, window):
    q, k, v = cache.hf(cache.q_heads, n_q), cache.hf(cache.kv_heads, n_q), cache.hf(cache.kv_heads, n_q)
    options = cache.asked(q.shape[-1] ** -0.5, window=window, position=450)
    actual = backend.chunk_attention(q, k, v, cache.rows, cache.tail, **options)
    expected = exact.chunk_attention(q, k, v, cache.expected_rows, cache.expected_tail, **options)
    assert relative_error(actual, expected) <= tolerance(cache)


def check_scores(cache, backend, exact, n_q, window):
    q, k = cache.hf(cache.q_heads, n_q), cache.hf(cache.kv_heads, n_q)
    options = cache.asked(q.shape[-1] ** -0.5, window=window, position=450, key_position=450)
    scores = backend.column_scores(q, k, cache.rows, cache.tail, **options)
    expected = exact.column_scores(q, k, cache.expected_rows, cache.expected_tail, **options)
    for ours, theirs in zip(scores, expected, strict=True):
        for a, e in zip([*ours.past, ours.fresh], [*theirs.past, theirs.fresh], strict=True):
            torch.testing.assert_close(a, e, rtol=3e-3, atol=1e-6)


@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_random_shapes(build_cache, backend, exact, relative_error, tolerance, head_dim):
    """Every head_dim; group, batch, dtype, tiers, ragged lengths (nothing and one slot among them) drawn at random."""
    draw = random.Random(head_dim)
    for group in draw.sample(range(1, 17), 2):
        batch, kv_heads = draw.randint(1, 3), draw.randint(1, 3)
        tiers = draw.sample(TIERS, draw.randint(1, 3))
        most = [[draw.choice([0, 1, 15, 16, 17, 63, 130, 200]) for _ in range(batch * kv_heads)] for _ in tiers]
        cache = build_cache(
            backend,
            batch=batch,
            kv_heads=kv_heads,
            group=group,
            head_dim=head_dim,
            dtype=draw.choice(DTYPES),
            tiers=tiers,
            most=most,
            tail_lengths=[draw.choice([0, 1, 16, 39]) for _ in range(batch)],
            seed=head_dim,
        )
        window = draw.choice([None, None, 1, 50])
        check_scores(cache, backend, exact, n_q=draw.choice([1, 4, 33]), window=window)
        check_chunk(cache, backend, exact, relative_error, tolerance, n_q=draw.choice([1, 4, 33]), window=window)
        check_decode(cache, backend, exact, relative_error, tolerance, position=450, window=window)


@pytest.mark.parametrize("tiers", [[(8, 4)], [(8, 8), (4, 2), (0, 0)]])
def test_a_hundred_thousand_slots(build_cache, backend, exact, relative_error, tolerance, threads, tiers):
    most = [[100_000 // len(tiers) + i] for i, _ in enumerate(tiers)]
    cache = build_cache(
        backend, batch=1, kv_heads=1, group=2, head_dim=16, tiers=tiers, most=most, fields=(), page_bytes=64 * 1024
    )
    check_chunk(cache, backend, exact, relative_error, tolerance, n_q=2, window=None)
    check_scores(cache, backend, exact, n_q=2, window=None)
    check_decode(cache, backend, exact, relative_error, tolerance, position=100_001)
