"""Wrong page ids are an error, not a crash."""

from __future__ import annotations

import pytest


@pytest.fixture(params=[-1, -2048, 1 << 20, "beyond the last slab", "beyond the end of a short slab"])
def broken(request, build_cache, backend):
    cache = build_cache(backend, tiers=[(8, 4), (0, 0)], most=[[100, 80, 150, 3], [0, 90, 60, 1]])
    rows = cache.rows
    bad = request.param
    if bad == "beyond the last slab":
        bad = len(rows.slabs) << rows.slab_shift
    if bad == "beyond the end of a short slab":
        bad = int(rows.tables[1][1, 0])
        slab = bad >> rows.slab_shift
        rows.slabs[slab] = rows.slabs[slab][: bad & ((1 << rows.slab_shift) - 1)]
    rows.tables[1][1, 0] = bad
    return cache


def test_decode(broken, backend):
    q = broken.hf(broken.q_heads, 1)
    with pytest.raises(ValueError, match="page"):
        backend.decode_attention(q, None, None, broken.rows, broken.tail, position=9, scale=1.0, append=False)


def test_chunk_and_scores(broken, backend):
    q, k = broken.hf(broken.q_heads, 3), broken.hf(broken.kv_heads, 3)
    with pytest.raises(ValueError, match="page"):
        backend.chunk_attention(q, k, k, broken.rows, broken.tail, position=9, scale=1.0)
    with pytest.raises(ValueError, match="page"):
        backend.window_scores(q, k, broken.rows, broken.tail, position=9, key_position=9, scale=1.0)
    with pytest.raises(ValueError, match="page"):
        backend.column_scores(q, k, broken.rows, broken.tail, position=9, key_position=9, scale=1.0)


def test_entries_beyond_the_length_are_not_looked_at(build_cache, backend):
    cache = build_cache(backend)
    assert (cache.rows.tables[0][:, -1] == -1).any()
    backend.plan_decode(cache.rows, cache.tail, scale=1.0, q_heads=cache.q_heads)
