"""Lists of `paging/waiting.py` on a device against the plain ones, for random masks; `test_no_waiting.py` starts it."""

import sys

import torch
from far_device import FAR, FarDevice, taken

from kvcompress_hf.paging.waiting import ask, derive, known, moves_into_holes, on_host, pick, places, to_device

generator = torch.Generator().manual_seed(0)


def check(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


with FarDevice():
    for trial in range(60):
        shape = [int(n) for n in torch.randint(1, 9, (2,), generator=generator)]
        gone = torch.rand(shape, generator=generator) < trial / 60
        kept = (~gone).sum(1)
        here = torch.arange(shape[1]) < kept[:, None]
        holes, movers = gone & here, ~gone & ~here
        bound = torch.minimum(kept, shape[1] - kept)
        expected = list(zip(*(x.tolist() for x in moves_into_holes(holes, movers, 1, 0)), strict=True))
        masks = [to_device(mask, FAR) for mask in (gone, holes, movers)]
        taken()
        row, column = places(masks[0], int(gone.sum()))
        if int(bound.sum()):
            moves = moves_into_holes(*masks[1:], int(bound.sum()), int(bound.argmax()))
        check(not taken(), "a list was asked for its length")
        check([row.tolist(), column.tolist()] == [x.tolist() for x in torch.nonzero(gone, as_tuple=True)], "places")
        if int(bound.sum()):
            found = list(zip(*(x.tolist() for x in moves), strict=True))
            check(len(found) == int(bound.sum()), "a bound is not the length")
            check(found[: len(expected)] == expected, "moves differ")
            rest = expected[-1] if expected else (int(bound.argmax()), 0, 0)
            check(all(each == rest for each in found[len(expected) :]), "what fills the list does something")
            check(bool((kept[rest[0]] > rest[1]).all()), "an empty row is touched")
    numbers = torch.arange(5)
    sent = to_device(numbers, FAR)
    taken()
    check(known(sent) is numbers and known(sent + 1) is None, "known")
    check(on_host(pick(sent, torch.tensor([3, 1]))).tolist() == [3, 1], "pick")
    check(on_host(derive(sent, lambda x: x * 2)).tolist() == [0, 2, 4, 6, 8], "derive")
    check(not taken(), "what is known was asked")
    answers = ask([sent + 1, sent, (sent > 2).view(1, 5), numbers])
    check(
        [x.tolist() for x in answers] == [[1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [[0, 0, 0, 1, 1]], [0, 1, 2, 3, 4]], "ask"
    )
    check(sum(taken().values()) == 1, "several questions were asked one by one")
sys.stdout.write("right\n")
