"""The rate-distortion plan against an exact sort, and its invariances."""

import pytest
import torch

from kvcompress_hf.planning.kv_compress import PagePlan
from kvcompress_hf.planning.rate_distortion import RateDistortion, lower_hull

TIERS = 3
SLOTS_PER_PAGE = [16, 32, 64]
LOSS = [0.007, 0.16, 0.29]


def view_of(make_view, importance, allowed, **changes):
    rows = importance.shape[1]
    values = dict(
        slots_per_page=torch.tensor([SLOTS_PER_PAGE] * rows),
        page_bytes=torch.full((rows,), 1024),
        allowed_bytes=torch.tensor(allowed),
        distortion=torch.tensor(LOSS),
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


def test_at_one_slot_per_page_the_plan_is_the_exact_sort(make_view):
    # With pages of one slot there is no rounding, and the best plan under one multiplier is a sort of all steps.
    importance = heavy_tailed(1, 3, 200)
    sizes = [4, 2, 1]  # bytes of a slot per tier, by slots per page of a page of 4 bytes
    view = view_of(
        make_view,
        importance,
        [600],
        slots_per_page=torch.tensor([[1, 2, 4]] * 3),
        page_bytes=torch.full((3,), 4),
    )
    plan = RateDistortion(kappa=1.0, small=0.0)
    hull = lower_hull([float(s) for s in sizes], LOSS)
    targets = plan._solve(_unrounded(view, sizes), importance, hull, torch.tensor([600]))
    steps = []
    for i, score in enumerate(importance.flatten().tolist()):
        before = 0
        for tier, slope in hull:
            steps.append((score / slope, i, tier, sizes[tier] - before))
            before = sizes[tier]
    spent, expected = 0, [-1] * importance.numel()
    for _, i, tier, cost in sorted(steps, reverse=True):
        if spent + cost > 600:
            break
        spent += cost
        expected[i] = tier
    assert targets.flatten().tolist() == expected


class _unrounded:
    """A view whose bytes are counted by slot."""

    def __init__(self, view, sizes):
        self._view, self._sizes = view, torch.tensor([0, *reversed(sizes)])

    def __getattr__(self, name):
        return getattr(self._view, name)

    def bytes_of(self, targets):
        return self._sizes[torch.where(targets < 0, 0, 3 - targets)].sum((1, 2))


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
    plan = RateDistortion(small=0.0)
    hull = lower_hull([64.0, 32.0, 16.0], [loss / 64 for loss in LOSS])
    worth = torch.tensor([0, 3, 2, 1])  # evicted, then tiers 0, 1, 2
    previous = None
    for allowed in (8_000, 16_000, 32_000, 64_000, 150_000):
        targets = plan._solve(view_of(make_view, importance, [allowed]), importance, hull, torch.tensor([allowed]))
        rank = worth[targets + 1]
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
