"""Less to hold when memory runs out."""

from dataclasses import replace

import torch

from kvcompress_hf.plans.pressure import under_pressure

PER_SEQUENCE = ("importance", "positions", "filled", "protected", "tokens")


def test_the_one_that_holds_the_most_gives_the_most(make_view):
    filled = torch.arange(160) < torch.tensor([160, 64, 16])[:, None, None].expand(3, 2, 1)
    view = make_view(torch.rand(3, 2, 160), filled=filled)  # 20, 8 and 2 pages of 1000 bytes
    two = [replace(view, **{f: getattr(view, f)[i] for f in PER_SEQUENCE}) for i in (slice(0, 1), slice(1, 3))]
    for freeing, allowed, slots in ((6000, 14_000, 112), (16_000, 6000, 48), (10**9, 0, 0)):
        (one,) = under_pressure([view], freeing)
        assert one.allowed_bytes.tolist() == [allowed] * 3 and one.allowed_slots[:, 0].tolist() == [slots] * 3
        # Sequences with recipes of their own stand under the same level.
        assert [x.allowed_bytes.tolist() for x in under_pressure(two, freeing)] == [[allowed], [allowed] * 2]
