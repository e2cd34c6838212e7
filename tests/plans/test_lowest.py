"""RoCo, H2O, TOVA, recency and their neighbours against the published vectors and by property."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress_hf.observers.running import RunningScores
from kvcompress_hf.observers.simple import Chance, Recency
from kvcompress_hf.plans.lowest import LowestPlan

VECTORS = json.loads((Path(__file__).parent / "data" / "roco_easykv_vectors.json").read_text())
MEAN, SUM, LAST = RunningScores("mean", std=True), RunningScores("sum"), RunningScores("last")

# Policy: observer, sinks, recent, std-protected (the settings of part A: sink 1, window 3; RoCo recent 2, r = 4).
PART_A = {
    "recency": (Recency(), 1, 0, 0),
    "mas_window": (MEAN, 1, 3, 0),
    "tova": (LAST, 1, 0, 0),
    "roco": (MEAN, 1, 2, 4),
    "h2o": (SUM, 1, 3, 0),
    "h2o_std": (RunningScores("sum", std=True), 1, 2, 4),
}
# Part C: sink 1; RoCo recent 2 and r = 2; positional window 3.
PART_C = {
    "recency": (Recency(), 1, 0, 0),
    "h2o": (SUM, 1, 3, 0),
    "mean_window": (MEAN, 1, 3, 0),
    "tova": (LAST, 1, 0, 0),
    "tova_keep_newest": (LAST, 1, 1, 0),
    "roco": (MEAN, 1, 2, 2),
}


def evicted_position(make_slots, make_view, policy, positions, total, squares, last, seen, capacity):
    observer, sinks, recent, unsettled = policy
    fields = {"sum": last if observer is LAST else total, "square": squares}
    slots = make_slots([positions], fields, seen=seen)
    protected = (slots.positions < sinks) | (slots.positions >= seen - recent)
    view = make_view(
        observer.importance(slots),
        slots.positions,
        protected=protected,
        spread=observer.spread(slots),
        allowed_slots=torch.tensor([[capacity]]),
    )
    targets = LowestPlan(protect_unsettled=unsettled).targets(view)
    gone = slots.positions[targets < 0].tolist()
    assert len(gone) == max(0, len(positions) - capacity)
    return gone[0] if gone else None


@pytest.mark.parametrize("policy", PART_A)
def test_part_a_every_policy_evicts_its_own_slot(make_slots, make_view, policy):
    attention = torch.tensor(VECTORS["A"]["A_percent"], dtype=torch.float64) / 100
    total, squares, last = attention.sum(0), attention.square().sum(0), attention[-1]
    slots = make_slots([list(range(10))], {"sum": total, "square": squares}, seen=10)
    torch.testing.assert_close(MEAN.importance(slots)[0, 0], torch.tensor(VECTORS["A"]["mas"]), atol=1e-5, rtol=1e-4)
    spread = MEAN.spread(slots)[0, 0]
    torch.testing.assert_close(spread[:-1], torch.tensor(VECTORS["A"]["std"][:-1]), atol=1e-5, rtol=1e-4)
    assert spread[-1] == torch.inf  # one query says nothing about the spread
    got = evicted_position(
        make_slots, make_view, PART_A[policy], list(range(10)), total, squares, last, seen=10, capacity=9
    )
    assert got == VECTORS["A"]["picks"][policy]


def logit(i, j):
    return 2 * math.sin(1.3 * (i + 1) * (j + 2) + 0.7 * (j + 1) + 0.31 * (i + 2)) + 1.5 * math.cos(0.9 * (j + 1))


@pytest.mark.parametrize("policy", PART_C)
def test_part_c_clean_semantics_step_by_step(make_slots, make_view, policy):
    cached, total, squares, evicted = [], [], [], []
    for i in range(24):
        cached, total, squares = [*cached, i], [*total, 0.0], [*squares, 0.0]
        p = torch.tensor([logit(i, j) for j in cached], dtype=torch.float64).softmax(0).tolist()
        total = [a + b for a, b in zip(total, p, strict=True)]
        squares = [a + b * b for a, b in zip(squares, p, strict=True)]
        gone = evicted_position(
            make_slots, make_view, PART_C[policy], cached, total, squares, p, seen=i + 1, capacity=10
        )
        if gone is not None:
            evicted.append(gone)
            at = cached.index(gone)
            for column in (cached, total, squares):
                del column[at]
    assert evicted == VECTORS["C"][policy]["evicted"]
    assert cached == VECTORS["C"][policy]["kept"]


def test_half_precision_statistics_would_invert_the_scope_and_ours_do_not(make_slots):
    # Squares below 6e-8 flush to zero in fp16, which makes the variance negative and its root NaN.
    p = torch.full((1, 1, 64), 2e-4)
    slots = make_slots(torch.arange(64)[None], {"sum": p * 100, "square": p.square() * 100}, seen=164)
    spread = MEAN.spread(slots)
    assert spread.isfinite().all() and (spread >= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    slots=st.integers(1, 30),
    capacity=st.integers(0, 40),
    unsettled=st.integers(0, 40),
    scope=st.sampled_from(["head", "layer", "sequence"]),
    seed=st.integers(0, 10**6),
)
def test_the_cap_is_strict_and_nothing_protected_goes(rows, slots, capacity, unsettled, scope, seed):
    from kvcompress_hf.plans.base import PlanView

    g = torch.Generator().manual_seed(seed)
    importance = torch.rand(2, rows, slots, generator=g).mul(5).round()  # ties
    protected = torch.rand(2, rows, slots, generator=g) < 0.2
    filled = torch.rand(2, rows, slots, generator=g) < 0.9
    protected &= filled
    view = PlanView(
        importance=importance,
        spread=torch.rand(2, rows, slots, generator=g),
        positions=torch.rand(2, rows, slots, generator=g).argsort(dim=-1).to(torch.int32),
        filled=filled,
        protected=protected,
        tier=torch.zeros(slots, dtype=torch.int64),
        layer_of_row=torch.arange(rows) // 2,
        slots_per_page=torch.full((rows, 1), 16),
        page_bytes=torch.full((rows,), 1),
        allowed_bytes=None,
        allowed_slots=torch.full((2, rows), capacity),
        tokens=torch.tensor([slots, slots]),
        dense_bytes=torch.tensor([slots, slots]),
        distortion=torch.zeros((2, 1)),
    )
    keep = (LowestPlan(scope=scope, protect_unsettled=unsettled).targets(view) >= 0) & filled
    assert (protected <= keep).all()
    groups = {"head": torch.arange(rows), "layer": view.layer_of_row, "sequence": torch.zeros(rows)}[scope]
    for group in groups.unique():
        mine = groups == group
        kept, must = keep[:, mine].sum((1, 2)), protected[:, mine].sum((1, 2))
        total, cap = filled[:, mine].sum((1, 2)), capacity * int(mine.sum())
        assert torch.equal(kept, torch.maximum(must, total.clamp(max=cap)))


def test_pyramids_give_the_first_layers_more(make_view):
    view = make_view(
        torch.rand(1, 4, 100),
        layer_of_row=torch.arange(4),
        slots_per_page=torch.full((4, 1), 16),
        page_bytes=torch.full((4,), 1),
        allowed_slots=torch.full((1, 4), 40),
    )
    kept = (LowestPlan(pyramid=0.5).targets(view) >= 0).sum(-1)[0].tolist()
    assert kept == [60, 46, 33, 20]


def test_shared_scopes_leave_every_head_its_floor(make_view):
    importance = torch.rand(1, 4, 100) + torch.tensor([10.0, 0, 0, 0])[None, :, None]
    view = make_view(
        importance,
        slots_per_page=torch.full((4, 1), 16),
        page_bytes=torch.full((4,), 1),
        allowed_slots=torch.full((1, 4), 30),
    )
    kept = (LowestPlan(scope="layer", floor=0.2).targets(view) >= 0).sum(-1)[0]
    assert kept.tolist()[1:] != [30, 30, 30] and kept.min() >= 6 and kept.sum() == 120


def test_random_is_seeded_even_and_never_touches_the_protected(make_slots, make_view):
    slots = make_slots(torch.arange(2000).expand(2, 2000), seen=2000)
    draw = Chance(3).importance(slots)
    assert torch.equal(draw, Chance(3).importance(slots)) and not torch.equal(draw, Chance(4).importance(slots))
    assert (draw >= 0).all() and (draw < 1).all() and abs(float(draw.mean()) - 0.5) < 0.02
    assert not torch.equal(draw[0, 0], draw[0, 1])
    assert abs(float(torch.corrcoef(torch.stack([draw[0, 0], slots.positions[0, 0].float()]))[0, 1])) < 0.08


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scope": "model"}, "scope"),
        ({"floor": 0.2}, "floor"),
        ({"pyramid": 1.0}, "pyramid"),
        ({"protect_unsettled": -1}, "protect_unsettled"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        LowestPlan(**arguments)
