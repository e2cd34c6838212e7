"""KV-Compress plans: the worked example of the reference, and random schedules against plain Python."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress_hf import Recipe, get_preset
from kvcompress_hf.plans.kv_compress import PagePlan
from kvcompress_hf.plans.pages import plan_pages

INF = float("inf")
BLOCK = 4

# Two layers x two KV heads, G = 2, b = 4, prompt 14, w = 3, pool 3 (shared reference, kv_compress.md section 8).
SCORES = [
    [0.0126, 0.7200, 0.7200, 0.7200, 0.1398, 0.1975, 0.1832, 0.4402, 0.4402, 0.4402, 0.0205, 0.1769, 0.1769, 0.1684],
    [0.0315, 0.0322, 0.0373, 0.0490, 0.0490, 0.0491, 0.0508, 0.0508, 0.0449, 0.0574, 0.0631, 0.0631, 0.0375, 0.0212],
    [0.0414, 0.0414, 0.0555, 0.0604, 0.0758, 0.3513, 0.3513, 0.3470, 0.5621, 0.5621, 0.5621, 0.1156, 0.1156, 0.0630],
    [0.0087, 0.0101, 0.0136, 0.0790, 0.1909, 0.1909, 1.0635, 0.9176, 0.9524, 0.1540, 2.4125, 2.4125, 2.4125, 0.0015],
]


def keep_mask(scores, positions, lengths, protected_from, evict_pages, block=BLOCK):
    """Runs plan_pages on one sequence; pages are worth one byte each, so bytes are pages."""
    filled = torch.arange(scores.shape[-1]) < lengths[:, None]
    rows = scores.shape[0]
    return plan_pages(
        scores[None],
        positions[None],
        filled[None],
        (positions >= protected_from)[None],
        torch.full((rows,), block),
        torch.ones(rows, dtype=torch.int64),
        torch.tensor([evict_pages]),
    )[0]


def test_worked_example_frees_the_pages_of_the_reference():
    positions = torch.arange(14, dtype=torch.int32).expand(4, 14)
    keep = keep_mask(torch.tensor(SCORES), positions, torch.full((4,), 14), protected_from=12, evict_pages=8)
    evicted = [(~row).nonzero().flatten().tolist() for row in keep]
    assert evicted == [[0, 10], list(range(10)), [0, 1, 2, 3, 4, 11], [0, 1, 2, 3, 4, 9]]
    assert keep.sum().item() == 32  # exactly 8 full pages of 4


def test_the_protected_window_covers_all_of_the_window():
    # The original protects one key of its observation window too few (position 11 in L1H0); here it stays.
    positions = torch.arange(14, dtype=torch.int32).expand(4, 14)
    keep = keep_mask(torch.tensor(SCORES), positions, torch.full((4,), 14), protected_from=14 - 3, evict_pages=8)
    assert keep[:, 11:].all()


def plain_python(scores, positions, lengths, protected_from, evict_pages, block):
    """The greedy walk of the reference: drop slots in score order, count a page whenever a row's counter hits 0."""
    order = sorted(
        (scores[r][s], positions[r][s], r, s)
        for r in range(len(scores))
        for s in range(lengths[r])
        if positions[r][s] < protected_from
    )
    # Prices tie by page number and row, as documented; distinct scores make the walk unambiguous.
    remaining = [(n - 1) % block + 1 if n else 0 for n in lengths]
    pending = [[] for _ in scores]
    evicted = [set() for _ in scores]
    freed = 0
    for _, _, r, s in order:
        if freed == evict_pages:
            break
        pending[r].append(s)
        remaining[r] -= 1
        if remaining[r] == 0:
            evicted[r].update(pending[r])
            pending[r].clear()
            remaining[r] = block
            freed += 1
    return evicted


@pytest.mark.parametrize("seed", range(600))
def test_random_schedules_match_plain_python(seed):
    rng = random.Random(seed)
    rows, block = rng.randint(1, 6), rng.choice([1, 2, 4, 16])
    lengths = [rng.randint(0, 40) for _ in range(rows)]
    width = max(lengths) or 1
    values = rng.sample(range(10_000), rows * width)
    scores = [[values[r * width + s] / 10_000 for s in range(width)] for r in range(rows)]
    positions = [rng.sample(range(60), width) for _ in range(rows)]  # ragged and scrambled, as after evictions
    protected_from, evict_pages = rng.choice([30, 50, 60]), rng.randint(0, 12)
    keep = keep_mask(
        torch.tensor(scores),
        torch.tensor(positions, dtype=torch.int32),
        torch.tensor(lengths),
        protected_from,
        evict_pages,
        block,
    )
    expected = plain_python(scores, positions, lengths, protected_from, evict_pages, block)
    for row in range(rows):
        evicted = {s for s in range(lengths[row]) if not keep[row, s]}
        assert evicted == expected[row]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31), st.integers(0, 20))
def test_several_sequences_at_once_equal_each_alone(batch, rows, seed, excess):
    generator = torch.Generator().manual_seed(seed)
    slots, block = 37, 4
    scores = torch.rand(batch, rows, slots, generator=generator)
    positions = torch.rand(batch, rows, slots, generator=generator).argsort(-1).to(torch.int32)
    filled = torch.arange(slots) < torch.randint(0, slots + 1, (batch, rows, 1), generator=generator)
    protected = positions >= torch.randint(0, slots, (batch, 1, 1), generator=generator)
    sizes, worth = torch.full((rows,), block), torch.full((rows,), 100)
    wanted = torch.randint(0, 100 * (excess + 1), (batch,), generator=generator)
    together = plan_pages(scores, positions, filled, protected, sizes, worth, wanted)
    for b in range(batch):
        one = slice(b, b + 1)
        alone = plan_pages(scores[one], positions[one], filled[one], protected[one], sizes, worth, wanted[one])
        assert torch.equal(together[one], alone)
    assert not (~together & (protected | ~filled) & filled).any()  # nothing protected goes
    dropped = (filled & ~together).sum(-1)
    after = together.sum(-1)
    assert ((dropped == 0) | (after % block == 0)).all()  # touched rows end on a page boundary


def test_ties_go_by_position_and_leave_the_newer_slot():
    scores = torch.zeros(1, 8)
    positions = torch.tensor([[5, 1, 7, 3, 0, 2, 6, 4]], dtype=torch.int32)
    keep = keep_mask(scores, positions, torch.tensor([8]), protected_from=100, evict_pages=1)
    assert sorted(positions[0][~keep[0]].tolist()) == [0, 1, 2, 3]


def test_nothing_to_free_keeps_everything_and_impossible_wishes_stop_at_protection():
    positions = torch.arange(14, dtype=torch.int32).expand(4, 14)
    lengths = torch.full((4,), 14)
    assert keep_mask(torch.tensor(SCORES), positions, lengths, 14, evict_pages=-3).all()
    keep = keep_mask(torch.tensor(SCORES), positions, lengths, protected_from=4, evict_pages=10**6)
    assert keep[:, 4:].all() and (keep.sum(1) == 12).all()


def test_not_a_number_of_slots_is_too_small():
    empty = torch.zeros(2, 3, 0)
    filled = torch.zeros(2, 3, 0, dtype=torch.bool)
    ones = torch.ones(3, dtype=torch.int64)
    assert plan_pages(empty, empty.int(), filled, filled, ones * 4, ones, torch.tensor([5, 5])).shape == (2, 3, 0)


def flat_and_sharp(make_view, **changes):
    """Two heads of 160 slots: one spreads its attention, the other gives ten times as much to everything."""
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(1, 2, 160, generator=g) * torch.tensor([1.0, 10.0])[:, None]
    share = torch.full((1, 2), 80)
    return make_view(scores, allowed_bytes=torch.tensor([10_000]), allowed_slots=share, **changes)


def kept_per_head(plan, view):
    targets = plan.targets(view)
    assert (view.bytes_of(torch.where(view.filled, targets, -1)) <= view.allowed_bytes).all()
    return (targets >= 0).sum(-1)[0].tolist()


def test_a_floor_leaves_every_head_its_share(make_view):
    view = flat_and_sharp(make_view)
    stripped, rich = kept_per_head(PagePlan(), view)
    assert stripped <= 16 and stripped + rich == 160
    assert kept_per_head(PagePlan(floor=0.6), view) == [48, 112]
    newest = torch.arange(160).expand(1, 2, 160) >= 120  # what is protected counts towards the floor
    assert kept_per_head(PagePlan(floor=0.6), flat_and_sharp(make_view, protected=newest)) == [48, 112]


def test_normalised_heads_compete_by_shape_and_not_by_mass(make_view):
    flat, sharp = kept_per_head(PagePlan(normalise=True), flat_and_sharp(make_view))
    assert abs(flat - sharp) <= 32


def test_a_bias_moves_the_balance_between_heads(make_view):
    view = flat_and_sharp(make_view)
    assert kept_per_head(PagePlan(bias=((20.0, 0.0),)), view) == [160, 0]
    with pytest.raises(ValueError, match=r"bias has 3 numbers.*2 KV heads"):
        PagePlan(bias=((0.0,), (1.0, 2.0))).targets(view)


def test_a_bias_survives_json():
    recipe = get_preset("kv-compress").with_overrides(plan={"bias": [[0.5, 1.0], [0.0, 2.0]]})
    assert Recipe.from_json(recipe.to_json()) == recipe and hash(recipe) == hash(recipe)
