"""decode_attention of every instruction set against the reference in float64 on the same stored values."""

from __future__ import annotations

import pytest
import torch

from kvcompress_hf.kernels import Logits

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
QUANTISED = [(k, v) for k in (8, 4, 2) for v in (8, 4, 2)]


def run_both(cache, backend, exact, *, position: int = 1000, valid=None, append: bool = True, scale=None, **options):
    q = cache.hf(cache.q_heads, 1)
    k, v = cache.hf(cache.kv_heads, 1), cache.hf(cache.kv_heads, 1)
    options |= dict(position=position, valid=valid, append=append, scale=scale or q.shape[-1] ** -0.5)
    options = cache.asked(**options)
    actual = backend.decode_attention(q, k, v, cache.rows, cache.tail, **options)
    return actual, exact.decode_attention(q, k, v, cache.expected_rows, cache.expected_tail, **options)


def check(cache, backend, exact, relative_error, tolerance, **options):
    actual, expected = run_both(cache, backend, exact, **options)
    assert actual.shape == expected.shape and actual.dtype == cache.dtype
    assert relative_error(actual, expected) <= tolerance(cache)
    assert torch.equal(cache.tail.lengths, cache.expected_tail.lengths)
    for b, n in enumerate(cache.tail.lengths.tolist()):
        assert torch.equal(cache.tail.positions[b, :n], cache.expected_tail.positions[b, :n])
        for name in ("k", "v"):
            a, e = getattr(cache.tail, name)[b, :, :n], getattr(cache.expected_tail, name)[b, :, :n]
            assert torch.equal(a, e)


@pytest.mark.parametrize("tier", [*QUANTISED, (0, 0)])
def test_every_tier(build_cache, backend, exact, relative_error, tolerance, tier):
    cache = build_cache(backend, tiers=[tier], head_dim=64, most=200)
    check(cache, backend, exact, relative_error, tolerance)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16])
def test_groups(build_cache, backend, exact, relative_error, tolerance, group):
    cache = build_cache(backend, tiers=[(8, 4), (0, 0)], group=group, head_dim=32)
    check(cache, backend, exact, relative_error, tolerance)


@pytest.mark.parametrize(
    "head_dim, dtype",
    [(16, F32), (48, F16), (80, BF16), (96, F16), (112, F32), (128, BF16), (128, F16), (240, BF16), (256, F32)],
)
def test_head_dims(build_cache, backend, exact, relative_error, tolerance, head_dim, dtype):
    tiers = [(8, 8), (4, 2), (2, 4), (0, 0)]
    cache = build_cache(backend, tiers=tiers, head_dim=head_dim, dtype=dtype, most=70)
    check(cache, backend, exact, relative_error, tolerance)


@pytest.mark.parametrize("page_bytes", [None, 64 * 1024])
def test_page_sizes(build_cache, backend, exact, relative_error, tolerance, page_bytes):
    cache = build_cache(backend, tiers=[(8, 4), (4, 2)], page_bytes=page_bytes, most=900)
    check(cache, backend, exact, relative_error, tolerance)


@pytest.mark.parametrize("lengths", [[1, 0, 16, 17], [0, 0, 0, 0], [64, 63, 65, 128]])
@pytest.mark.parametrize("tail_lengths", [(0, 16), (33, 39)])
def test_edges(build_cache, backend, exact, relative_error, tolerance, lengths, tail_lengths):
    cache = build_cache(backend, tiers=[(4, 4)], most=[lengths], tail_lengths=tail_lengths)
    check(cache, backend, exact, relative_error, tolerance)


def test_nothing_stored_gives_zeros(build_cache, backend):
    cache = build_cache(backend, most=0, tail_lengths=None)
    out = backend.decode_attention(
        cache.hf(cache.q_heads, 1), None, None, cache.rows, cache.tail, position=0, logits=Logits(1.0), append=False
    )
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("append", [True, False])
def test_padding_and_append(build_cache, backend, exact, relative_error, tolerance, append):
    cache = build_cache(backend, batch=3, tail_lengths=(3, 0, 7), dtype=BF16)
    valid = torch.tensor([True, False, True])
    check(cache, backend, exact, relative_error, tolerance, valid=valid, append=append)


@pytest.mark.parametrize("window", [1, 20, 300])
def test_window(build_cache, backend, exact, relative_error, tolerance, window):
    cache = build_cache(backend, tiers=[(8, 4), (0, 0)], most=[[100, 80, 150, 3], [0, 90, 60, 1]])
    check(cache, backend, exact, relative_error, tolerance, window=window, position=340)


def test_window_that_hides_everything(build_cache, backend):
    cache = build_cache(backend)
    out = backend.decode_attention(
        cache.hf(cache.q_heads, 1),
        None,
        None,
        cache.rows,
        cache.tail,
        position=10**6,
        logits=Logits(1.0, window=5),
        append=False,
    )
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(build_cache, backend, exact, relative_error, tolerance, softcap):
    cache = build_cache(backend, tiers=[(8, 8), (0, 0)])
    check(cache, backend, exact, relative_error, tolerance, softcap=softcap)


def test_sinks(build_cache, backend, exact, relative_error, tolerance):
    cache = build_cache(backend, tiers=[(8, 4)])
    sinks = torch.linspace(-5, 5, cache.q_heads)
    check(cache, backend, exact, relative_error, tolerance, sinks=sinks)


@pytest.mark.parametrize("scale", [1e-3, 3.0])
def test_flat_and_sharp_softmax(build_cache, backend, exact, relative_error, tolerance, scale):
    cache = build_cache(backend, tiers=[(8, 8), (0, 0)], most=400)
    actual, expected = run_both(cache, backend, exact, scale=scale)
    assert relative_error(actual, expected) <= 2e-3


@pytest.mark.parametrize("group", [1, 6])
@pytest.mark.parametrize("tier", [(8, 8), (8, 4)])
def test_statistics(build_cache, backend, exact, relative_error, group, tier, threads):
    close = dict(rtol=1e-4, atol=1e-6)
    if tier == (8, 4) and backend.isa == "avx512vnni":  # most of the query has 8 bits
        close = dict(rtol=2e-2, atol=1e-5)
    cache = build_cache(backend, tiers=[tier, (0, 0)], group=group, most=[[2000, 80, 0, 31], [64, 17, 0, 700]])
    before = [cache.rows.lengths[t].clone() for t in range(2)]
    for step in range(2):
        run_both(cache, backend, exact, sum_field="sum", square_field="square", window=1500, position=4001 + step)
    for tier in range(2):
        width = int(before[tier].max())
        for field in ("sum", "square"):
            actual = backend.read_field(cache.rows, tier, field, width)
            expected = exact.read_field(cache.expected_rows, tier, field, width)
            torch.testing.assert_close(actual, expected, **close)
    actual, expected = cache.tail.float_fields(), cache.expected_tail.float_fields()
    for b, n in enumerate(cache.tail.lengths.tolist()):
        torch.testing.assert_close(actual[1:, b, :, :n], expected[1:, b, :, :n], **close)
        assert (actual[1:, b, :, :n] > 0).any()


@pytest.mark.parametrize("statistics", [False, True])
def test_rows_are_split_over_threads(build_cache, backend, exact, relative_error, tolerance, threads, statistics):
    lengths = [[5000, 3, 0, 700], [5, 2000, 0, 64]]
    cache = build_cache(backend, tiers=[(8, 4), (4, 2)], most=lengths, dtype=BF16, head_dim=128)
    options = dict(sum_field="sum", square_field="square") if statistics else {}
    check(cache, backend, exact, relative_error, tolerance, **options)


@pytest.mark.parametrize("batch", [1, 20])
def test_many_rows(build_cache, backend, exact, relative_error, tolerance, threads, batch):
    cache = build_cache(backend, batch=batch, kv_heads=8, group=4, most=90, dtype=F16, tail_lengths=(7,))
    check(cache, backend, exact, relative_error, tolerance)


def test_full_tail_is_an_error_and_changes_nothing(build_cache, backend):
    cache = build_cache(backend, tail_lengths=(40, 3), tail_capacity=40)
    lengths = cache.tail.lengths.clone()
    q, k = cache.hf(cache.q_heads, 1), cache.hf(cache.kv_heads, 1)
    with pytest.raises(ValueError):
        backend.decode_attention(q, k, k, cache.rows, cache.tail, position=1, logits=Logits(1.0))
    assert torch.equal(cache.tail.lengths, lengths)


def test_append_skips_padding(build_cache, backend, exact):
    cache = build_cache(backend, tail_lengths=(5, 0))
    k, v = cache.hf(cache.kv_heads, 6), cache.hf(cache.kv_heads, 6)
    valid = torch.tensor([[True] * 6, [False, True, True, False, True, False]])
    backend.append(cache.tail, k, v, 700, valid)
    exact.append(cache.expected_tail, k, v, 700, valid)
    assert cache.tail.lengths.tolist() == [11, 3]
    for b, n in enumerate(cache.tail.lengths.tolist()):
        for name in ("k", "v"):
            assert torch.equal(getattr(cache.tail, name)[b, :, :n], getattr(cache.expected_tail, name)[b, :, :n])
        assert torch.equal(cache.tail.positions[b, :n], cache.expected_tail.positions[b, :n])


def test_plan_matches_direct_call(build_cache, backend):
    cache, other = (build_cache(backend, dtype=BF16, head_dim=128, seed=3) for _ in range(2))
    plan = backend.plan_decode(cache.rows, cache.tail, logits=Logits(0.1), q_heads=cache.q_heads, sum_field="sum")
    for step in range(3):
        q, k, v = cache.hf(cache.q_heads, 1), cache.hf(cache.kv_heads, 1), cache.hf(cache.kv_heads, 1)
        expected = backend.decode_attention(
            q, k, v, other.rows, other.tail, position=500 + step, logits=Logits(0.1), sum_field="sum"
        )
        assert torch.equal(plan.run(q, k, v, 500 + step), expected)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_keys_are_shifted_on_their_way_into_the_tail(build_cache, backend, dtype):
    """To the bit as if the caller had taken the shift off; attention sees the shifted keys; padding is left out."""
    cache, other = (build_cache(backend, dtype=dtype, head_dim=80, seed=3) for _ in range(2))
    shift = 3.0 * cache.randn(2, cache.kv_heads, 1, 80).to(dtype)
    options = dict(logits=Logits(0.1), q_heads=cache.q_heads)
    shifting = backend.plan_decode(cache.rows, cache.tail, key_shift=shift, **options)
    plain = backend.plan_decode(other.rows, other.tail, **options)
    valid = torch.tensor([True, False])
    for step in range(3):
        q, k, v = cache.hf(cache.q_heads, 1), cache.hf(cache.kv_heads, 1), cache.hf(cache.kv_heads, 1)
        padding = valid if step == 1 else None
        expected = plain.run(q, k - shift, v, 500 + step, padding)
        assert torch.equal(shifting.run(q, k, v, 500 + step, padding), expected)
        torch.testing.assert_close(cache.tail.k, other.tail.k, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(cache.tail.lengths, other.tail.lengths)
    with pytest.raises(ValueError, match="key_shift"):
        backend.plan_decode(cache.rows, cache.tail, key_shift=shift[:, :1], **options)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_values_are_rotated_on_their_way_into_the_tail_and_outputs_back(build_cache, backend, exact, dtype, head_dim):
    """To the bit as if the caller had rotated new values; the output is what these values' output stands for."""
    block = head_dim & -head_dim
    cache, other = (build_cache(backend, dtype=dtype, head_dim=head_dim, seed=3) for _ in range(2))
    options = dict(logits=Logits(0.1), q_heads=cache.q_heads)
    rotating = backend.plan_decode(cache.rows, cache.tail, rotates_values=True, **options)
    plain = backend.plan_decode(other.rows, other.tail, **options)
    valid = torch.tensor([True, False])
    for step in range(3):
        q, k, v = cache.hf(cache.q_heads, 1), cache.hf(cache.kv_heads, 1), cache.hf(cache.kv_heads, 1)
        padding = valid if step == 1 else None
        output = plain.run(q, k, exact.hadamard(v, block), 500 + step, padding)
        got = rotating.run(q, k, v, 500 + step, padding)
        close = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.float(), exact.hadamard(output.float(), block), rtol=close, atol=8 * close)
        torch.testing.assert_close(cache.tail.v, other.tail.v, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(cache.tail.k, other.tail.k, rtol=0, atol=0, equal_nan=True)
    assert not rotating.run(q, k, v, 503, torch.tensor([True, False]))[1].any()


@pytest.mark.parametrize("outliers", [0, 1, 2, 40])
def test_outliers_in_the_query(build_cache, backend, exact, relative_error, outliers):
    """Dims far larger than the rest, more than fit into the quads that get two bytes, and a query of zeros."""
    cache = build_cache(backend, tiers=[(8, 4)], head_dim=80, most=300)
    q = cache.randn(2, cache.q_heads, 1, 80) if outliers else torch.zeros(2, cache.q_heads, 1, 80)
    q[..., ::2][..., :outliers] *= 30.0
    q[:, 0, :, 4:] = 0.0  # fewer quads than get two bytes
    options = dict(position=400, logits=Logits(80**-0.5 / 8), append=False)
    actual = backend.decode_attention(q, None, None, cache.rows, cache.tail, **options)
    expected = exact.decode_attention(q, None, None, cache.expected_rows, cache.expected_tail, **options)
    assert relative_error(actual, expected) <= 2e-2


def test_nan_in_the_query_is_not_hidden(build_cache, backend):
    cache = build_cache(backend, tiers=[(8, 4)], most=[[20, 30, 40, 50]])
    q = cache.hf(cache.q_heads, 1).clone()
    q[0, 0, 0, 3] = float("nan")
    out = backend.decode_attention(
        q, None, None, cache.rows, cache.tail, position=400, logits=Logits(0.1), append=False
    )
    assert out[0, 0, 0].isnan().all() and out[1].isfinite().all()
