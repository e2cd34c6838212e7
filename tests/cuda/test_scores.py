"""Window and column scores on tensor cores: every tier, shape, mask and power, over many queries and slots."""

from __future__ import annotations

import pytest
import torch

F16, BF16 = torch.float16, torch.bfloat16
TIERS = [(0, 0), (8, 8), (8, 4), (4, 4), (4, 2), (2, 2)]


def compare(twins, backend, exact, n_q, *, n_k=None, bare=False, **options):
    heads, n_k = twins.kv_heads * twins.group, n_q if n_k is None else n_k
    q, k = twins.randn(heads, n_q), twins.randn(twins.kv_heads, n_k)
    options = dict(position=3000, key_position=3000 + n_q - n_k, scale=q.shape[-1] ** -0.5) | options
    options = twins.asked(**options)
    tails = (None, None) if bare else (twins.tail, twins.expected_tail)
    wanted = [
        *exact.column_scores(q, k, twins.expected_rows, tails[1], **options),
        exact.window_scores(q, k, twins.expected_rows, tails[1], power=0, **options),
    ]
    got = [
        *backend.column_scores(q, k, twins.rows, tails[0], **options),
        backend.window_scores(q, k, twins.rows, tails[0], power=0, **options),
    ]
    for actual, expected in zip(got, wanted, strict=True):
        parts = [*zip(actual.past, expected.past, strict=True)]
        parts += [(actual.tail, expected.tail), (actual.fresh, expected.fresh)]
        for a, b in parts:
            torch.testing.assert_close(a, b, rtol=3e-3, atol=1e-6)
            assert (a[b == 0] == 0).all()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("tier", [*TIERS, (2, 8)], ids=str)
def test_every_tier(make_twins, shim, exact, tier, head_dim, dtype):
    twins = make_twins(tiers=[tier], head_dim=head_dim, dtype=dtype, group=2, most=150, fields=())
    compare(twins, shim, exact, 5)


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("group, n_q", [(1, 1), (1, 70), (3, 33), (5, 16), (16, 9)])
def test_queries_and_heads(make_twins, backend, exact, group, n_q, head_dim):
    twins = make_twins(
        tiers=[(8, 4), (4, 2)], group=group, head_dim=head_dim, lengths=[[100, 65, 0, 31], [64, 1, 0, 17]]
    )
    compare(twins, backend, exact, n_q, sinks=torch.linspace(-3, 3, 2 * group))


@pytest.mark.parametrize("head_dim, dtype", [(64, F16), (128, BF16)])
@pytest.mark.parametrize(
    "options",
    [
        dict(n_q=32, n_k=300),
        dict(n_q=130, n_k=130),
        dict(n_q=130, n_k=130, window=40),
        dict(n_q=90, n_k=200, exclude=30),
        dict(n_q=90, n_k=100, exclude=7, window=60),
        dict(n_q=20, n_k=10, exclude=10**6, bare=True),
        dict(n_q=40, n_k=70, key_position=3100),
        dict(n_q=40, n_k=70, padding=True),
        dict(n_q=18, softcap=2.0),
        dict(n_q=18, softcap=30.0, window=500, position=600, key_position=600),
        dict(n_q=33, n_k=0),
    ],
    ids=str,
)
def test_options(make_twins, shim, exact, head_dim, dtype, options):
    options = dict(options)
    n_q = options.pop("n_q")
    twins = make_twins(tiers=[(8, 8), (0, 0)], head_dim=head_dim, dtype=dtype, kv_heads=1, most=90)
    if options.pop("padding", False):
        options["query_valid"] = torch.rand(2, n_q) < 0.6
        options["key_valid"] = torch.rand(2, options["n_k"]) < 0.6
        options["query_valid"][0] = False
    compare(twins, shim, exact, n_q, **options)
