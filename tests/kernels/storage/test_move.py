"""move and retier against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress_hf.kernels import CpuBackend, ReferenceBackend

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [[(0, 0), (8, 4), (4, 2), (2, 8)], [(4, 4), (2, 2), (8, 8), (8, 2)]]


def _fill(twins, make_states, counts, seed=0):
    k, v, fields = make_states(2, 2, int(counts.max()), twins.layout.head_dim, twins.layout.dtype, seed)
    for tier in range(len(twins.layout.tiers)):
        twins.pack(tier, k, v, counts, None, fields)


def _ints(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tiers", LAYOUTS)
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_move_fills_holes_with_the_last_slots(make_twins, make_states, backend, head_dim, tiers, dtype):
    twins = make_twins(backend, head_dim, dtype, tiers)
    _fill(twins, make_states, _ints([[90, 40], [7, 100]]))
    row = _ints([0] * 5 + [3] * 6 + [2] + [1, 0])
    dst = _ints([0, 17, 3, 33, 64, 1, 2, 5, 50, 49, 80, 0, 31, 4])
    src = _ints([89, 88, 87, 86, 85, 99, 98, 97, 96, 95, 94, 6, 39, 84])
    for tier in range(len(tiers)):
        twins.both("move", tier, row, dst, src)
    twins.assert_same_pages()


def test_many_moves_on_threads(make_twins, make_states, backend, threads):
    twins = make_twins(backend, 64, torch.float16, [(8, 4), (4, 2)], room=600)
    _fill(twins, make_states, _ints([[600, 520], [560, 600]]))
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(500, generator=generator) for _ in range(4)])
    row = torch.arange(4).repeat_interleave(200).int()
    dst, src = order[:, :200].reshape(-1).int(), order[:, 200:400].reshape(-1).int()
    mixed = torch.randperm(800, generator=generator)
    for tier in range(2):
        twins.both("move", tier, row[mixed], dst[mixed], src[mixed])
    twins.assert_same_pages()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tiers", LAYOUTS)
@pytest.mark.parametrize("head_dim", [48, 128])
def test_retier_between_all_tiers(make_twins, make_states, backend, head_dim, tiers, dtype):
    twins = make_twins(backend, head_dim, dtype, tiers, room=140)
    _fill(twins, make_states, _ints([[60, 40], [9, 64]]))
    row = _ints([0] * 20 + [3] * 9 + [1, 0, 2])
    src = torch.cat([torch.arange(59, 39, -1), torch.arange(9) * 5, torch.tensor([39, 1, 8])]).int()
    at = 64
    for s in range(len(tiers)):
        for d in range(len(tiers)):
            if s == d:
                continue
            dst = torch.cat([torch.arange(20), torch.arange(8, -1, -1), torch.tensor([0, 30, 3])]).int() + at
            at = 64 + (at + 5) % 40
            twins.both("retier", row, s, src, d, dst)
            got, wanted = twins.both("retier", row, s, src, d, dst)
            assert got == wanted
    twins.assert_same_pages()


def test_retier_error_is_that_of_the_lower_tier(make_twins, backend, threads):
    k, v = torch.randn(2, 2, 300, 128), torch.randn(2, 2, 300, 128)
    twins = make_twins(backend, 128, torch.float32, [(8, 4), (4, 2)], room=300, fields=())
    twins.pack(0, k, v, torch.full((2, 2), 300, dtype=torch.int32))
    row = torch.arange(4).repeat_interleave(300).int()
    slots = torch.arange(300).repeat(4).int()
    got, wanted = twins.both("retier", row, 0, slots, 1, slots)
    assert got == wanted == 0
    twins.rows.lengths[1].fill_(300)
    twins.assert_same_pages()
    got_k, got_v = backend.read_slots(twins.rows, 1, 300)
    assert (got_k - k.flatten(0, 1)).norm() / k.norm() < 0.14
    assert (got_v - v.flatten(0, 1)).norm() / v.norm() < 0.49


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_sequence_of_moves_and_retiers(make_twins, make_states, data):
    backend = CpuBackend(data.draw(st.sampled_from(["scalar", None])))
    twins = make_twins(backend, 32, torch.float32, [(8, 4), (2, 2)], room=64)
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 64), min_size=4, max_size=4)), dtype=torch.int32)
    _fill(twins, make_states, counts.view(2, 2)) if counts.any() else None
    for _ in range(data.draw(st.integers(1, 3))):
        row = data.draw(st.lists(st.integers(0, 3), max_size=20).map(sorted))
        slots = torch.stack([torch.randperm(64)[:40] for _ in range(4)]).int()
        which = _ints([row[:i].count(r) for i, r in enumerate(row)])
        dst, src = (slots[_ints(row).long(), which.long() + shift] if row else _ints([]) for shift in (0, 20))
        tier = data.draw(st.integers(0, 1))
        if data.draw(st.booleans()):
            twins.both("move", tier, _ints(row), dst, src)
        else:
            twins.both("retier", _ints(row), tier, src, 1 - tier, dst)
    twins.assert_same_pages()


@pytest.mark.parametrize("make", [CpuBackend, ReferenceBackend])
def test_errors_name_what_is_wrong(make_twins, make):
    twins = make_twins(make(), 32, torch.float32, [(8, 4), (4, 2)], count=2, room=64)
    backend, rows = twins.backend, twins.rows
    one = _ints([0])
    with pytest.raises(ValueError, match="row must be between 0 and 1, got 2"):
        backend.move(rows, 0, _ints([2]), one, one)
    with pytest.raises(ValueError, match="tier must be between"):
        backend.move(rows, 5, one, one, one)
    with pytest.raises(ValueError, match="slots must"):
        backend.move(rows, 0, one, _ints([9999]), one)
    with pytest.raises(ValueError, match="slots must"):
        backend.move(rows, 0, one, one, _ints([-1]))
    with pytest.raises(ValueError, match=r"dst must have shape \[1\]"):
        backend.move(rows, 0, one, _ints([1, 2]), one)
    with pytest.raises(ValueError, match=r"src must be torch.int32"):
        backend.retier(rows, one, 0, torch.tensor([0]), 1, one)
    with pytest.raises(ValueError, match="tier must be between"):
        backend.retier(rows, one, 0, one, 2, one)
    backend.move(rows, 0, _ints([]), _ints([]), _ints([]))
    assert backend.retier(rows, _ints([]), 0, _ints([]), 1, _ints([])) == 0
