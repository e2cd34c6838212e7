"""Every storage operation of the CUDA kernels: the bytes of the reference, in three schedules of the threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress_hf.kernels import CpuBackend, page_layout
from kvcompress_hf.kernels.abi import FEEDBACK_RANK

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [[(0, 0), (8, 8), (8, 4), (8, 2)], [(4, 8), (4, 4), (4, 2)], [(2, 8), (2, 4), (2, 2)]]


def _difficult(twins, tokens):
    k, v = twins.randn(twins.kv_heads, tokens).clone(), twins.randn(twins.kv_heads, tokens).clone()
    for x in (k, v):
        x[:, :, 1::8] = 0.37  # constant
        x[:, :, 2::8] *= 30000  # leaves fp16's range, also as infinity
        x[:, :, 3::8] *= 1e-6
        x[:, :, 5::8] = 0.0
        x[:, :, 6::8, 1] = float("nan")
    fields = {
        name: torch.randint(0, 99, (twins.batch, twins.kv_heads, tokens)).to(twins.rows.layout.field_dtype(name))
        for name in twins.rows.layout.fields
    }
    return k, v, fields


def _both(twins, backend, exact, operation, *args):
    got = getattr(backend, operation)(twins.rows, *args)
    assert got == getattr(exact, operation)(twins.expected_rows, *args)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("head_dim, tiers", [(16, LAYOUTS[0]), (80, LAYOUTS[1]), (128, LAYOUTS[2]), (256, LAYOUTS[1])])
def test_pack_move_retier_read(make_twins, backend, exact, head_dim, tiers, dtype):
    twins = make_twins(tiers=tiers, head_dim=head_dim, dtype=dtype, most=40)
    k, v, fields = _difficult(twins, 21)
    counts = torch.tensor([[21, 3], [0, 8]], dtype=torch.int32)
    index = torch.randperm(21).int().expand(2, 2, 21)
    for tier in range(len(tiers)):
        source = (k, v) if tiers[tier] != (0, 0) else (k.nan_to_num(0), v.nan_to_num(0))  # the bits of a NaN may differ
        overflow = _both(twins, backend, exact, "pack", tier, *source, counts, index, fields)
        assert (overflow > 0) == (tiers[tier] != (0, 0))
        for rows in (twins.rows, twins.expected_rows):
            rows.lengths[tier] += counts.flatten()
        row = torch.tensor([0, 0, 0, 3, 3], dtype=torch.int32)
        src, dst = (torch.tensor(x, dtype=torch.int32) for x in ([20, 19, 18, 7, 6], [0, 16, 5, 1, 2]))
        _both(twins, backend, exact, "move", tier, row, dst, src)
        other = (tier + 1) % len(tiers)
        _both(twins, backend, exact, "retier", row, tier, src, other, dst)
    twins.assert_same_pages()
    for tier in range(len(tiers)):
        for width in (0, 3, 70):
            for got, wanted in zip(
                backend.read_slots(twins.rows, tier, width),
                exact.read_slots(twins.expected_rows, tier, width),
                strict=True,
            ):
                torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
            for name in twins.rows.layout.fields:
                got = backend.read_field(twins.rows, tier, name, width)
                assert torch.equal(got, exact.read_field(twins.expected_rows, tier, name, width))
        values = torch.rand(4, 50)
        _both(twins, backend, exact, "write_field", tier, "sum", values)
    twins.assert_same_pages()


@pytest.mark.parametrize("head_dim, tiers", [(16, [(8, 4), (4, 4)]), (80, [(4, 2), (2, 2)]), (128, [(4, 4), (2, 4)])])
def test_rotated_keys_are_rounded_with_feedback(make_twins, backend, exact, head_dim, tiers):
    twins = make_twins(tiers=tiers, head_dim=head_dim, dtype=torch.bfloat16, most=40)
    k, v, fields = _difficult(twins, 21)
    counts = torch.tensor([[21, 3], [0, 8]], dtype=torch.int32)
    row, slot = torch.tensor([0, 0, 3, 3], dtype=torch.int32), torch.tensor([0, 2, 1, 7], dtype=torch.int32)
    factors = (torch.randn(4, 2, FEEDBACK_RANK, head_dim, generator=torch.Generator().manual_seed(1)) / 4).bfloat16()
    for rows in (twins.rows, twins.expected_rows):
        rows.key_feedback = factors
    for tier in range(2):
        _both(twins, backend, exact, "pack", tier, k, v, counts, None, fields)
        for rows in (twins.rows, twins.expected_rows):
            rows.lengths[tier] += counts.flatten()
    _both(twins, backend, exact, "retier", row, 0, slot, 1, slot)
    twins.assert_same_pages()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [16, 80, 96, 128, 256])
def test_hadamard(backend, exact, head_dim, dtype):
    x = torch.randn(2, 5, 3, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype).transpose(1, 2)
    for each in (x, x[:, :1], x[:0]):
        assert torch.equal(backend.hadamard(each, head_dim & -head_dim), exact.hadamard(each, head_dim & -head_dim))
    with pytest.raises(ValueError, match="got 7 for"):
        backend.hadamard(x, 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
def test_append(make_twins, backend, exact, dtype):
    twins = make_twins(dtype=dtype, head_dim=48)
    k, v = twins.randn(2, 5), twins.randn(2, 5)
    valid = torch.tensor([[False, True, True, False, True], [True] * 5])
    for b, tail in ((backend, twins.tail), (exact, twins.expected_tail)):
        tail.fields.fill_(7)
        b.append(tail, k, v, 100, valid)
        b.append(tail, k[:, :, :1], v[:, :, :1], 105)
        b.append(tail, k[:, :, :0], v[:, :, :0], 106)
    twins.assert_same_tail()
    assert torch.equal(twins.tail.fields, twins.expected_tail.fields)
    with pytest.raises(ValueError, match="the tail is full"):
        backend.append(twins.tail, *(twins.randn(2, 20) for _ in range(2)), 107)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_sequence_of_moves_and_retiers(make_twins, shim, exact, data):
    twins = make_twins(tiers=[(8, 4), (2, 2)], head_dim=32, lengths=[[64] * 4, [64] * 4])
    for _ in range(data.draw(st.integers(1, 3))):
        n = data.draw(st.integers(0, 20))
        row = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), dtype=torch.int32)
        slots = torch.randperm(64)[: 2 * n].int()
        tier = data.draw(st.integers(0, 1))
        if data.draw(st.booleans()):
            _both(twins, shim, exact, "move", tier, row, slots[:n], slots[n:])
        else:
            _both(twins, shim, exact, "retier", row, tier, slots[:n], 1 - tier, slots[n:])
    twins.assert_same_pages()


def test_a_move_may_be_named_twice_and_a_slot_moved_onto_itself(make_twins, backend, exact):
    twins = make_twins(tiers=[(8, 4)], lengths=[[40] * 4])
    row, dst, src = (
        torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 1, 1, 3], [5, 3, 3, 3, 7], [39, 38, 38, 38, 7])
    )
    backend.move(twins.rows, 0, row, dst, src)
    exact.move(twins.expected_rows, 0, row[:2], dst[:2], src[:2])
    twins.assert_same_pages()


@pytest.mark.parametrize("tiers", LAYOUTS)
def test_pages_go_from_cpu_to_cuda_and_back(shim, tiers):
    layout = page_layout(80, torch.float16, tiers, ("position",))
    cpu = CpuBackend()
    for tier in range(len(tiers)):
        pages = torch.randint(0, 256, (3, layout.page_bytes), dtype=torch.uint8)
        there = shim.from_canonical(layout, tier, cpu.to_canonical(layout, tier, pages))
        assert not torch.equal(there, pages)
        assert torch.equal(cpu.from_canonical(layout, tier, shim.to_canonical(layout, tier, there)), pages)


def test_tensors_elsewhere_are_refused(make_twins, shim):
    twins = make_twins()
    k = torch.zeros(2, 2, 3, 64, dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match="works on cpu tensors, got one on meta"):
        shim.pack(twins.rows, 0, k, k, torch.zeros(2, 2, dtype=torch.int32))
