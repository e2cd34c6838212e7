"""LeanKV's tiers: the worked numbers of the reference, and the budget that solves for the thresholds."""

import pytest
import torch

from kvcompress_hf.planning.thresholds import ThresholdPlan

# Section 8.2 of the LeanKV reference: N = 12, window 3, alpha_low = 0.25, alpha_high = 0.8; mean attention per token.
MEANS = [0.33421, 0.02243, 0.06199, 0.23136, 0.00945, 0.12244, 0.03121, 0.12324, 0.01342, 0.17578, 0.06927, 0.15558]
HIGH, LOW, GONE = 0, 1, -1
EXPECTED = [HIGH, LOW, LOW, HIGH, GONE, HIGH, LOW, HIGH, GONE, HIGH, HIGH, HIGH]


def view_of(make_view, importance, **changes):
    importance = torch.as_tensor(importance, dtype=torch.float32)
    rows = importance.shape[1]
    values = dict(
        slots_per_page=torch.tensor([[16, 32]] * rows), page_bytes=torch.full((rows,), 1000), distortion=torch.zeros(2)
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
