"""The rate-distortion plan against an exact sort, and its invariances."""

from dataclasses import replace

import pytest
import torch

from kvcompress_hf.plans.histogram import BINS, BINS_PER_OCTAVE, SlotCounts, bins_below_top
from kvcompress_hf.plans.kv_compress import PagePlan
from kvcompress_hf.plans.rate_distortion import RateDistortion, _Ladder, lower_hull, solve

TIERS = 3
SLOTS_PER_PAGE = [16, 32, 64]
LOSS = [0.007, 0.16, 0.29]


def view_of(make_view, importance, allowed, **changes):
    rows = importance.shape[1]
    values = dict(
        slots_per_page=torch.tensor([SLOTS_PER_PAGE] * rows),
        page_bytes=torch.full((rows,), 1024),
        allowed_bytes=torch.tensor(allowed),
        distortion=torch.tensor([LOSS]).expand(importance.shape[0], -1),
    )
    return make_view(importance, **{**values, **changes})


def heavy_tailed(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(3).exp()


def test_the_hull_drops_what_lies_above_it():
    assert [tier for tier, _ in lower_hull([264, 144, 112, 80, 64, 48], [0, 6e-4, 6.9e-3, 0.16, 0.291, 2.48])] == [
        4,
        3,
        2,
        1,
        0,
    ]
    slopes = [slope for _, slope in lower_hull([100, 60, 40], [0.0, 0.5, 0.3])]
    assert slopes == sorted(slopes) and len(slopes) == 2  # the middle one is dearer and worse


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25, 0.1, 0.03])
def test_budgets_hold_and_are_used(make_view, share):
    importance = heavy_tailed(2, 8, 2000)
    full = 8 * 125 * 1024
    view = view_of(make_view, importance, [int(share * full), int(share * full / 3)])
    targets = RateDistortion().targets(view)
    held = view.bytes_of(targets)
    assert (held <= view.allowed_bytes).all()
    best = view.bytes_of(torch.zeros_like(targets))
    assert (held >= torch.minimum(view.allowed_bytes, best) * (0.97 if share > 0.05 else 0.8)).all()


def exact_steps(importance, hull, sizes):
    """The oracle: every step up of every slot, the best first, as (worth, slot, tier, bytes)."""
    steps = []
    for i, score in enumerate(importance.flatten().tolist()):
        before = 0
        for tier, slope in hull:
            steps.append((score / slope, i, tier, sizes[tier] - before))
            before = sizes[tier]
    return sorted(steps, reverse=True)


@pytest.mark.parametrize("allowed", [40, 150, 600, 1500])
@pytest.mark.parametrize("seed", [0, 1])
def test_at_one_slot_per_page_the_plan_is_the_exact_sort_to_within_a_bin(make_view, allowed, seed):
    # With pages of one slot there is no rounding, and the best plan under one multiplier is a sort of all steps.
    importance = heavy_tailed(1, 3, 200, seed=seed)
    sizes = [4, 2, 1]  # bytes of a slot per tier, by slots per page of a page of 4 bytes
    view = view_of(
        make_view,
        importance,
        [allowed * 4],  # of three tiers the cheapest slot takes a whole page here
        slots_per_page=torch.ones(3, 3, dtype=torch.int64),
        page_bytes=torch.full((3,), 4),
    )
    # One tier: the number of slots is exact, and no evicted one lies more than a bin above a stored one.
    single = dict(slots_per_page=torch.ones(3, 1, dtype=torch.int64), distortion=torch.tensor([[0.0]]))
    kept = RateDistortion().targets(view_of(make_view, importance, [allowed * 4], page_bytes=view.page_bytes, **single))
    stored, gone = importance[kept >= 0], importance[kept < 0]
    assert 0 <= min(allowed, importance.numel()) - stored.numel() <= 2
    assert not gone.numel() or gone.max() <= stored.min() * 2 ** (2 / BINS_PER_OCTAVE)
    # Several tiers: the thresholds are those of the sort cut at the bytes that the plan spends, to within a bin.
    hull = lower_hull([float(size) for size in sizes], LOSS)
    counts = SlotCounts.of(view, bins_below_top(importance))
    ladder = _Ladder(view, counts, hull)
    for cut in (30, 100, 300):
        worth = exact_steps(importance, hull, sizes)[cut][0] * hull[0][1]  # least importance stored at all
        depth = bins_below_top(torch.cat([importance.flatten(), torch.tensor([worth])]).view(1, 1, -1))[0, 0, -1]
        slots = ladder.occupancy(ladder.at(depth.long().view(1, 1, 1)))[..., 0].sum(1)[0]
        for step, (tier, slope) in enumerate(hull):
            better = hull[step + 1][1] if step + 1 < len(hull) else float("inf")
            in_tier = [
                ((importance >= worth * slope / hull[0][1] * f) & (importance < worth * better / hull[0][1] * f)).sum()
                for f in (2 ** (-2 / BINS_PER_OCTAVE), 1.0, 2 ** (2 / BINS_PER_OCTAVE))
            ]
            assert min(in_tier) - 8 <= slots[tier] <= max(in_tier) + 8


def test_counts_are_those_of_every_slot(make_view):
    generator = torch.Generator().manual_seed(3)
    importance = heavy_tailed(2, 5, 300)
    tier = torch.randint(0, 3, (300,), generator=generator).sort().values
    filled = torch.rand(importance.shape, generator=generator) < 0.8
    protected = filled & (torch.rand(importance.shape, generator=generator) < 0.1)
    view = view_of(make_view, importance, [1, 1], tier=tier, filled=filled, protected=protected)
    depth = bins_below_top(torch.where(filled, importance, 0.0))
    counts = SlotCounts.of(view, depth)
    for k in (0, 1, 50, 200, BINS):
        for t in range(TIERS):
            below = filled & (depth < k) & (tier == t)
            assert torch.equal(counts.free[:, :, t, k], (below & ~protected).sum(-1, dtype=torch.int32))
            assert torch.equal(counts.protected[:, :, t, k], (below & protected).sum(-1, dtype=torch.int32))


def test_sequences_with_losses_of_their_own_are_planned_as_if_alone(make_view):
    importance = heavy_tailed(3, 6, 500)
    losses = torch.tensor([LOSS, [0.3, 0.31, 0.32], LOSS])
    allowed = [160_000, 160_000, 20_000]
    plan = RateDistortion(kappa=1.0)
    together = plan.targets(view_of(make_view, importance, allowed, distortion=losses))
    for i in range(3):
        alone = view_of(make_view, importance[i : i + 1], allowed[i : i + 1], distortion=losses[i : i + 1])
        assert torch.equal(together[i : i + 1], plan.targets(alone))
    assert (together[0] == 0).sum() > (together[1] == 0).sum()  # where the best tier loses as much, it is not worth it


def test_bins_follow_the_order_of_scores():
    scores = torch.cat([heavy_tailed(500), torch.tensor([0.0, -0.0, 1e-38])]).sort().values.view(1, 1, -1)
    depth = bins_below_top(scores)
    assert (depth.diff() <= 0).all() and depth[0, 0, -1] == 0 and depth[0, 0, 0] == BINS - 1
    assert torch.equal(bins_below_top(scores[..., 3:] * 2.0**9), bins_below_top(scores[..., 3:]))


@pytest.mark.parametrize("seed", range(6))
def test_the_bytes_foreseen_are_those_of_the_targets(make_view, seed):
    generator = torch.Generator().manual_seed(seed)
    importance = heavy_tailed(1, 7, 900, seed=seed)
    tier = torch.randint(0, 3, (900,), generator=generator).sort().values
    filled = torch.rand(importance.shape, generator=generator) < 0.9
    protected = filled & (torch.rand(importance.shape, generator=generator) < 0.05)
    allowed = int(torch.randint(20_000, 200_000, (1,), generator=generator))
    view = view_of(make_view, importance, [allowed], tier=tier, filled=filled, protected=protected)
    plan, hull = RateDistortion(), lower_hull([64.0, 32.0, 16.0], [loss / 64 for loss in LOSS])
    counts = SlotCounts.of(view, bins_below_top(torch.where(filled, importance, 0.0)))
    foreseen = _Ladder(view, counts, hull).row_bytes(solve(view, counts, hull)[..., None]).sum()
    targets = plan._targets(view, bins_below_top(torch.where(filled, importance, 0.0)), counts, hull)
    assert foreseen == view.bytes_of(targets) <= allowed


def test_permuting_heads_permutes_the_plan_and_scaling_scores_changes_nothing(make_view):
    importance = heavy_tailed(1, 6, 500)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    plan = RateDistortion()
    targets = plan.targets(view_of(make_view, importance, [60_000]))
    assert torch.equal(plan.targets(view_of(make_view, importance[:, order], [60_000])), targets[:, order])
    assert torch.equal(plan.targets(view_of(make_view, importance * 1024, [60_000])), targets)


def test_several_sequences_equal_each_alone(make_view):
    importance, allowed = heavy_tailed(3, 5, 400), [30_000, 70_000, 12_000]
    together = RateDistortion().targets(view_of(make_view, importance, allowed))
    for b in range(3):
        alone = RateDistortion().targets(view_of(make_view, importance[b : b + 1], allowed[b : b + 1]))
        assert torch.equal(together[b : b + 1], alone)


def test_more_bytes_never_lower_a_slot_before_pages_are_filled(make_view):
    importance = heavy_tailed(1, 4, 600)
    hull = lower_hull([64.0, 32.0, 16.0], [loss / 64 for loss in LOSS])
    previous = None
    counts = SlotCounts.of(view_of(make_view, importance, [1]), bins_below_top(importance))
    for allowed in (8_000, 16_000, 32_000, 64_000, 150_000):
        view = view_of(make_view, importance, [allowed])
        held = _Ladder(view, counts, hull)
        candidates = torch.arange(BINS)
        best = candidates[held.row_bytes(held.at(candidates[None, None])).sum(1)[0] <= allowed].max()
        thresholds = held.at(best.view(1, 1, 1))[..., 0]
        rank = (bins_below_top(importance)[..., None, :] < thresholds[..., None]).sum(2)
        assert previous is None or (rank >= previous).all()
        previous = rank


def test_protected_slots_stay_and_slots_only_move_down(make_view):
    importance = heavy_tailed(1, 4, 300)
    importance[:, :, -20:] = 0
    tier = torch.zeros(300, dtype=torch.int64)
    tier[:50] = 2
    protected = torch.arange(300).expand(1, 4, 300) >= 280
    view = view_of(make_view, importance, [20_000], tier=tier, protected=protected)
    targets = RateDistortion().targets(view)
    assert (targets[:, :, -20:] >= 0).all()
    assert ((targets[:, :, :50] == 2) | (targets[:, :, :50] < 0)).all()


def test_plenty_of_bytes_keep_everything_as_it_is(make_view):
    importance = heavy_tailed(1, 2, 100)
    assert (RateDistortion().targets(view_of(make_view, importance, [10**9])) == 0).all()


def test_one_tier_keeps_the_most_important_slots_as_kv_compress_does(make_view):
    importance = heavy_tailed(1, 4, 320)
    view = make_view(importance, allowed_bytes=torch.tensor([40_000]), page_bytes=torch.full((4,), 1000))
    mine = RateDistortion().targets(view) >= 0
    pages = PagePlan().targets(view) >= 0
    assert view.bytes_of(torch.where(mine, 0, -1)) <= 40_000
    assert importance[mine].sum() >= 0.98 * importance[pages].sum()


def test_what_importance_only_guesses_stays_as_long_as_the_cheapest_tier_has_room(make_view):
    importance = heavy_tailed(2, 4, 1000)
    whole = 4 * -(-1000 // SLOTS_PER_PAGE[-1]) * 1024  # everything in the cheapest tier
    allowed = [int(1.3 * whole), int(0.7 * whole)]
    known = view_of(make_view, importance, allowed)
    plan = RateDistortion(kappa=1.0, small=0.0)
    sure, guessed = plan.targets(known), plan.targets(replace(known, guesses=True))
    assert (sure[0] < 0).any()  # better tiers for some are worth more than all
    assert (guessed[0] >= 0).all() and (guessed[0] < 2).any()  # and what is left still buys better tiers
    assert (known.bytes_of(guessed) <= known.allowed_bytes).all()
    assert torch.equal(sure[1], guessed[1])


def test_below_a_share_of_the_dense_bytes_only_the_cheapest_tiers_are_used(make_view):
    importance = heavy_tailed(2, 4, 1000)
    view = view_of(make_view, importance, [50_000, 110_000], dense_bytes=torch.full((2,), 10**6))
    targets = RateDistortion(kappa=1.0, small=0.1, small_tiers=1).targets(view)
    assert targets[0].unique().tolist() == [-1, 2] and len(targets[1].unique()) > 2
