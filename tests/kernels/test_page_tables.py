"""Wrong page ids are an error, not a crash."""

from __future__ import annotations

import pytest
import torch

from kvcompress_hf.kernels import Logits


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
        backend.decode_attention(q, None, None, broken.rows, broken.tail, position=9, logits=Logits(1.0), append=False)


def test_chunk_and_scores(broken, backend):
    q, k = broken.hf(broken.q_heads, 3), broken.hf(broken.kv_heads, 3)
    with pytest.raises(ValueError, match="page"):
        backend.chunk_attention(q, k, k, broken.rows, broken.tail, position=9, logits=Logits(1.0))
    with pytest.raises(ValueError, match="page"):
        backend.window_scores(q, k, broken.rows, broken.tail, position=9, key_position=9, logits=Logits(1.0))
    with pytest.raises(ValueError, match="page"):
        backend.column_scores(q, k, broken.rows, broken.tail, position=9, key_position=9, logits=Logits(1.0))


def test_entries_beyond_the_length_are_not_looked_at(build_cache, backend):
    cache = build_cache(backend)
    assert (cache.rows.tables[0][:, -1] == -1).any()
    backend.plan_decode(cache.rows, cache.tail, logits=Logits(1.0), q_heads=cache.q_heads)


def test_storage(broken, backend):
    """Whatever follows a table looks at the ids first, and at nothing else of a page that is not there."""
    rows, row = broken.rows, torch.tensor([1], dtype=torch.int32)
    slot = torch.tensor([3], dtype=torch.int32)
    width = rows.width(1)
    contents = [slab.clone() for slab in rows.slabs]
    refused = [
        lambda: backend.read_field(rows, 1, "position", width),
        lambda: backend.write_field(rows, 1, "position", torch.zeros(rows.count, width, dtype=torch.int32)),
        lambda: backend.read_slots(rows, 1, width),
        lambda: backend.move(rows, 1, row, slot, slot + 1),
        lambda: backend.retier(rows, row, 1, slot, 0, slot),
        lambda: backend.retier(rows, row, 0, slot, 1, slot),
    ]
    for operation in refused:
        with pytest.raises(ValueError, match="page"):
            operation()
    assert all(torch.equal(slab, before) for slab, before in zip(rows.slabs, contents, strict=True))


def test_pack(broken, backend):
    """Packing behind the broken page does not touch it; packing into it is refused before anything is written."""
    rows = broken.rows
    rows.lengths[1][1] = 0
    contents = [slab.clone() for slab in rows.slabs]
    k = broken.hf(broken.kv_heads, 4)
    counts = torch.full((broken.batch, broken.kv_heads), 4, dtype=torch.int32)
    fields = {
        name: torch.zeros(broken.batch, broken.kv_heads, 4, dtype=rows.layout.field_dtype(name))
        for name in rows.layout.fields
    }
    with pytest.raises(ValueError, match="page"):
        backend.pack(rows, 1, k, k, counts, None, fields)
    assert all(torch.equal(slab, before) for slab, before in zip(rows.slabs, contents, strict=True))


def test_a_plan_notices_ids_that_came_after_it(build_cache, backend):
    """Page ids of slabs that were added later mean nothing to the addresses that a plan holds."""
    cache = build_cache(backend, tiers=[(8, 4)])
    rows = cache.rows
    plan = backend.plan_decode(rows, cache.tail, logits=Logits(1.0), q_heads=cache.q_heads)
    q, k = cache.hf(cache.q_heads, 1), cache.hf(cache.kv_heads, 1)
    before = cache.tail.lengths.clone()
    rows.tables[0][int(rows.lengths[0].argmax()), 0] = len(rows.slabs) << rows.slab_shift
    with pytest.raises(ValueError, match="page"):
        plan.run(q, k, k, 9)
    assert torch.equal(cache.tail.lengths, before)  # refused before the token was appended


@pytest.mark.parametrize("position", [-1, 2**31 - 1, 2**31, 2**32, 2**63, 10**30])
def test_positions_that_32_bits_cannot_hold(build_cache, backend, position):
    cache = build_cache(backend)
    q, k = cache.hf(cache.q_heads, 1), cache.hf(cache.kv_heads, 1)
    before = cache.tail.lengths.clone()
    options = dict(position=position, logits=Logits(1.0))
    with pytest.raises(ValueError, match="position"):
        backend.decode_attention(q, k, k, cache.rows, cache.tail, **options)
    with pytest.raises(ValueError, match="position"):
        backend.append(cache.tail, k, k, position)
    with pytest.raises(ValueError, match="position"):
        backend.chunk_attention(q, k, k, cache.rows, cache.tail, **options)
    with pytest.raises(ValueError, match="position"):
        backend.window_scores(
            q, k, cache.rows, cache.tail, position=position, key_position=position, logits=Logits(1.0)
        )
    assert torch.equal(cache.tail.lengths, before)
