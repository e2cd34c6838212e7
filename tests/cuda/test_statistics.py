"""Statistics of a decoding step: in the step's own launch, blocks waiting for each other, against the reference."""

from __future__ import annotations

import pytest
import torch

from kvcompress_hf.kernels import Logits
from kvcompress_hf.kernels.cuda import CudaBackend
from kvcompress_hf.kernels.host_shim import ORDERS, ShimError, ShimLauncher

F16, BF16 = torch.float16, torch.bfloat16
MANY_PARTS = [[1500, 0, 70, 1], [64, 900, 0, 17]]  # rows over many thread blocks, and thread blocks over several rows


class Counter(ShimLauncher):
    """Notes what is launched, and whether its blocks may wait for each other."""

    def __init__(self, library, order="shuffled", refuse=False):
        super().__init__(library, order)
        self.launches, self.refuse = [], refuse

    def launch(self, kernel, grid, block, arguments, device, cooperative=False):
        self.launches.append((kernel, cooperative))
        super().launch(kernel, grid, block, arguments, device, cooperative and not self.refuse)


@pytest.fixture(params=ORDERS)
def counter(request, shim_library):
    return Counter(shim_library, request.param)


def compare(twins, launcher, exact, close, *, steps=2, **options):
    """Runs steps on both sides; the fields of all slots must agree, and each step must be one launch."""
    backend = CudaBackend(launcher)
    valid = options.pop("valid", None)
    q_heads = twins.kv_heads * twins.group
    position, append = options.pop("position", 1000), options.pop("append", True)
    options = twins.asked(**dict(scale=0.1, q_heads=q_heads) | options)
    plans = (
        backend.plan_decode(twins.rows, twins.tail, **options),
        exact.plan_decode(twins.expected_rows, twins.expected_tail, **options),
    )
    for step in range(steps):
        q, k, v = twins.randn(q_heads, 1), twins.randn(twins.kv_heads, 1), twins.randn(twins.kv_heads, 1)
        launcher.launches.clear()
        actual, expected = (plan.run(q, k, v, position + step, valid, append) for plan in plans)
        close(actual, expected, twins.rows.layout.dtype)
        assert [cooperative for _, cooperative in launcher.launches] == [True]
        assert launcher.launches[0][0].startswith("kvc_decode_")
    twins.assert_same_tail()
    for tier in range(len(twins.rows.layout.tiers)):
        width = max(int(twins.rows.lengths[tier].max()), 1)
        for field in ("sum", "square"):
            got = backend.read_field(twins.rows, tier, field, width)
            wanted = exact.read_field(twins.expected_rows, tier, field, width)
            torch.testing.assert_close(got, wanted, rtol=2e-3, atol=1e-5)
    for b, n in enumerate(twins.tail.lengths.tolist()):
        got, wanted = (tail.float_fields()[1:, b, :, :n] for tail in (twins.tail, twins.expected_tail))
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=1e-5)


BOTH = dict(sum_field="sum", square_field="square")


@pytest.mark.parametrize("lengths", [MANY_PARTS, [[0] * 4] * 2, [[1, 16, 17, 32]] * 2], ids=["many", "none", "few"])
@pytest.mark.parametrize("group", [4, 20])
def test_rows_of_any_length(make_twins, counter, exact, close, lengths, group):
    twins = make_twins(tiers=[(8, 4), (4, 2)], group=group, lengths=lengths, tail_lengths=(18, 0))
    compare(twins, counter, exact, close, **BOTH)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("head_dim, group", [(64, 1), (128, 8), (128, 12), (256, 7), (256, 16)])
def test_shapes(make_twins, shim_library, exact, close, head_dim, group, dtype):
    lengths = [[300, 20, 64, 0], [0, 130, 16, 5]]
    twins = make_twins(tiers=[(8, 8), (0, 0)], head_dim=head_dim, group=group, dtype=dtype, lengths=lengths)
    compare(twins, Counter(shim_library), exact, close, **BOTH)


@pytest.mark.parametrize(
    "options",
    [
        dict(window=200, position=350),
        dict(window=1, position=10**6),
        dict(softcap=3.0, scale=1.0),
        dict(sinks=torch.linspace(-3, 3, 12)),
        dict(valid=torch.tensor([True, False])),
        dict(valid=torch.tensor([False, False]), steps=1),
        dict(append=False),
        dict(square_field=None),
        dict(sum_field=None),
    ],
    ids=str,
)
def test_options(make_twins, shim_library, exact, close, options):
    twins = make_twins(tiers=[(4, 4), (0, 0)], group=6, lengths=[[400, 80, 0, 31], [64, 17, 0, 1]])
    compare(twins, Counter(shim_library), exact, close, **BOTH | options)


@pytest.mark.parametrize("head_dim, group, columns", [(64, 1, 2), (64, 4, 4), (128, 7, 8), (64, 12, 12), (64, 20, 32)])
def test_logits_are_kept_for_the_heads_there_are(make_twins, shim, head_dim, group, columns):
    twins = make_twins(tiers=[(8, 4)], head_dim=head_dim, group=group, lengths=[[90, 0, 3, 70]], capacity=21)
    options = dict(logits=Logits(0.1), q_heads=2 * group)
    without, kept = (
        shim.plan_decode(twins.rows, twins.tail, sum_field=field, **options).step_nbytes for field in (None, "sum")
    )
    blocks = -(-twins.rows.tables[0].shape[1] * twins.rows.layout.tiers[0].slots // 16) + 2  # and those of the tail
    assert kept - without == 4 * blocks * 16 * 4 * columns  # rows, slots, bytes


def test_without_statistics_nobody_waits(make_twins, shim_library):
    twins, launcher = make_twins(), Counter(shim_library)
    plan = CudaBackend(launcher).plan_decode(twins.rows, twins.tail, logits=Logits(0.1), q_heads=8)
    plan.run(twins.randn(8, 1), twins.randn(2, 1), twins.randn(2, 1), 300)
    assert launcher.launches == [("kvc_decode_64_f16_8", False)]


@pytest.mark.parametrize(
    "tiers, group, suffix",
    [
        ([(4, 2)], 4, "8_k4v2"),
        ([(0, 0), (4, 4)], 8, "8_k4v4"),
        ([(2, 2), (0, 0)], 1, "8_k2v2"),
        ([(8, 4)], 4, "8_k8v4"),
        ([(8, 8)], 4, "8"),
        ([(4, 2), (2, 2)], 4, "8"),
        ([(0, 0)], 4, "8"),
        ([(4, 2)], 9, "16"),
    ],
    ids=str,
)
def test_codes_of_one_tier_have_a_kernel_of_their_own(make_twins, shim_library, exact, close, tiers, group, suffix):
    twins, launcher = make_twins(tiers=tiers, head_dim=128, group=group, dtype=BF16), Counter(shim_library)
    compare(twins, launcher, exact, close, steps=1, **BOTH)
    assert launcher.launches[0] == (f"kvc_decode_128_bf16_{suffix}", True)


def test_other_shapes_add_them_up_afterwards(make_twins, shim_library):
    twins, launcher = make_twins(head_dim=48), Counter(shim_library)
    plan = CudaBackend(launcher).plan_decode(twins.rows, twins.tail, logits=Logits(0.1), q_heads=8, sum_field="sum")
    plan.run(twins.randn(8, 1), twins.randn(2, 1), twins.randn(2, 1), 300)
    assert launcher.launches[-1] == ("kvc_statistics", False)


@pytest.mark.parametrize("order", ORDERS)
def test_the_shim_notices_a_wait_for_blocks_that_do_not_run(make_twins, shim_library, order):
    twins = make_twins(lengths=[[900] * 4])
    backend = CudaBackend(Counter(shim_library, order, refuse=True))
    with pytest.raises(ShimError, match="wait for each other for ever"):
        backend.decode_attention(
            twins.randn(8, 1), twins.randn(2, 1), twins.randn(2, 1), twins.rows, twins.tail,
            position=300, logits=Logits(0.1), sum_field="sum",
        )  # fmt: skip
