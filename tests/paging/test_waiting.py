"""Where asking costs nothing, what spares it is the plain operation; on devices see tests/cuda/test_no_waiting.py."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress_hf.paging.waiting import ask, derive, known, known_as, moves_into_holes, on_host, pick, to_device


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 10**6))
def test_moves_fill_holes_with_the_last_that_stay(rows, width, seed):
    keep = torch.rand((rows, width), generator=torch.Generator().manual_seed(seed)) < 0.6
    kept = keep.sum(1, keepdim=True)
    front = torch.arange(width) < kept
    values = torch.arange(width).expand(rows, width).clone()
    row, hole, mover = moves_into_holes(~keep & front, keep & ~front, 0, 0)
    values[row, hole] = values[row, mover]
    for i in range(rows):
        stays = keep[i].nonzero().flatten()
        assert values[i, : kept[i]].sort().values.equal(stays)
        untouched = stays[stays < kept[i]]
        assert values[i, untouched].equal(untouched)
        assert mover[row == i].tolist() == sorted(mover[row == i].tolist(), reverse=True)


def test_what_lies_on_the_host_is_known_and_not_copied():
    numbers = torch.arange(4)
    assert known(numbers) is numbers and on_host(numbers) is numbers and ask([numbers])[0] is numbers
    assert to_device(numbers, numbers.device) is numbers
    assert known_as(numbers, numbers + 1) is numbers and on_host(numbers).tolist() == [0, 1, 2, 3]
    assert pick(numbers, torch.tensor([2, 0])).tolist() == [2, 0] and pick(numbers, slice(1, 3)).tolist() == [1, 2]
    assert derive(numbers, lambda x: x + 1).tolist() == [1, 2, 3, 4]
    assert ask([]) == []
