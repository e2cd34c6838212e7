"""Slot fields, read_slots, and the tail's append against the reference."""

import pytest
import torch

from kvcompress_hf.kernels import CpuBackend, ReferenceBackend, Rows, Tail, page_layout

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("tiers", [[(0, 0), (8, 4)], [(4, 2), (2, 2)]])
def test_fields_round_trip(make_twins, make_states, backend, tiers):
    twins = make_twins(backend, 64, torch.bfloat16, tiers, room=200)
    k, v, fields = make_states(2, 2, 150, 64, torch.bfloat16)
    counts = torch.tensor([[150, 0], [33, 64]], dtype=torch.int32)
    for tier in range(len(tiers)):
        twins.pack(tier, k, v, counts, None, fields)
        for width in (0, 1, 40, 150, 170):
            for field, dtype in (("position", torch.int32), ("score", torch.float32)):
                got, wanted = twins.both("read_field", tier, field, width)
                assert got.dtype == dtype
                assert got.shape == (4, width)
                assert torch.equal(got, wanted)
        assert torch.equal(backend.read_field(twins.rows, tier, "score", 150)[0], fields["score"][0, 0])
        assert not backend.read_field(twins.rows, tier, "score", 150)[1].any()
        twins.both("write_field", tier, "score", torch.rand(4, 100))
        twins.both("write_field", tier, "position", torch.arange(800, dtype=torch.int32).view(200, 4).T)
    twins.assert_same_pages()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [16, 96, 128])
def test_read_slots_is_bit_exact(make_twins, make_states, backend, head_dim, dtype):
    tiers = [(0, 0), (8, 4), (4, 2), (2, 8)]
    twins = make_twins(backend, head_dim, dtype, tiers)
    k, v, fields = make_states(2, 2, 70, head_dim, dtype)
    for tier in range(len(tiers)):
        twins.pack(tier, k, v, torch.tensor([[70, 0], [1, 18]], dtype=torch.int32), None, fields)
        for width in (0, 5, 70, 99):
            got, wanted = twins.both("read_slots", tier, width)
            for a, b in zip(got, wanted, strict=True):
                assert a.dtype == torch.float32
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [16, 96, 128])
def test_slot_sums_are_sums_over_what_is_read(make_twins, make_states, backend, head_dim, dtype):
    tiers = [(0, 0), (8, 4), (4, 2), (2, 8)]
    twins = make_twins(backend, head_dim, dtype, tiers)
    fields = make_states(2, 2, 70, head_dim, dtype)[2]
    k, v = torch.randn(2, 2, 2, 70, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    for tier in range(len(tiers)):
        twins.pack(tier, k, v, torch.tensor([[70, 0], [1, 18]], dtype=torch.int32), None, fields)
        for width in (0, 5, 70, 99):
            chosen = torch.rand(width, 4).T < 0.5  # not contiguous
            got, wanted = twins.both("slot_sums", tier, chosen)
            read = backend.read_slots(twins.rows, tier, width)
            parts = torch.stack([x.double() * chosen[..., None] for x in read], 1)
            for sums in (got, wanted):
                assert sums.shape == (4, 2, head_dim) and sums.dtype == torch.float32
                error = (sums - parts.sum(2)).norm(dim=-1)
                assert (error <= 1e-6 * parts.norm(dim=-1).sum(2)).all()


@pytest.mark.parametrize("make", [CpuBackend, ReferenceBackend])
def test_empty_rows(make):
    layout = page_layout(32, torch.float32, [(8, 4)], ("score",))
    empty = torch.zeros(0, dtype=torch.int64)
    for count in (0, 2):
        rows = Rows(
            layout,
            [],
            empty,
            4,
            [torch.zeros(count, 0, dtype=torch.int32)],
            [torch.zeros(count, dtype=torch.int32)],
        )
        assert make().read_field(rows, 0, "score", 3).shape == (count, 3)
        assert not make().read_slots(rows, 0, 3)[0].any()
        assert make().slot_sums(rows, 0, torch.ones(count, 3, dtype=torch.bool)).shape == (count, 2, 32)
        assert rows.width(0) == 0


@pytest.mark.parametrize("make", [CpuBackend, ReferenceBackend])
def test_errors_name_what_is_wrong(make_twins, make):
    twins = make_twins(make(), 32, torch.float32, [(8, 4)], count=2)
    backend, rows = twins.backend, twins.rows
    with pytest.raises(ValueError, match="no slot field 'age'"):
        backend.read_field(rows, 0, "age", 3)
    with pytest.raises(ValueError, match="width must not be negative"):
        backend.read_slots(rows, 0, -1)
    with pytest.raises(ValueError, match="tier must be between"):
        backend.read_slots(rows, 1, 4)
    with pytest.raises(ValueError, match="chosen must have shape"):
        backend.slot_sums(rows, 0, torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="tier must be between"):
        backend.slot_sums(rows, 1, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="values must be torch.float32"):
        backend.write_field(rows, 0, "score", torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="values must have shape"):
        backend.write_field(rows, 0, "score", torch.zeros(3, 4))
    rows.lengths[0].fill_(10**6)
    with pytest.raises(ValueError, match="table of tier 0"):
        backend.read_slots(rows, 0, 4)


def _tail(batch, kv_heads, capacity, head_dim, dtype, n_fields=2):
    shape = (batch, kv_heads, capacity, head_dim)
    return Tail(
        torch.full(shape, float("nan"), dtype=dtype),
        torch.full(shape, float("nan"), dtype=dtype),
        torch.tensor([3, 0], dtype=torch.int32),
        torch.zeros(batch, capacity, dtype=torch.int32),
        torch.full((n_fields, batch, kv_heads, capacity), 7, dtype=torch.int32) if n_fields else None,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("n_fields", [0, 2])
def test_append(backend, exact, dtype, n_fields):
    tails = [_tail(2, 3, 12, 48, dtype, n_fields) for _ in range(2)]
    k, v = (torch.randn(2, 5, 3, 48).to(dtype).transpose(1, 2) for _ in range(2))
    valid = torch.tensor([[False, True, True, False, True], [True] * 5])
    for b, tail in zip((backend, exact), tails, strict=True):
        b.append(tail, k, v, 100, valid)
        b.append(tail, k[:, :, :1], v[:, :, :1], 105)
        b.append(tail, k[:, :, :0], v[:, :, :0], 106)
    assert tails[0].lengths.tolist() == [7, 6]
    assert tails[0].positions[0, 3:7].tolist() == [101, 102, 104, 105]
    assert torch.equal(tails[0].k[0, :, 3], k[0, :, 1])
    for a, b in zip(vars(tails[0]).values(), vars(tails[1]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    if n_fields:
        assert not tails[0].float_fields()[:, 0, :, 3:7].any()
        assert (tails[0].fields[:, 0, :, 7:] == 7).all()


@pytest.mark.parametrize("make", [CpuBackend, ReferenceBackend])
def test_append_errors(make):
    backend = make()
    tail = _tail(2, 3, 6, 48, torch.float32)
    k = torch.randn(2, 3, 4, 48)
    with pytest.raises(ValueError, match="the tail is full: it holds 6 slots per row and has up to 3"):
        backend.append(tail, k, k, 0)
    with pytest.raises(ValueError, match="k must be torch.float32"):
        backend.append(tail, k.half(), k.half(), 0)
    with pytest.raises(ValueError, match="k must have shape"):
        backend.append(tail, k[:, :2], k[:, :2], 0)
    with pytest.raises(ValueError, match="valid must be torch.bool"):
        backend.append(tail, k[:, :, :1], k[:, :, :1], 0, torch.ones(2, 1))
    assert tail.lengths.tolist() == [3, 0]
    tail.positions = tail.positions.repeat(1, 2)[:, ::2]
    with pytest.raises(ValueError, match=r"tail.positions must be contiguous"):
        backend.append(tail, k[:, :, :1], k[:, :, :1], 0)
