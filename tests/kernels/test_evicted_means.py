"""What was evicted, as one slot: the reference against a plain softmax, every instruction set against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvcompress_hf.kernels import Logits

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
QUANTISED = [(k, v) for k in (8, 4, 2) for v in (8, 4, 2)]


def with_means(cache, counts=(300, 0, 1, 4000)):
    """The same cache, of whose rows so many slots have been evicted."""
    count, head_dim = cache.rows.count, cache.rows.layout.head_dim
    counts = torch.tensor((counts * count)[:count], dtype=torch.int32)
    means = torch.randn(count, 2, head_dim, generator=torch.Generator().manual_seed(7)).to(cache.dtype)
    means[counts == 0] = 0.0
    rows = [
        dataclasses.replace(rows, evicted_means=means, evicted_counts=counts)
        for rows in (cache.rows, cache.expected_rows)
    ]
    return dataclasses.replace(cache, rows=rows[0], expected_rows=rows[1])


def decode(cache, backend, exact, **options):
    q, k, v = cache.hf(cache.q_heads, 1), cache.hf(cache.kv_heads, 1), cache.hf(cache.kv_heads, 1)
    options = cache.asked(**dict(position=1000, scale=q.shape[-1] ** -0.5) | options)
    actual = backend.decode_attention(q, k, v, cache.rows, cache.tail, **options)
    return actual, exact.decode_attention(q, k, v, cache.expected_rows, cache.expected_tail, **options)


def chunk(cache, backend, exact, n_q=9, **options):
    q, k, v = cache.hf(cache.q_heads, n_q), cache.hf(cache.kv_heads, n_q), cache.hf(cache.kv_heads, n_q)
    options = cache.asked(**dict(position=1000, scale=q.shape[-1] ** -0.5) | options)
    actual = backend.chunk_attention(q, k, v, cache.rows, cache.tail, **options)
    return actual, exact.chunk_attention(q, k, v, cache.expected_rows, cache.expected_tail, **options)


BOTH = pytest.mark.parametrize("attend", [decode, chunk])


def plain(cache, exact, q, logits):
    """Softmax over what is stored and, as often as slots were evicted, their mean; and the weights."""
    rows, tail = cache.expected_rows, cache.expected_tail
    out, weights = torch.zeros(cache.batch, cache.q_heads, q.shape[-1], dtype=torch.float64), {}
    for row in range(rows.count):
        b, h = divmod(row, cache.kv_heads)
        keys, values = [], []
        for tier, lengths in enumerate(rows.lengths):
            n = int(lengths[row])
            stored = exact.read_slots(rows, tier, n)
            keys.append(stored[0][row, :n].double()), values.append(stored[1][row, :n].double())
        n = int(tail.lengths[b])
        keys.append(tail.k[b, h, :n].double()), values.append(tail.v[b, h, :n].double())
        count = int(rows.evicted_counts[row])
        mean = rows.evicted_means[row].double()
        keys.append(mean[:1].expand(count, -1)), values.append(mean[1:].expand(count, -1))
        k, v = torch.cat(keys), torch.cat(values)
        for g in range(cache.group):
            found = k @ q[b, h * cache.group + g, 0].double() * logits.scale
            if logits.softcap:
                found = logits.softcap * (found / logits.softcap).tanh()
            weights[row, g] = found.softmax(0)
            out[b, h * cache.group + g] = weights[row, g] @ v
    return out[:, None], weights


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_reference_is_a_softmax_over_as_many_slots_as_were_evicted(build_cache, backend, exact, softcap):
    cache = with_means(build_cache(backend, tiers=[(8, 4), (4, 2)], most=60))
    q, logits = cache.hf(cache.q_heads, 1), Logits(0.2, softcap)
    expected, weights = plain(cache, exact, q, logits)
    got = exact.decode_attention(
        q, None, None, cache.expected_rows, cache.expected_tail, position=9, logits=logits, append=False
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    fresh = torch.zeros(cache.batch, cache.kv_heads, 1, q.shape[-1])
    hidden = torch.zeros(cache.batch, 1, 1, dtype=torch.bool)
    asked = dict(position=9, logits=logits)
    got = exact.chunk_attention(q, fresh, fresh, cache.expected_rows, cache.expected_tail, allowed=hidden, **asked)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    scores = exact.window_scores(
        q, fresh[:, :, :0], cache.expected_rows, cache.expected_tail, key_position=9, power=1, **asked
    )
    for (row, g), weight in weights.items():
        b, h = divmod(row, cache.kv_heads)
        n = int(cache.expected_rows.lengths[0][row])
        got = scores.past[0][b, h * cache.group + g, :n]
        torch.testing.assert_close(got.double(), weight[:n], rtol=1e-4, atol=1e-7)


@BOTH
@pytest.mark.parametrize("tier", [*QUANTISED, (0, 0)])
def test_every_tier(build_cache, backend, exact, relative_error, tolerance, attend, tier):
    cache = with_means(build_cache(backend, tiers=[tier], most=200))
    actual, expected = attend(cache, backend, exact)
    assert relative_error(actual, expected) <= tolerance(cache)


@BOTH
@pytest.mark.parametrize(
    "group, head_dim, dtype", [(1, 16, F32), (3, 48, F16), (5, 80, BF16), (8, 128, BF16), (2, 256, F16)]
)
def test_shapes(build_cache, backend, exact, relative_error, tolerance, attend, group, head_dim, dtype):
    tiers = [(8, 4), (4, 2), (0, 0)]
    cache = with_means(build_cache(backend, tiers=tiers, group=group, head_dim=head_dim, dtype=dtype, most=90))
    actual, expected = attend(cache, backend, exact)
    assert relative_error(actual, expected) <= tolerance(cache)


@BOTH
@pytest.mark.parametrize(
    "options", [{"softcap": 0.5}, {"softcap": 30.0}, {"sinks": torch.linspace(-5, 5, 8)}, {"scale": 1e-3}]
)
def test_how_logits_are_made(build_cache, backend, exact, relative_error, tolerance, attend, options):
    cache = with_means(build_cache(backend, tiers=[(8, 8), (0, 0)]))
    actual, expected = attend(cache, backend, exact, **options)
    assert relative_error(actual, expected) <= tolerance(cache)


@BOTH
def test_a_row_of_which_nothing_is_left(build_cache, backend, exact, relative_error, tolerance, attend):
    cache = with_means(build_cache(backend, most=0, tail_lengths=None))
    options = {"append": False} if attend is decode else {}
    actual, expected = attend(cache, backend, exact, **options)
    assert relative_error(actual, expected) <= tolerance(cache)
    if attend is decode:
        for row, count in enumerate(cache.rows.evicted_counts.tolist()):
            b, h = divmod(row, cache.kv_heads)
            wanted = cache.rows.evicted_means[row, 1] if count else torch.zeros(64)
            heads = actual[b, 0, h * cache.group : (h + 1) * cache.group]
            torch.testing.assert_close(heads, wanted.expand_as(heads))


@BOTH
def test_where_nothing_was_evicted_nothing_changes(build_cache, backend, exact, attend):
    cache = build_cache(backend, tiers=[(8, 4), (0, 0)], dtype=BF16, most=400)
    other = build_cache(backend, tiers=[(8, 4), (0, 0)], dtype=BF16, most=400)
    for one, two in zip(attend(cache, backend, exact), attend(with_means(other, (0,)), backend, exact), strict=True):
        assert torch.equal(one, two)
    # Rows in between others of which much was evicted, too.
    third = build_cache(backend, tiers=[(8, 4), (0, 0)], dtype=BF16, most=400)
    again = build_cache(backend, tiers=[(8, 4), (0, 0)], dtype=BF16, most=400)
    once, mixed = attend(third, backend, exact)[0], attend(with_means(again), backend, exact)[0]
    heads = slice(cache.group, 2 * cache.group)  # of row 1
    assert torch.equal(once[0, :, heads], mixed[0, :, heads])
    assert not torch.equal(once[0, :, : cache.group], mixed[0, :, : cache.group])


def test_padding_sees_nothing(build_cache, backend, exact, relative_error, tolerance):
    cache = with_means(build_cache(backend, batch=3, tail_lengths=(3, 0, 7)))
    actual, expected = decode(cache, backend, exact, valid=torch.tensor([True, False, True]))
    assert relative_error(actual, expected) <= tolerance(cache)
    assert not actual[1].any()


@pytest.mark.parametrize("group", [1, 6])
def test_rows_that_threads_share_and_statistics(build_cache, backend, exact, relative_error, tolerance, group, threads):
    """Long rows, cut in pieces: only one of them has what was evicted. Slots get their share of what is left."""
    most = [[2000, 80, 0, 31], [64, 17, 0, 700]]
    cache = with_means(build_cache(backend, tiers=[(8, 8), (0, 0)], group=group, most=most), (90, 0, 5, 1))
    before = [lengths.clone() for lengths in cache.rows.lengths]
    actual, expected = decode(cache, backend, exact, sum_field="sum", square_field="square", position=4001)
    assert relative_error(actual, expected) <= tolerance(cache)
    for tier, lengths in enumerate(before):
        for field in ("sum", "square"):
            got = backend.read_field(cache.rows, tier, field, int(lengths.max()))
            wanted = exact.read_field(cache.expected_rows, tier, field, int(lengths.max()))
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    if group == 6:  # of one sequence that all threads work on
        long = with_means(build_cache(backend, batch=1, kv_heads=1, group=6, most=[[9000]], tail_lengths=(9,)), (700,))
        actual, expected = decode(long, backend, exact, position=20000)
        assert relative_error(actual, expected) <= tolerance(long)


@pytest.mark.parametrize("power", [0, 1, 2])
def test_scores(build_cache, backend, exact, power, threads):
    cache = with_means(build_cache(backend, tiers=[(8, 8), (0, 0)], most=300))
    q, k = cache.hf(cache.q_heads, 70), cache.hf(cache.kv_heads, 70)
    asked = dict(position=1000, key_position=1000, logits=Logits(0.2), power=power)
    got = backend.window_scores(q, k, cache.rows, cache.tail, **asked)
    wanted = exact.window_scores(q, k, cache.expected_rows, cache.expected_tail, **asked)
    for one, two in zip([*got.past, got.tail, got.fresh], [*wanted.past, wanted.tail, wanted.fresh], strict=True):
        torch.testing.assert_close(one, two, rtol=2e-3, atol=1e-6)


def test_what_does_not_fit_is_refused(build_cache, backend, exact):
    cache = with_means(build_cache(backend))
    means, counts = cache.rows.evicted_means, cache.rows.evicted_counts
    for wrong in (
        {"evicted_counts": None},
        {"evicted_means": None},
        {"evicted_means": means[:, :1]},
        {"evicted_means": means.half()},
        {"evicted_means": means.transpose(1, 2).contiguous().transpose(1, 2)},
        {"evicted_counts": counts[1:]},
        {"evicted_counts": counts.long()},
    ):
        for each in (backend, exact):
            rows = dataclasses.replace(cache.rows, **wrong)
            with pytest.raises(ValueError, match="evicted_"):
                each.plan_decode(rows, cache.tail, logits=Logits(0.1), q_heads=cache.q_heads)
