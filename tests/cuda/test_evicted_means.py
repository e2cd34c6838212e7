"""What was evicted, as one slot, in the CUDA kernels against the reference: decoding, chunks, scores, statistics."""

from __future__ import annotations

import dataclasses

import pytest
import torch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [(64, F16), (128, BF16), (256, F16), (80, BF16), (64, F32)]  # the last two are not for tensor cores


def with_means(twins, counts=(300, 0, 1, 4000)):
    """The same twins, of whose rows so many slots have been evicted."""
    count, head_dim = twins.rows.count, twins.rows.layout.head_dim
    counts = torch.tensor((counts * count)[:count], dtype=torch.int32)
    means = torch.randn(count, 2, head_dim, generator=torch.Generator().manual_seed(7)).to(twins.rows.layout.dtype)
    means[counts == 0] = 0.0
    given = dict(evicted_means=means, evicted_counts=counts)
    rows = [dataclasses.replace(rows, **given) for rows in (twins.rows, twins.expected_rows)]
    return dataclasses.replace(twins, rows=rows[0], expected_rows=rows[1])


def decode(twins, backend, exact, **options):
    heads = twins.kv_heads * twins.group
    q, k, v = twins.randn(heads, 1), twins.randn(twins.kv_heads, 1), twins.randn(twins.kv_heads, 1)
    options = twins.asked(**dict(position=3000, scale=q.shape[-1] ** -0.5) | options)
    actual = backend.decode_attention(q, k, v, twins.rows, twins.tail, **options)
    return actual, exact.decode_attention(q, k, v, twins.expected_rows, twins.expected_tail, **options)


def chunk(twins, backend, exact, n_q=11, **options):
    heads = twins.kv_heads * twins.group
    q, k, v = twins.randn(heads, n_q), twins.randn(twins.kv_heads, n_q), twins.randn(twins.kv_heads, n_q)
    options = twins.asked(**dict(position=3000, scale=q.shape[-1] ** -0.5) | options)
    actual = backend.chunk_attention(q, k, v, twins.rows, twins.tail, **options)
    return actual, exact.chunk_attention(q, k, v, twins.expected_rows, twins.expected_tail, **options)


BOTH = pytest.mark.parametrize("attend", [decode, chunk])


@BOTH
@pytest.mark.parametrize("head_dim, dtype", SHAPES)
@pytest.mark.parametrize("group", [1, 3, 12])
def test_shapes(make_twins, shim, exact, close, attend, head_dim, dtype, group):
    twins = with_means(make_twins(tiers=[(8, 4), (4, 2), (0, 0)], head_dim=head_dim, dtype=dtype, group=group))
    close(*attend(twins, shim, exact), dtype)


@BOTH
@pytest.mark.parametrize("head_dim, dtype", SHAPES[::3])
@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"sinks": torch.linspace(-5, 5, 8)}])
def test_how_logits_are_made(make_twins, shim, exact, close, attend, head_dim, dtype, options):
    twins = with_means(make_twins(tiers=[(8, 8), (0, 0)], head_dim=head_dim, dtype=dtype))
    close(*attend(twins, shim, exact, **options), dtype)


@BOTH
def test_rows_that_blocks_share(make_twins, backend, exact, close, attend):
    twins = make_twins(batch=1, kv_heads=1, tiers=[(8, 4)], lengths=[[1500]], most=1500, tail_lengths=(9,))
    close(*attend(with_means(twins, (700,)), backend, exact), F16)


@BOTH
@pytest.mark.parametrize("head_dim, dtype", SHAPES[::3])
def test_where_nothing_was_evicted_nothing_changes(make_twins, shim, exact, attend, head_dim, dtype):
    shape = dict(tiers=[(8, 4), (0, 0)], head_dim=head_dim, dtype=dtype)
    without = attend(make_twins(**shape), shim, exact)[0]
    assert torch.equal(without, attend(with_means(make_twins(**shape), (0,)), shim, exact)[0])
    mixed = attend(with_means(make_twins(**shape)), shim, exact)[0]
    assert torch.equal(without[0, :, 4:], mixed[0, :, 4:])  # the heads of row 1
    assert not torch.equal(without[0, :, :4], mixed[0, :, :4])


@BOTH
@pytest.mark.parametrize("head_dim, dtype", SHAPES[::3])
def test_a_row_of_which_nothing_is_left(make_twins, shim, exact, close, attend, head_dim, dtype):
    twins = make_twins(lengths=[[0, 0, 0, 0]], tail_lengths=(0,), head_dim=head_dim, dtype=dtype)
    close(*attend(with_means(twins), shim, exact, **({"append": False} if attend is decode else {})), dtype)


@pytest.mark.parametrize("head_dim, dtype", SHAPES[::3])
def test_padding_sees_nothing(make_twins, shim, exact, close, head_dim, dtype):
    twins = with_means(make_twins(head_dim=head_dim, dtype=dtype))
    actual, expected = decode(twins, shim, exact, valid=torch.tensor([True, False]))
    close(actual, expected, dtype)
    assert not actual[1].any()


@pytest.mark.parametrize("head_dim, dtype", SHAPES[::3])
def test_statistics_and_scores(make_twins, shim, exact, head_dim, dtype):
    twins = with_means(make_twins(tiers=[(8, 8), (0, 0)], head_dim=head_dim, dtype=dtype))
    decode(twins, shim, exact, sum_field="sum", square_field="square")
    for tier, lengths in enumerate(twins.rows.lengths):
        for field in ("sum", "square"):
            got = shim.read_field(twins.rows, tier, field, int(lengths.max()))
            wanted = exact.read_field(twins.expected_rows, tier, field, int(lengths.max()))
            torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-4)
    q, k = twins.randn(8, 20), twins.randn(2, 20)
    asked = twins.asked(0.2, position=3001, key_position=3001, power=1)
    got = shim.window_scores(q, k, twins.rows, twins.tail, **asked)
    wanted = exact.window_scores(q, k, twins.expected_rows, twins.expected_tail, **asked)
    for one, two in zip([*got.past, got.tail, got.fresh], [*wanted.past, wanted.tail, wanted.fresh], strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("head_dim, dtype", [(64, torch.float16), (256, torch.bfloat16), (80, torch.float32)])
@pytest.mark.parametrize("lengths", [[[5, 90, 17, 0], [1, 2, 64, 3]], [[600, 511, 0, 512], [257, 1, 256, 255]]])
def test_sums_over_slots(make_twins, backend, exact, lengths, head_dim, dtype):
    twins = make_twins(
        tiers=[(8, 4), (4, 2)] if head_dim > 80 else [(2, 8), (0, 0)], lengths=lengths, head_dim=head_dim, dtype=dtype
    )
    for tier, filled in enumerate(twins.rows.lengths):
        for width in (0, 7, int(filled.max()) - 3, int(filled.max()) + 300):
            chosen = torch.rand(width, 4, generator=twins.generator).T < 0.5  # not contiguous
            got, wanted = (
                backend.slot_sums(twins.rows, tier, chosen),
                exact.slot_sums(twins.expected_rows, tier, chosen),
            )
            assert got.shape == (4, 2, head_dim) and got.dtype == torch.float32
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-3)
