"""pack: the codes of every instruction set are those of the reference, byte for byte."""

import pytest
import torch

from kvcompress_hf.kernels import CpuBackend, ReferenceBackend, get_backend, page_layout
from kvcompress_hf.kernels.cpu import instruction_sets
from kvcompress_hf.kernels.quantize import hadamard, quantize
from kvcompress_hf.paging.key_feedback import key_feedback

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [
    [(0, 0), (8, 8), (8, 4), (8, 2)],
    [(4, 8), (4, 4), (4, 2)],
    [(2, 8), (2, 4), (2, 2)],
]


def _ints(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_same_bytes_as_reference(make_twins, make_states, backend, head_dim, dtype):
    k, v, fields = make_states(2, 2, 24, head_dim, dtype, seed=head_dim)
    first = torch.tensor([[24, 3], [0, 17]], dtype=torch.int32)
    second = torch.tensor([[1, 24], [0, 11]], dtype=torch.int32)  # starts inside a block of 16 slots
    for tiers in LAYOUTS:
        twins = make_twins(backend, head_dim, dtype, tiers, room=48)
        for tier in range(len(tiers)):
            overflow = twins.pack(tier, k, v, first, None, fields)
            assert (overflow > 0) == (tiers[tier] != (0, 0))
            twins.pack(tier, k, v, second, None, fields)
        twins.assert_same_pages()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128, 256])
def test_same_bytes_as_reference_with_feedback(make_twins, make_states, backend, head_dim, dtype):
    k, v, fields = make_states(2, 2, 24, head_dim, dtype, seed=head_dim)
    counts = torch.tensor([[24, 3], [0, 17]], dtype=torch.int32)
    plain = make_twins(backend, head_dim, dtype, [(4, 4)], room=48)
    for tiers in ([(0, 0), (8, 4)], [(4, 4), (2, 2)]):
        twins = make_twins(backend, head_dim, dtype, tiers, room=48, feedback=True)
        for tier in range(len(tiers)):
            for _ in range(2):  # the second time from inside a block of 16 slots
                overflow = twins.pack(tier, k, v, counts, None, fields)
                assert (overflow > 0) == (tiers[tier] != (0, 0))
        twins.assert_same_pages()
    row, slot = _ints([0, 0, 3]), _ints([5, 17, 2])
    twins.both("retier", row, 0, slot, 1, slot)
    twins.assert_same_pages()
    plain.pack(0, k, v, counts, None, fields)
    with_feedback, without = (x.backend.read_slots(x.rows, 0, 24)[0] for x in (twins, plain))
    assert not torch.equal(with_feedback, without)


def test_feedback_makes_good_what_queries_see(make_twins, backend):
    """Keys as queries of few directions see them get closer, in the same bits."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4, 64, generator=generator)
    query = torch.randn(1, 4, 256, 4, generator=generator) @ directions + 0.1 * torch.randn(
        1, 4, 256, 64, generator=generator
    )
    k = torch.randn(1, 4, 300, 64, generator=generator)
    errors = []
    for feedback in (False, True):
        twins = make_twins(backend, 64, torch.float32, [(4, 4)], count=4, room=300, fields=(), feedback=feedback)
        if feedback:
            for rows in (twins.rows, twins.expected):
                rows.key_feedback = key_feedback(query, 4)[0]
        twins.pack(0, k, k, torch.full((1, 4), 300, dtype=torch.int32))
        got = backend.read_slots(twins.rows, 0, 300)[0]
        errors.append(float((query[0] @ (got - k[0]).transpose(1, 2)).norm()))
    twins.assert_same_pages()
    assert errors[1] < 0.6 * errors[0]


def test_index_picks_source_tokens(make_twins, make_states, backend, threads):
    k, v, fields = make_states(2, 3, 400, 64, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, 400, (2, 3, 210), generator=generator).int()
    counts = torch.tensor([[210, 0, 33], [1, 209, 100]], dtype=torch.int32)
    twins = make_twins(backend, 64, torch.bfloat16, [(8, 4), (0, 0), (4, 2)], count=6, room=420)
    for tier in range(3):
        twins.pack(tier, k, v, counts, index, fields)
        twins.pack(tier, k, v, counts.flip(0), index.flip(2).transpose(0, 1).contiguous().transpose(0, 1), fields)
    twins.assert_same_pages()
    positions = backend.read_field(twins.rows, 2, "position", 210)
    assert torch.equal(positions[0], index[0, 0])


def test_expanded_and_strided_inputs(make_twins, make_states, backend):
    k, v, fields = make_states(1, 2, 40, 48, torch.float16)
    k, v = k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1)
    fields = {"position": fields["position"][:, :, :1].expand(3, 2, 40), "score": torch.zeros(1).expand(3, 2, 40)}
    counts = torch.tensor([[5]], dtype=torch.int32).expand(3, 2)
    twins = make_twins(backend, 48, torch.float16, [(4, 4)], count=6)
    twins.pack(0, k, v, counts, None, fields)
    twins.pack(0, k[:, :, ::3], v[:, :, ::3], counts, None, {n: x[:, :, ::3] for n, x in fields.items()})
    twins.assert_same_pages()


def test_nan_and_infinity_are_counted_and_stored_finite(make_twins, make_states, backend):
    k, v, fields = make_states(1, 1, 64, 32, torch.float32, seed=3)
    k, v = k.clone(), v.clone()
    k[0, 0, 3, 5] = float("nan")
    v[0, 0, 7, 9] = float("nan")
    v[0, 0, 7, 10] = float("inf")
    k[0, 0, 8, 1] = float("-inf")
    v[0, 0, 11] = float("inf")
    v[0, 0, 12] = 3e38
    v[0, 0, 12, 0] = -3e38
    tiers = [(8, 8), (4, 4), (2, 2)]
    twins = make_twins(backend, 32, torch.float32, tiers, count=1)
    for tier in range(len(tiers)):
        assert twins.pack(tier, k, v, torch.tensor([[64]], dtype=torch.int32), None, fields) >= 5
        for x in backend.read_slots(twins.rows, tier, 64):
            assert x.isfinite().all()
    twins.assert_same_pages()


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.009), (4, 0.14), (2, 0.53)], ids=["8 bits", "4 bits", "2 bits"])
@pytest.mark.parametrize("head_dim", [48, 64, 128, 256])
def test_round_trip_error(make_twins, backend, bits, bound, head_dim):
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 300, head_dim, generator=generator) for _ in range(2))
    twins = make_twins(backend, head_dim, torch.float32, [(bits, bits)], count=2, room=300, fields=())
    assert twins.pack(0, k, v, torch.full((1, 2), 300, dtype=torch.int32)) == 0
    for got, wanted in zip(backend.read_slots(twins.rows, 0, 300), (k[0], v[0]), strict=True):
        assert (got - wanted).norm() / wanted.norm() < bound


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_values_keep_their_length(make_twins, backend, bits, head_dim):
    """What attention adds up must not be shorter than it was: a model bears noise better (docs/real_models.md)."""
    v = torch.randn(1, 2, 300, head_dim, generator=torch.Generator().manual_seed(0))
    twins = make_twins(backend, head_dim, torch.float32, [(8, bits)], count=2, room=300, fields=())
    twins.pack(0, v, v, torch.full((1, 2), 300, dtype=torch.int32))
    got = backend.read_slots(twins.rows, 0, 300)[1]
    assert 0.97 < float((got * v[0]).sum() / v.square().sum()) < 1.1


def test_rotation_tames_outlier_channels():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 128, generator=generator)
    x[:, [3, 40, 77]] *= 12
    errors = []
    for y in (x, hadamard(x, 128)):
        codes, scale, offset, _ = quantize(y, 4)
        back = codes.float() * scale.float()[:, None] + offset.float()[:, None]
        errors.append(float((back - y).norm() / y.norm()))
    assert errors[1] < 0.5 * errors[0]


def test_hadamard_is_orthonormal_and_its_own_inverse():
    x = torch.randn(7, 48, dtype=torch.float64)
    y = hadamard(x, 16)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(hadamard(y, 16), x)
    assert not torch.allclose(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
def test_native_tier_is_exact(make_twins, backend, dtype):
    k, v = (torch.randn(2, 2, 50, 80).to(dtype) for _ in range(2))
    twins = make_twins(backend, 80, dtype, [(0, 0)], room=50, fields=())
    twins.pack(0, k, v, torch.full((2, 2), 50, dtype=torch.int32))
    got_k, got_v = backend.read_slots(twins.rows, 0, 50)
    assert torch.equal(got_k, k.flatten(0, 1).float())
    assert torch.equal(got_v, v.flatten(0, 1).float())


@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("tiers", LAYOUTS)
def test_canonical_order_round_trip(backend, head_dim, tiers):
    layout = page_layout(head_dim, torch.float16, tiers, ("position",))
    for tier in range(len(tiers)):
        pages = torch.randint(0, 256, (3, layout.page_bytes), dtype=torch.uint8)
        canonical = backend.to_canonical(layout, tier, pages)
        assert torch.equal(backend.from_canonical(layout, tier, canonical), pages)
        assert not torch.equal(canonical, pages)


def _arguments(**changes):
    layout = page_layout(32, torch.float32, [(8, 4), (4, 2)], ("position",))
    slab = torch.zeros(8, layout.page_bytes, dtype=torch.uint8)
    from kvcompress_hf.kernels import Rows

    rows = Rows(
        layout,
        [slab],
        torch.tensor([slab.data_ptr()]),
        3,
        [torch.arange(2, dtype=torch.int32).view(2, 1) + 2 * t for t in range(2)],
        [torch.zeros(2, dtype=torch.int32) for _ in range(2)],
    )
    good = dict(
        rows=rows,
        tier=0,
        k=torch.randn(1, 2, 5, 32),
        v=torch.randn(1, 2, 5, 32),
        counts=torch.full((1, 2), 5, dtype=torch.int32),
        index=None,
        fields={"position": torch.zeros(1, 2, 5, dtype=torch.int32)},
    )
    return {**good, **changes}


@pytest.mark.parametrize("make", [CpuBackend, ReferenceBackend])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tier=2), "tier must be between 0 and 1, got 2"),
        (dict(tier=-1), "tier must be between"),
        (dict(k=torch.randn(1, 2, 5, 48)), r"k must have shape \[\*, \*, \*, 32\]"),
        (dict(k=torch.randn(1, 2, 5, 32).half()), "k must be torch.float32"),
        (dict(v=torch.randn(1, 2, 4, 32)), "v must have shape"),
        (dict(k=torch.randn(1, 2, 32, 5).transpose(2, 3)), "contiguous in its last dimension"),
        (dict(k=torch.randn(1, 2, 5, 32, device="meta")), "k must be on|must be on"),
        (dict(counts=torch.full((1, 2), 6, dtype=torch.int32)), "counts must be between 0 and 5, got 6"),
        (dict(counts=torch.full((1, 2), -1, dtype=torch.int32)), "counts must be between"),
        (dict(counts=torch.full((1, 2), 5)), "counts must be int32"),
        (dict(counts=torch.full((2,), 5, dtype=torch.int32)), "counts must be int32"),
        (dict(index=torch.full((1, 2, 5), 5, dtype=torch.int32)), "index must be between 0 and 4"),
        (dict(index=torch.full((1, 2, 5), -1, dtype=torch.int32)), "index must be between 0 and 4"),
        (dict(fields={}), "exactly the slot fields"),
        (dict(fields={"position": torch.zeros(1, 2, 5)}), "field 'position' must be torch.int32"),
    ],
)
def test_errors_name_what_is_wrong(make, changes, message):
    if "meta" in str(changes.get("k", "")) and make is ReferenceBackend:
        pytest.skip("the reference works on any device")
    with pytest.raises(ValueError, match=message):
        make().pack(**_arguments(**changes))


@pytest.mark.parametrize("make", [CpuBackend, ReferenceBackend])
def test_table_that_is_too_short(make):
    arguments = _arguments()
    arguments["rows"].lengths[0].fill_(arguments["rows"].layout.tiers[0].slots - 3)
    with pytest.raises(ValueError, match="table of tier 0"):
        make().pack(**arguments)


def test_backend_choice():
    backend = get_backend(torch.device("cpu"))
    assert backend is get_backend("cpu")
    assert backend.name == f"cpu-{instruction_sets()[0]}"
    assert "best" in backend.reason
    assert CpuBackend("scalar").name == "cpu-scalar"
    assert get_backend("meta").name == "reference"
    with pytest.raises(ValueError, match="isa must be one of"):
        CpuBackend("sse9")
