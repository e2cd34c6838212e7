"""Decoding with bulk copies of pages, on the host shim, and that the shim sees what may be wrong with such copies."""

from __future__ import annotations

import ctypes

import pytest
import torch

from kvcompress_hf.kernels import page_layout
from kvcompress_hf.kernels.cuda import CudaBackend, images, nvrtc
from kvcompress_hf.kernels.cuda.plan import _kernel_for
from kvcompress_hf.kernels.host_shim import ORDERS, ShimError, ShimLauncher

F16, BF16 = torch.float16, torch.bfloat16
CODED = [(8, 8), (8, 4), (4, 4), (4, 2), (2, 2)]


class Noting(ShimLauncher):
    """Notes which kernels are launched."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments, bulk_copies=True)
        self.kernels: list[str] = []

    def launch(self, kernel, *arguments, **options) -> None:
        self.kernels.append(kernel)
        super().launch(kernel, *arguments, **options)


@pytest.fixture(scope="module", params=ORDERS)
def launcher(request, shim_library):
    """Kernels with bulk copies, in each schedule of the threads."""
    return Noting(shim_library, request.param)


def decode(twins, launcher, exact, close, *, position=1000, valid=None, scale=0.1, **options):
    """A decoding step through the ring, against the reference."""
    q = twins.randn(twins.kv_heads * twins.group, 1)
    k, v = twins.randn(twins.kv_heads, 1), twins.randn(twins.kv_heads, 1)
    options = twins.asked(scale, **options, position=position, valid=valid)
    launcher.kernels.clear()
    actual = CudaBackend(launcher).decode_attention(q, k, v, twins.rows, twins.tail, **options)
    expected = exact.decode_attention(q, k, v, twins.expected_rows, twins.expected_tail, **options)
    assert [kernel.endswith("_bulk") for kernel in launcher.kernels] == [True]
    close(actual, expected, twins.rows.layout.dtype)
    twins.assert_same_tail()
    twins.assert_same_pages()


@pytest.mark.parametrize("dtype, group", [(F16, 4), (BF16, 7)], ids=str)
@pytest.mark.parametrize("head_dim, tier", [(dim, tier) for dim in (64, 128, 256) for tier in CODED])
def test_every_tier(make_twins, launcher, exact, close, head_dim, tier, dtype, group):
    page_bytes = 8192 if (head_dim, tier) == (256, (4, 2)) else None  # else pages are larger than the ring
    lengths = [[3 * page_layout(head_dim, dtype, [tier]).tiers[0].slots + 21, 150, 1, 48]]
    shape = dict(head_dim=head_dim, dtype=dtype, group=group, page_bytes=page_bytes)
    twins = make_twins(tiers=[tier], lengths=lengths, fields=(), **shape)
    decode(twins, launcher, exact, close)


@pytest.mark.parametrize("tiers", [[(8, 4), (4, 2)], [(0, 0), (2, 2), (8, 8), (4, 4)], [(4, 2), (2, 2), (0, 0)]])
def test_mixtures(make_twins, launcher, exact, close, tiers):
    twins = make_twins(tiers=tiers, head_dim=64, group=3, most=400)
    for position in (900, 901):
        decode(twins, launcher, exact, close, position=position)


@pytest.mark.parametrize("head_dim, tiers", [(128, [(4, 2), (0, 0)]), (64, [(2, 2), (8, 4)])], ids=str)
@pytest.mark.parametrize(
    "lengths", [[[1, 0, 16, 17], [0, 0, 33, 5]], [[0] * 4] * 2, [[700, 3, 0, 64], [64, 900, 0, 1]]]
)
def test_rows_of_any_length(make_twins, launcher, exact, close, head_dim, tiers, lengths):
    twins = make_twins(tiers=tiers, head_dim=head_dim, lengths=lengths, tail_lengths=(20, 3))
    decode(twins, launcher, exact, close)


@pytest.mark.parametrize("page_bytes", [1344, 2688, 6016, 8064, 9408, 11776])
def test_pages_of_any_size(make_twins, shim_library, exact, close, page_bytes):
    # Of 16 to 128 slots, so that the ring holds one or two; the rest of a page are fields and unused bytes.
    twins = make_twins(tiers=[(2, 2)], head_dim=128, lengths=[[400, 3, 0, 64], [64, 900, 0, 1]], page_bytes=page_bytes)
    decode(twins, Noting(shim_library, "shuffled"), exact, close)


def test_many_parts_of_a_row(make_twins, shim_library, exact, close):
    launcher = Noting(shim_library, "descending")
    launcher.blocks = 90
    twins = make_twins(tiers=[(4, 2)], head_dim=128, batch=1, lengths=[[9000, 40]], tail_lengths=(3,))
    decode(twins, launcher, exact, close)


@pytest.mark.parametrize(
    "options",
    [
        dict(window=30, position=345),
        dict(softcap=0.5),
        dict(valid=torch.tensor([True, False])),
        dict(scale=40.0),
        dict(sinks=torch.linspace(-3, 3, 8)),
    ],
    ids=str,
)
def test_options(make_twins, launcher, exact, close, options):
    twins = make_twins(tiers=[(8, 4)], head_dim=128, lengths=[[170, 80, 0, 31], [64, 17, 0, 200]])
    decode(twins, launcher, exact, close, **options)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_statistics(make_twins, launcher, exact, close, head_dim):
    twins = make_twins(tiers=[(4, 4)], head_dim=head_dim, group=6, lengths=[[130, 80, 0, 31], [64, 17, 0, 1]])
    q, k, v = twins.randn(12, 1), twins.randn(2, 1), twins.randn(2, 1)
    options = twins.asked(0.1, sum_field="sum", square_field="square", window=200, position=350)
    actual = CudaBackend(launcher).decode_attention(q, k, v, twins.rows, twins.tail, **options)
    close(actual, exact.decode_attention(q, k, v, twins.expected_rows, twins.expected_tail, **options), F16)
    for field in ("sum", "square"):
        got = CudaBackend(launcher).read_field(twins.rows, 0, field, 130)
        torch.testing.assert_close(got, exact.read_field(twins.expected_rows, 0, field, 130), rtol=2e-3, atol=1e-5)


def test_what_does_not_fit_goes_the_other_way():
    def kernel(tiers, head_dim=128, heads=8, bulk_copies=True, **options):
        return _kernel_for(page_layout(head_dim, F16, tiers, **options), heads, bulk_copies)

    assert kernel([(8, 4)]) == "kvc_decode_128_f16_8_k8v4_bulk"
    assert kernel([(8, 4)], bulk_copies=False) == "kvc_decode_128_f16_8_k8v4"
    assert kernel([(8, 4), (0, 0)], page_bytes=9600) == "kvc_decode_128_f16_8_k8v4_bulk"
    assert kernel([(8, 4)], page_bytes=12800) == "kvc_decode_128_f16_8_k8v4"  # 64 slots
    assert kernel([(8, 4)], page_bytes=12736) == "kvc_decode_128_f16_8_k8v4_bulk"  # 48, and unused bytes behind them
    assert kernel([(8, 4), (4, 2)], page_bytes=9600) == "kvc_decode_128_f16_8_bulk"
    assert kernel([(8, 4)], heads=16) == "kvc_decode_128_f16_16"
    assert kernel([(0, 0)]) == "kvc_decode_128_f16_8"
    assert kernel([(4, 2)], head_dim=256) == "kvc_decode_256_f16_8"


def test_every_kernel_that_may_be_chosen_is_there():
    known = {name for names in images.KERNELS.values() for name in names}
    for head_dim in nvrtc.RING_BYTES:
        for tiers in [[tier] for tier in CODED] + [CODED[1:4]]:
            for dtype in (F16, BF16):
                layout = page_layout(head_dim, dtype, tiers)
                assert {_kernel_for(layout, heads, bulk) for heads in (8, 16) for bulk in (False, True)} <= known


def test_which_devices_have_them():
    have = {arch: images.has_bulk_kernels(arch) for arch in images.ARCHITECTURES.values()}
    assert [arch for arch, has in have.items() if has] == ["sm_90a", "sm_100a"]
    assert images.has_bulk_kernels("sm_103") and not images.has_bulk_kernels("sm_121")
    assert not any(unit.endswith("_bulk") for unit in images.units_of("sm_80"))
    assert set(images.units_of("sm_90a")) == nvrtc.SOURCES.keys()


def copy(launcher, bytes=512, expected=512, skew=0, waits=1, early=0, made=1):
    """The probe's copies, twice 512 bytes by one warp; returns what they should have brought and what they did."""
    memory = torch.arange(1024).remainder(199).to(torch.uint8)
    # At a multiple of 16, however tensors lie.
    buffer = torch.zeros(1024 + 16, dtype=torch.uint8)
    source = buffer[-buffer.data_ptr() % 16 :][:1024].copy_(memory)
    found = torch.zeros(1024, dtype=torch.uint8)
    numbers = (ctypes.c_int32(n) for n in (bytes, expected, skew, waits, early, made))
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (source, found))
    launcher.launch("kvc_shim_bulk", 1, 32, (*pointers, *numbers), torch.device("cpu"))
    return memory.view(2, 512)[:, :32], found.view(2, 512)[:, :32]


def test_bulk_copies_arrive_when_they_are_waited_for(launcher):
    wanted, got = copy(launcher)
    assert torch.equal(got, wanted)
    wanted, got = copy(launcher, bytes=256, expected=256)
    assert torch.equal(got, wanted)


def test_reading_before_the_wait_finds_poison(launcher):
    _, got = copy(launcher, early=1)
    assert (got == 255).any()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(waits=0), "told what to expect before its last phase has ended"),
        (dict(waits=-1), "under way at the end of a block"),
        (dict(expected=496), "bytes that do not come"),
        (dict(expected=528), "bytes that do not come"),
        (dict(bytes=24, expected=24), "not multiples of 16"),
        (dict(skew=8, bytes=32, expected=32), "not multiples of 16"),
        (dict(made=0), "a gate that was not made"),
        (dict(made=2), "a gate that was not made, or was made twice"),
    ],
    ids=str,
)
def test_faults_of_bulk_copies_are_named(launcher, options, message):
    with pytest.raises(ShimError, match=message):
        copy(launcher, **options)
    wanted, got = copy(launcher)  # and leave nothing behind
    assert torch.equal(got, wanted)
