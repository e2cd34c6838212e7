"""Attention of the CUDA kernels against the reference in float64 on the same bytes, in three schedules."""

from __future__ import annotations

import math

import pytest
import torch

from kvcompress_hf.kernels import Logits
from kvcompress_hf.kernels.cuda import CudaBackend
from kvcompress_hf.kernels.host_shim import ShimLauncher
from kvcompress_hf.kernels.reference import page_section

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TIERS = [(0, 0), (8, 8), (8, 4), (4, 4), (4, 2), (2, 2)]


def decode(twins, backend, exact, close, *, position=1000, valid=None, append=True, scale=None, **options):
    q = twins.randn(twins.kv_heads * twins.group, 1)
    k, v = twins.randn(twins.kv_heads, 1), twins.randn(twins.kv_heads, 1)
    options |= dict(position=position, valid=valid, append=append, scale=scale or q.shape[-1] ** -0.5)
    options = twins.asked(**options)
    actual = backend.decode_attention(q, k, v, twins.rows, twins.tail, **options)
    expected = exact.decode_attention(q, k, v, twins.expected_rows, twins.expected_tail, **options)
    close(actual, expected, twins.rows.layout.dtype)
    twins.assert_same_tail()


@pytest.mark.parametrize("dtype, group", [(F16, 4), (BF16, 7), (F16, 9), (BF16, 16)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("tier", TIERS)
def test_decode_on_tensor_cores(make_twins, shim, exact, close, tier, head_dim, dtype, group):
    twins = make_twins(tiers=[tier], head_dim=head_dim, dtype=dtype, group=group, most=150, fields=())
    decode(twins, shim, exact, close)


def test_logits_that_rise_all_along(make_twins, backend, exact, close):
    # The reference point of the softmax moves many times, and far: by more than exp can hold.
    twins = make_twins(tiers=[(8, 8)], head_dim=64, group=3, lengths=[[900, 0, 64, 300]], tail_lengths=(3, 20))
    decode(twins, backend, exact, close, scale=40.0)


@pytest.mark.parametrize("tier", [(8, 8), (8, 4)])
def test_values_without_a_scale(make_twins, shim, exact, close, tier):
    # The reference point follows probabilities times that scale, 0 here. The logits of a page's first 16 slots are 0,
    # those of the others so high that sums leave the range of float32, if nothing moves.
    twins = make_twins(tiers=[tier], head_dim=128, lengths=[[900, 20, 64, 300]], tail_lengths=(0, 0))
    for rows in (twins.rows, twins.expected_rows):
        for slab in rows.slabs:
            for name in ("keys", "values"):
                page_section(slab, rows.layout, 0, name).zero_()
            page_section(slab, rows.layout, 0, "value_params")[..., 0] = 0
            page_section(slab, rows.layout, 0, "key_params")[:, :16] = 0
            page_section(slab, rows.layout, 0, "key_params")[:, 16:] = torch.tensor([0.0, 1.0]).half()
    options = twins.asked(109 * math.log(2) / 128, position=1000, append=False)
    q = torch.ones(2, 8, 1, 128).half()
    actual = shim.decode_attention(q, None, None, twins.rows, twins.tail, **options)
    close(actual, exact.decode_attention(q, None, None, twins.expected_rows, twins.expected_tail, **options), F16)


@pytest.mark.parametrize(
    "lengths", [[[1, 0, 16, 17], [0, 0, 33, 5]], [[0] * 4] * 2, [[700, 3, 0, 64], [64, 900, 0, 1]]]
)
@pytest.mark.parametrize("tail_lengths", [(0, 16), (20, 3)])
def test_rows_of_any_length(make_twins, backend, exact, close, lengths, tail_lengths):
    twins = make_twins(tiers=[(8, 4), (4, 2)], head_dim=128, lengths=lengths, tail_lengths=tail_lengths)
    for position in (500, 501):
        if int(twins.tail.lengths.max()) < twins.tail.capacity:
            decode(twins, backend, exact, close, position=position)


def test_more_rows_than_threads(make_twins, backend, exact, close):
    lengths = [[(7 * row) % 33 for row in range(140)]]  # a thread block has 128, and each looks one row up
    decode(make_twins(batch=70, lengths=lengths, tail_lengths=(3, 0, 16)), backend, exact, close)


def test_many_parts_of_a_row(make_twins, shim_library, exact, close):
    launcher = ShimLauncher(shim_library, "shuffled")
    launcher.blocks = 90
    twins = make_twins(tiers=[(4, 2)], head_dim=128, batch=1, lengths=[[9000, 40]], tail_lengths=(3,))
    decode(twins, CudaBackend(launcher), exact, close)  # of 70: more than a warp has lanes, that merge a part each


@pytest.mark.parametrize("head_dim", [64, 128])
def test_queries_at_odd_addresses(make_twins, shim, exact, close, head_dim):
    twins = make_twins(head_dim=head_dim)
    memory = torch.randn(2 * 8 * (head_dim + 1) + 1).half()
    q = memory[1:].view(2, 8, 1, head_dim + 1)[..., :head_dim]
    options = twins.asked(position=900, scale=0.1, append=False)
    actual = shim.decode_attention(q, None, None, twins.rows, twins.tail, **options)
    close(actual, exact.decode_attention(q, None, None, twins.expected_rows, twins.expected_tail, **options), F16)


@pytest.mark.parametrize("group", [1, 3, 8, 16, 20])
def test_groups(make_twins, backend, exact, close, group):
    twins = make_twins(tiers=[(8, 4), (0, 0)], group=group, lengths=[[400, 80, 0, 31], [64, 17, 0, 200]])
    decode(twins, backend, exact, close, sinks=torch.linspace(-3, 3, 2 * group))


@pytest.mark.parametrize(
    "head_dim, dtype, tiers",
    [
        (16, F32, TIERS[:4]),
        (80, BF16, TIERS[2:]),
        (96, F16, [(8, 2), (2, 8)]),
        (64, F32, [(4, 8)]),
        (256, F32, TIERS[:2]),
    ],
)
def test_decode_of_other_shapes(make_twins, backend, exact, close, head_dim, dtype, tiers):
    twins = make_twins(tiers=tiers, head_dim=head_dim, dtype=dtype, most=40)
    decode(twins, backend, exact, close)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize(
    "options",
    [
        dict(window=30, position=345),
        dict(window=5, position=10**6, append=False),
        dict(softcap=0.5),
        dict(softcap=30.0),
        dict(valid=torch.tensor([True, False])),
        dict(valid=torch.tensor([False, True]), append=False),
        dict(scale=1e-3),
        dict(scale=1.0),
    ],
    ids=str,
)
def test_options(make_twins, shim, exact, close, head_dim, options):
    twins = make_twins(tiers=[(8, 8), (0, 0)], head_dim=head_dim, most=150, dtype=BF16)
    decode(twins, shim, exact, close, **options)


@pytest.mark.parametrize("head_dim, group", [(64, 6), (48, 2)])
def test_statistics(make_twins, backend, exact, close, head_dim, group):
    twins = make_twins(
        tiers=[(8, 4), (4, 4)], head_dim=head_dim, group=group, lengths=[[130, 80, 0, 31], [64, 17, 0, 1]]
    )
    for step in range(2):
        options = dict(sum_field="sum", square_field="square", window=200, position=350 + step)
        decode(twins, backend, exact, close, **options)
    for tier in range(2):
        for field in ("sum", "square"):
            got = backend.read_field(twins.rows, tier, field, 130)
            wanted = exact.read_field(twins.expected_rows, tier, field, 130)
            torch.testing.assert_close(got, wanted, rtol=2e-3, atol=1e-5)
    for b, n in enumerate(twins.tail.lengths.tolist()):
        got, wanted = (tail.float_fields()[1:, b, :, :n] for tail in (twins.tail, twins.expected_tail))
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_a_plan_outlives_a_full_tail(make_twins, shim, exact, close, head_dim):
    twins = make_twins(head_dim=head_dim, capacity=4, tail_lengths=(2, 1))
    plan = shim.plan_decode(twins.rows, twins.tail, logits=Logits(0.1), q_heads=8)
    expected = exact.plan_decode(twins.expected_rows, twins.expected_tail, logits=Logits(0.1), q_heads=8)

    def step(position):
        q, k, v = twins.randn(8, 1), twins.randn(2, 1), twins.randn(2, 1)
        close(plan.run(q, k, v, position), expected.run(q, k, v, position), F16)

    step(7)
    step(8)
    with pytest.raises(ValueError, match="the tail is full"):
        step(9)
    assert twins.tail.lengths.tolist() == [4, 3]
    for tail in (twins.tail, twins.expected_tail):
        tail.lengths.zero_()  # as packing does
    for position in range(9, 13):
        step(position)
    twins.assert_same_tail()


@pytest.mark.parametrize("head_dim", [64, 80])
def test_a_plan_takes_the_shift_off_new_keys(make_twins, shim, exact, close, head_dim):
    twins = make_twins(head_dim=head_dim)
    options = dict(logits=Logits(0.1), q_heads=8, key_shift=twins.randn(2, 1).contiguous())
    plan = shim.plan_decode(twins.rows, twins.tail, **options)
    expected = exact.plan_decode(twins.expected_rows, twins.expected_tail, **options)
    for position in (7, 8):
        q, k, v = twins.randn(8, 1), twins.randn(2, 1), twins.randn(2, 1)
        close(plan.run(q, k, v, position), expected.run(q, k, v, position), F16)
    twins.assert_same_tail()


@pytest.mark.parametrize("head_dim", [64, 80])
def test_a_plan_rotates_new_values_and_its_output(make_twins, shim, exact, close, head_dim):
    twins = make_twins(head_dim=head_dim)
    options = dict(logits=Logits(0.1), q_heads=8, rotates_values=True)
    plan = shim.plan_decode(twins.rows, twins.tail, **options)
    expected = exact.plan_decode(twins.expected_rows, twins.expected_tail, **options)
    for position in (7, 8):
        q, k, v = twins.randn(8, 1), twins.randn(2, 1), twins.randn(2, 1)
        close(plan.run(q, k, v, position), expected.run(q, k, v, position), F16)
        assert torch.equal(twins.tail.v[0, :, position - 2], exact.hadamard(v, head_dim & -head_dim)[0, :, 0])
    close(plan.run(q, None, None, 9, append=False), expected.run(q, None, None, 9, append=False), F16)
    twins.assert_same_tail()


def test_a_plan_says_what_is_wrong(make_twins, shim):
    twins = make_twins()
    plan = shim.plan_decode(twins.rows, twins.tail, logits=Logits(0.1), q_heads=8)
    q, k = twins.randn(8, 1), twins.randn(2, 1)
    for arguments, message in [
        ((q[:, :4], k, k), "q must have shape"),
        ((q, k.float(), k), "k must be torch.float16"),
        ((q, k, None), "k and v are needed"),
        ((q, k, k[:1]), "v must have shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan.run(*arguments, 7)
    with pytest.raises(ValueError, match="valid must be torch.bool"):
        plan.run(q, k, k, 7, torch.ones(2))
    assert twins.tail.lengths.tolist() == [5, 0]


@pytest.mark.parametrize(
    "options, shape",
    [
        (dict(), dict(tiers=[(8, 4), (4, 2)])),
        (dict(), dict(tiers=[(0, 0)], dtype=BF16, head_dim=128)),
        (dict(n_q=1, n_k=1), dict(tiers=[(2, 2), (8, 8)], dtype=F32, head_dim=80, group=3)),
        (dict(n_q=5, n_k=20, key_position=1004), dict(group=1)),
        (dict(n_q=4, key_position=1002, bare=True), dict(most=0)),
        (dict(window=25), dict(tiers=[(8, 4), (0, 0)], head_dim=256)),
        (dict(masked=True, window=30), dict(tiers=[(4, 4)])),
        (dict(softcap=5.0, sinks=True), dict(tiers=[(8, 8)], group=3)),
    ],
    ids=str,
)
def test_chunk(make_twins, backend, exact, close, options, shape):
    options = dict(options)
    twins = make_twins(**shape)
    heads, n_q = twins.kv_heads * twins.group, options.pop("n_q", 9)
    n_k = options.pop("n_k", n_q)
    if options.pop("masked", False):
        options["allowed"] = torch.rand(2, n_q, n_k) < 0.4
        options["bias"] = torch.randn(2, n_q, n_k)
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-4, 4, heads)
    tail, expected_tail = (None, None) if options.pop("bare", False) else (twins.tail, twins.expected_tail)
    q, k, v = twins.randn(heads, n_q), twins.randn(twins.kv_heads, n_k), twins.randn(twins.kv_heads, n_k)
    options = twins.asked(**dict(position=1000, scale=0.1) | options)
    actual = backend.chunk_attention(q, k, v, twins.rows, tail, **options)
    expected = exact.chunk_attention(q, k, v, twins.expected_rows, expected_tail, **options)
    close(actual, expected, twins.rows.layout.dtype)
    twins.assert_same_pages()
    twins.assert_same_tail()


@pytest.mark.parametrize(
    "options, shape",
    [
        (dict(), dict(tiers=[(8, 4), (4, 2)])),
        (dict(power=1, n_q=1, n_k=1), dict(tiers=[(0, 0)], dtype=BF16, head_dim=128)),
        (dict(n_q=20, n_k=50), dict(tiers=[(2, 2), (8, 8)], dtype=F32, head_dim=80, group=3)),
        (dict(n_q=40, n_k=20, exclude=7), dict(most=0)),
        (dict(exclude=800), dict(fields=())),
        (dict(window=25, exclude=2), dict(tiers=[(8, 4), (0, 0)])),
        (dict(padding=True), dict(most=30)),
        (dict(softcap=4.0, sinks=True), dict()),
    ],
    ids=str,
)
def test_window_scores(make_twins, backend, exact, options, shape):
    options = dict(options)
    twins = make_twins(**shape)
    heads, n_q, power = twins.kv_heads * twins.group, options.pop("n_q", 18), options.pop("power", 2)
    n_k = options.pop("n_k", n_q)
    if options.pop("padding", False):
        options["query_valid"], options["key_valid"] = torch.rand(2, n_q) < 0.6, torch.rand(2, n_k) < 0.6
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-3, 3, heads)
    q, k = twins.randn(heads, n_q), twins.randn(twins.kv_heads, n_k)
    options = twins.asked(**dict(position=1000, key_position=1000 + n_q - n_k, scale=0.1) | options)
    expected = exact.column_scores(q, k, twins.expected_rows, twins.expected_tail, **options)
    both = backend.column_scores(q, k, twins.rows, twins.tail, **options)
    one = backend.window_scores(q, k, twins.rows, twins.tail, power=power, **options)
    top = backend.window_scores(q, k, twins.rows, twins.tail, power=0, **options)
    highest = exact.window_scores(q, k, twins.expected_rows, twins.expected_tail, power=0, **options)
    for actual, wanted in [*zip(both, expected, strict=True), (one, expected[power - 1]), (top, highest)]:
        parts = [*zip(actual.past, wanted.past, strict=True), (actual.tail, wanted.tail), (actual.fresh, wanted.fresh)]
        for got, exactly in parts:
            torch.testing.assert_close(got, exactly, rtol=3e-3, atol=1e-6)
