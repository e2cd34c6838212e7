"""window_scores of every instruction set against the reference in float64 on the same stored values."""

from __future__ import annotations

import pytest
import torch

F32, BF16 = torch.float32, torch.bfloat16


def check(cache, backend, exact, *, n_q: int = 32, n_k: int | None = None, **options):
    n_k = n_q if n_k is None else n_k
    q, k = cache.hf(cache.q_heads, n_q), cache.hf(cache.kv_heads, n_k)
    position = 1000
    options = dict(position=position, key_position=position + n_q - n_k, scale=q.shape[-1] ** -0.5) | options
    options = cache.asked(**options)
    actual = backend.window_scores(q, k, cache.rows, cache.tail, **options)
    expected = exact.window_scores(q, k, cache.expected_rows, cache.expected_tail, **options)
    parts = [*zip(actual.past, expected.past, strict=True), (actual.fresh, expected.fresh)]
    if cache.tail.capacity:
        parts.append((actual.tail, expected.tail))
    for a, e in parts:
        assert a.dtype == F32
        torch.testing.assert_close(a, e, rtol=3e-3, atol=1e-6)
    return actual


def check_both(cache, backend, exact, *, n_q: int = 32, n_k: int | None = None, **options):
    """column_scores gives the very numbers of window_scores, of both powers; the reference's too."""
    n_k = n_q if n_k is None else n_k
    q, k = cache.hf(cache.q_heads, n_q), cache.hf(cache.kv_heads, n_k)
    options = dict(position=1000, key_position=1000 + n_q - n_k, scale=q.shape[-1] ** -0.5) | options
    options = cache.asked(**options)
    for power, both in enumerate(backend.column_scores(q, k, cache.rows, cache.tail, **options), start=1):
        one = backend.window_scores(q, k, cache.rows, cache.tail, power=power, **options)
        expected = exact.column_scores(q, k, cache.expected_rows, cache.expected_tail, **options)[power - 1]
        for a, o, e in zip(
            [*both.past, both.tail, both.fresh],
            [*one.past, one.tail, one.fresh],
            [*expected.past, expected.tail, expected.fresh],
            strict=True,
        ):
            assert torch.equal(a, o)
            torch.testing.assert_close(a, e, rtol=3e-3, atol=1e-6)


@pytest.mark.parametrize("n_q, n_k", [(1, 1), (37, 100), (20, 0), (150, 150)])
@pytest.mark.parametrize("tail_lengths", [None, (5, 33)])
def test_both_powers(build_cache, backend, exact, n_q, n_k, tail_lengths):
    cache = build_cache(backend, tiers=[(8, 4), (0, 0)], tail_lengths=tail_lengths)
    check_both(cache, backend, exact, n_q=n_q, n_k=n_k)


def test_both_powers_with_every_option(build_cache, backend, exact):
    cache = build_cache(backend, most=60, tail_lengths=None, group=3)
    options = dict(
        softcap=4.0,
        sinks=torch.linspace(-3, 3, cache.q_heads),
        window=70,
        exclude=2,
        query_valid=torch.rand(2, 40, generator=cache.generator) < 0.6,
        key_valid=torch.rand(2, 90, generator=cache.generator) < 0.6,
    )
    check_both(cache, backend, exact, n_q=40, n_k=90, **options)


@pytest.mark.parametrize("n_q, n_k", [(1, 1), (37, 100), (150, 150)])
def test_the_largest_probability(build_cache, backend, exact, n_q, n_k):
    cache = build_cache(backend, tiers=[(8, 4), (0, 0)], tail_lengths=(5, 33))
    scores = check(cache, backend, exact, n_q=n_q, n_k=n_k, power=0)
    assert max(float(part.max()) for part in [*scores.past, scores.fresh]) <= 1 + 1e-5


@pytest.mark.parametrize("tier, dtype", [((8, 8), BF16), ((4, 4), F32), ((2, 2), F32), ((0, 0), F32), ((0, 0), BF16)])
def test_every_tier(build_cache, backend, exact, tier, dtype):
    check(build_cache(backend, tiers=[tier], dtype=dtype), backend, exact)


@pytest.mark.parametrize(
    "group, head_dim, power", [(1, 16, 1), (2, 48, 2), (3, 80, 1), (4, 128, 2), (7, 96, 2), (16, 256, 1)]
)
def test_shapes(build_cache, backend, exact, group, head_dim, power):
    cache = build_cache(backend, tiers=[(8, 4), (4, 2), (0, 0)], group=group, head_dim=head_dim, most=80)
    check(cache, backend, exact, n_q=10, power=power)


@pytest.mark.parametrize("n_q, n_k", [(1, 1), (32, 500), (150, 150), (200, 40)])
def test_query_and_key_counts(build_cache, backend, exact, n_q, n_k, threads):
    cache = build_cache(backend, tiers=[(8, 4), (4, 4)], most=1300, batch=1)
    check(cache, backend, exact, n_q=n_q, n_k=n_k)


@pytest.mark.parametrize("tail_lengths", [None, (0, 40)])
def test_only_new_keys(build_cache, backend, exact, tail_lengths):
    cache = build_cache(backend, tiers=[(0, 0)], most=0, tail_lengths=tail_lengths)
    actual = check(cache, backend, exact, n_q=100, power=1)
    if tail_lengths is None:  # every query's probabilities sum to one
        torch.testing.assert_close(actual.fresh.sum(-1), torch.full((2, cache.q_heads), 100.0))


@pytest.mark.parametrize("exclude", [1, 7, 800])
@pytest.mark.parametrize("fields", [("position",), ()])
def test_exclude(build_cache, backend, exact, exclude, fields):
    check(build_cache(backend, fields=fields), backend, exact, exclude=exclude)


@pytest.mark.parametrize("window", [3, 40, 900])
def test_window(build_cache, backend, exact, window):
    check(build_cache(backend, tiers=[(8, 4), (0, 0)]), backend, exact, window=window, exclude=2)


def test_padding(build_cache, backend, exact):
    cache = build_cache(backend, most=60, tail_lengths=None)
    query_valid = torch.rand(2, 40, generator=cache.generator) < 0.6
    key_valid = torch.rand(2, 90, generator=cache.generator) < 0.6
    actual = check(cache, backend, exact, n_q=40, n_k=90, query_valid=query_valid, key_valid=key_valid)
    assert (actual.fresh.transpose(1, 2)[~key_valid] == 0).all()


def test_no_valid_query(build_cache, backend, exact):
    cache = build_cache(backend)
    actual = check(cache, backend, exact, query_valid=torch.zeros(2, 32, dtype=torch.bool))
    assert all((part == 0).all() for part in [*actual.past, actual.fresh])


def test_softcap_and_sinks(build_cache, backend, exact):
    cache = build_cache(backend)
    check(cache, backend, exact, softcap=4.0, sinks=torch.linspace(-3, 3, cache.q_heads))
