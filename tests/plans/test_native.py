"""The native arithmetic of plans against the same in torch."""

import pytest
import torch

from kvcompress_hf.kernels import CpuBackend, Hulls, get_backend
from kvcompress_hf.kernels.cpu.backend import instruction_sets
from kvcompress_hf.paging import slots as paging_slots
from kvcompress_hf.paging.waiting import moves_into_holes, places
from kvcompress_hf.plans import order, pages
from kvcompress_hf.plans.order import FlatRows, lowest_by_sorting
from kvcompress_hf.plans.rate_distortion import RateDistortion, lower_hull, offsets

TIERS = 3
LOSS = torch.tensor([[0.007, 0.16, 0.29]])


@pytest.fixture(params=instruction_sets())
def native(request):
    return CpuBackend(request.param).plans


def generator(seed):
    return torch.Generator().manual_seed(seed)


def scores_of(*shape, seed):
    """Scores of all sizes and signs, many of them equal, with zeros of both signs and infinities."""
    g = generator(seed)
    scores = torch.randn(*shape, generator=g).mul(8).round() * 2.0 ** torch.randint(-40, 40, shape, generator=g)
    scores[torch.rand(shape, generator=g) < 0.05] = -0.0
    scores[torch.rand(shape, generator=g) < 0.02] = torch.inf
    return scores


@pytest.mark.parametrize("slots", [1, 7, 300, 20_000])
def test_the_lowest_are_those_of_a_stable_sort(native, slots):
    g = generator(slots)
    scores = scores_of(2, 3, slots, seed=slots)
    positions = torch.randint(-5, max(2, slots // 4), scores.shape, generator=g, dtype=torch.int32)
    candidates = torch.rand(scores.shape, generator=g) < 0.8
    candidates &= scores.isfinite()  # among those that are not, the sort puts what is no candidate
    for most in (0, 1, slots // 3, slots, 2 * slots):
        count = torch.randint(0, most + 1, (2, 3), generator=g)
        found = native.lowest(scores, positions, candidates, count)
        assert torch.equal(found, lowest_by_sorting(FlatRows(scores, positions, candidates), candidates, count))


@pytest.mark.parametrize("seed", range(3))
def test_prices_are_those_of_a_sort(native, seed):
    g = generator(seed)
    scores = scores_of(2, 5, 130, seed=seed)
    candidates = torch.rand(scores.shape, generator=g) < 0.7
    first, step = (torch.randint(1, 17, (2, 5), generator=g) for _ in range(2))
    prices = native.prices(scores, candidates, first, step, 9)
    ascending = torch.where(candidates, scores, torch.inf).sort(-1).values
    at = first[..., None] + torch.arange(9) * step[..., None] - 1
    expected = torch.where(at < 130, ascending.gather(-1, at.clamp(max=129)), torch.inf)
    assert torch.equal(prices, expected)


@pytest.mark.parametrize("excess", [-1, 3000, 20_000, 10**6])
def test_pages_go_as_in_torch(monkeypatch, excess):
    g = generator(7)
    scores, filled = scores_of(3, 4, 200, seed=7).nan_to_num(posinf=9.0), torch.rand(3, 4, 200, generator=g) < 0.9
    given = (
        scores,
        torch.arange(200, dtype=torch.int32).expand(3, 4, -1),
        filled,
        filled & (torch.rand(filled.shape, generator=g) < 0.1),
        torch.tensor([16, 16, 32, 48]),
        torch.tensor([1000, 1000, 900, 1100]),
        torch.tensor([excess, excess // 2, excess]),
    )
    kept = pages.plan_pages(*given)
    for module in (pages, order):
        monkeypatch.setattr(module, "native_for", lambda values: None)
    assert torch.equal(kept, pages.plan_pages(*given))


def test_targets_are_counted_as_in_torch(native, monkeypatch):
    g = generator(3)
    tier = torch.randint(0, TIERS, (90,), generator=g).sort().values
    targets = torch.randint(-1, TIERS, (2, 5, 90), generator=g)
    filled = torch.rand(targets.shape, generator=g) < 0.8
    columns = [int((tier < t).sum()) for t in range(TIERS + 1)]
    found = native.tally(targets.to(torch.int8), filled, columns)
    monkeypatch.setattr(paging_slots, "get_backend", lambda device: get_backend("meta"))
    for mine, theirs in zip(found, paging_slots.count_targets(targets, filled, tier, TIERS), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("seed", range(3))
def test_moves_and_places_are_those_of_torch(native, seed):
    g = generator(seed)
    keep = torch.rand(11, 70, generator=g) < torch.rand(11, 1, generator=g)
    before = torch.randint(0, 71, (11,), generator=g, dtype=torch.int32)
    keep[3, : int(before[3])] = True  # nothing goes
    inside = keep & (torch.arange(70) < before[:, None])
    kept = inside.sum(1, dtype=torch.int32)
    most = torch.minimum(kept, before - kept)
    holes, movers = ~inside & (torch.arange(70) < kept[:, None]), inside & (torch.arange(70) >= kept[:, None])
    expected = moves_into_holes(holes, movers, int(most.sum()), 0)
    marks = torch.randint(2, 5, keep.shape, generator=g).to(torch.int8).masked_fill_(~keep, -1)
    for given, gone in ((keep.view(torch.int8), 0), (marks, -1)):
        for mine, theirs in zip(native.holes(given, gone, before, kept, int(most.sum())), expected, strict=True):
            assert torch.equal(mine.long(), theirs)
    for given, wanted in ((keep.view(torch.int8), 1), (torch.where(keep, 3, marks), 3)):
        row, slot, rank = native.places(given.to(torch.int8), wanted, before, kept)
        found = zip((row, slot), places(inside, 0), strict=True)
        assert all(torch.equal(mine.long(), theirs) for mine, theirs in found)
        assert torch.equal(rank, (inside.cumsum(1, dtype=torch.int32) - 1)[inside])


def test_a_wrong_count_of_what_stays_is_refused(native):
    marks = torch.zeros(1, 16, dtype=torch.int8)
    before, kept = torch.tensor([16], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    with pytest.raises(ValueError, match="refused"):
        native.holes(marks, 0, before, kept, 4)


@pytest.mark.parametrize("seed", range(12))
def test_shares_are_those_of_torch(native, make_view, seed):
    g, tiers = generator(seed), seed % 3 + 1
    importance = torch.randn(3, 6, 400, generator=g).mul(3).exp()
    importance[torch.rand(importance.shape, generator=g) < 0.02] = 0
    importance[0, 0, 5:8] = torch.tensor([torch.nan, -1.0, torch.inf])
    filled = torch.rand(importance.shape, generator=g) < 0.9
    allowed = (torch.rand(3, generator=g) * 150_000).long()
    view = make_view(
        importance,
        filled=filled,
        protected=filled & (torch.rand(importance.shape, generator=g) < 0.05),
        tier=torch.randint(0, tiers, (400,), generator=g).sort().values,
        slots_per_page=torch.tensor([[16, 32, 64][:tiers]] * 6),
        page_bytes=torch.tensor([1024] * 5 + [1500]),
        allowed_bytes=allowed,
        distortion=LOSS[:, :tiers] * torch.tensor([[1.0], [1.0], [1.3]]),
        guesses=seed % 4 == 0,
        room=torch.tensor([[8, 0, 3], [0, 0, 0], [40, 24, 0]])[:, :tiers] if seed % 2 else None,
    )
    plan = RateDistortion(kappa=1.0, small=0.0)
    hulls = [lower_hull([64.0, 32.0, 16.0][:tiers], losses) for losses in view.distortion.tolist()]
    room = torch.zeros(3, tiers, dtype=torch.int64) if view.room is None else view.room.clone()
    for each, hull in zip(room, hulls, strict=True):
        each[[tier for tier in range(tiers) if tier not in [used for used, _ in hull]]] = 0
    steps = Hulls([[tier for tier, _ in hull] for hull in hulls], [offsets(hull) for hull in hulls])
    found = native.shares(
        importance,
        filled,
        view.protected,
        view.tier,
        (view.slots_per_page, view.page_bytes),
        (allowed, room),
        steps,
        view.guesses,
    )
    assert torch.equal(found, plan.in_torch(view, hulls).to(torch.int8))
    assert torch.equal(plan.targets(view), plan.in_torch(view, plan.hulls(view)).to(torch.int8))


def test_room_is_left_in_started_pages(make_view):
    importance = torch.randn(1, 8, 600, generator=generator(1)).mul(3).exp()
    given = dict(
        slots_per_page=torch.full((8, 1), 48),
        page_bytes=torch.full((8,), 1024),
        allowed_bytes=torch.tensor([60 * 1024]),
    )
    for room in (0, 16, 32):
        view = make_view(importance, room=torch.tensor([[room]]), **given)
        targets = RateDistortion().targets(view)
        lengths = (targets >= 0).sum(-1)
        pages_now, pages_then = -(-lengths // 48), -(-(lengths + room) // 48)
        assert pages_then.sum() * 1024 <= 60 * 1024  # the budget holds what the next packings add
        if room:  # and but for the bins of importance, no row is left with more room than that
            assert (pages_then * 48 - lengths).float().mean() < room + 8
        assert (pages_now <= pages_then).all()
