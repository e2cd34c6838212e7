"""LeanKV's tiers: the worked numbers of the reference, and the budget that solves for the thresholds."""

from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig

from kvcompress_hf import CompressedPagedCache, WindowScores, get_preset
from kvcompress_hf.plans.thresholds import ThresholdPlan

# Section 8.2 of the LeanKV reference: N = 12, window 3, alpha_low = 0.25, alpha_high = 0.8; mean attention per token.
MEANS = [0.33421, 0.02243, 0.06199, 0.23136, 0.00945, 0.12244, 0.03121, 0.12324, 0.01342, 0.17578, 0.06927, 0.15558]
HIGH, LOW, GONE = 0, 1, -1
EXPECTED = [HIGH, LOW, LOW, HIGH, GONE, HIGH, LOW, HIGH, GONE, HIGH, HIGH, HIGH]


def view_of(make_view, importance, **changes):
    importance = torch.as_tensor(importance, dtype=torch.float32)
    batch, rows = importance.shape[:2]
    values = dict(
        slots_per_page=torch.tensor([[16, 32]] * rows),
        page_bytes=torch.full((rows,), 1000),
        distortion=torch.zeros((batch, 2)),
    )
    return make_view(importance, **{**values, **changes})


def test_worked_numbers_of_the_reference(make_view):
    protected = torch.arange(12).expand(1, 1, 12) >= 9
    targets = ThresholdPlan(alpha_high=0.8, alpha_low=0.25).targets(view_of(make_view, [[MEANS]], protected=protected))
    assert targets[0, 0].tolist() == EXPECTED


def test_nothing_moves_up(make_view):
    view = view_of(make_view, [[[0.9] * 4]], tier=torch.tensor([0, 0, 1, 1]))
    assert ThresholdPlan().targets(view)[0, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3, 0.1])
def test_a_budget_solves_for_the_thresholds(make_view, share):
    g = torch.Generator().manual_seed(0)
    importance = torch.rand(2, 6, 800, generator=g).pow(4) / 200
    full = 6 * 50 * 1000
    view = view_of(make_view, importance, allowed_bytes=torch.tensor([int(share * full), int(share * full / 2)]))
    plan = ThresholdPlan(alpha_high=1.0, alpha_low=0.04)
    targets = plan.targets(view)
    held = view.bytes_of(targets)
    assert (held <= view.allowed_bytes).all()
    free = view_of(make_view, importance, allowed_bytes=None)
    unlimited = free.bytes_of(plan.targets(free))
    assert (held >= torch.minimum(view.allowed_bytes, unlimited) * 0.93).all()  # and the budget is used
    # Order is kept: within a sequence a slot in a lower tier is less important than one in a higher.
    for b in range(2):
        high, low = importance[b][targets[b] == 0], importance[b][targets[b] == 1]
        gone = importance[b][targets[b] < 0]
        for above, below in ((high, low), (low, gone)):
            if above.numel() and below.numel():
                assert above.min() >= below.max()


def test_several_sequences_equal_each_alone(make_view):
    importance = torch.rand(3, 4, 300).pow(3) / 50
    allowed = torch.tensor([20_000, 30_000, 9_000])
    plan = ThresholdPlan(alpha_low=0.1)
    together = plan.targets(view_of(make_view, importance, allowed_bytes=allowed))
    for b in range(3):
        alone = plan.targets(view_of(make_view, importance[b : b + 1], allowed_bytes=allowed[b : b + 1]))
        assert torch.equal(together[b : b + 1], alone)


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="alpha_low"):
        ThresholdPlan(alpha_high=0.1, alpha_low=0.2)
    with pytest.raises(ValueError, match="alpha_high"):
        ThresholdPlan(alpha_high=-1.0)


# Section 8.3: p, lowest mean in the high and in the low tier, what LeanKV's decode rule does with the two slots.
DECODE = [
    (12, 0.12244, 0.02243, HIGH, LOW),
    (13, 0.06033, 0.01797, LOW, GONE),
    (14, 0.10370, 0.02979, HIGH, LOW),
    (15, 0.00885, 0.02770, GONE, LOW),
    (16, 0.09720, 0.02735, HIGH, LOW),
    (17, 0.01618, 0.02794, LOW, LOW),
    (18, 0.00500, 0.01508, GONE, LOW),
    (19, 0.04201, 0.01480, LOW, LOW),
    (20, 0.00343, 0.01691, GONE, LOW),
    (21, 0.06267, 0.01703, HIGH, LOW),
]


@pytest.mark.parametrize(("p", "high", "low", "of_high", "of_low"), DECODE)
def test_decode_rules_of_the_reference(make_view, p, high, low, of_high, of_low):
    """Append, drop, demote, demote into the place of a dropped one: what the two slots meet at each step."""
    view = view_of(make_view, [[[high, low]]], tier=torch.tensor([0, 1]), tokens=torch.tensor([p]))
    assert ThresholdPlan(alpha_high=0.8, alpha_low=0.25).targets(view)[0, 0].tolist() == [of_high, of_low]


def test_both_tiers_shrink_and_give_pages_back_while_decoding():
    """Queries turn from the prompt to what is new; the high tier first, then the low one, give up the prompt."""
    prompt, steps, dim = 256, 384, 32
    config = LlamaConfig(
        num_hidden_layers=1, hidden_size=dim, num_attention_heads=1, num_key_value_heads=1, head_dim=dim
    )
    counts = {}
    for half_life in (None, 32):
        observer = WindowScores(window=64, power=1, pool=1, mean=True, half_life=half_life)
        recipe = get_preset("leankv").with_overrides(
            observer=observer,
            plan={"alpha_high": 0.5, "alpha_low": 0.1},
            protect={"recent": 16},
            when={"every": 16},
        )
        cache = CompressedPagedCache(config, recipe)
        g = torch.Generator().manual_seed(0)
        # Old keys point one way, new ones another; queries of the prompt follow the old, those of decoding the new.
        key = torch.randn(1, 1, prompt + steps, dim, generator=g)
        key[..., :prompt, 0] += 6
        key[..., prompt:, 1] += 6
        query = torch.randn(1, 1, prompt + steps, dim, generator=g)
        query[..., :prompt, 0] += 6
        query[..., prompt:, 1] += 12
        history = []
        for part in [slice(0, prompt), *(slice(i, i + 1) for i in range(prompt, prompt + steps))]:
            q, k = query[:, :, part], key[:, :, part]
            cache.attend(0, q, k, k, None, scaling=dim**-0.5, dense=lambda: torch.zeros(1))
            (store,) = cache.inspect().stores
            if cache.run_report.statistics.plans > len(history):
                old = [store.read_field(t, "position")[0, : int(n)] < prompt for t, n in enumerate(store.lengths[:, 0])]
                history.append((int(old[0].sum()), int(old[1].sum()), cache.inspect().arenas[0].live))
        counts[half_life] = history
    first, last = counts[32][0], counts[32][-1]
    assert first[0] + first[1] > 100  # the prompt was there
    assert last[0] + last[1] == 0  # it is forgotten
    pages = [live for _, _, live in counts[32]]
    assert any(after < before for before, after in pairwise(pages))  # and its pages come back
    assert max(low for _, low, _ in counts[32]) > first[1]  # by way of the low tier
    # Without forgetting, the mean over everything ever seen holds on to the prompt for longer.
    assert sum(h + l for h, l, _ in counts[None]) > 1.5 * sum(h + l for h, l, _ in counts[32])
