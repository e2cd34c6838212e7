"""What happens between decode steps: plans that leave room, sequences that take turns, and steps that stay prepared."""

import copy

import pytest
import torch

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument
from kvcompress_hf.paging.slots import Decision, StorePart, gather_slots


@pytest.fixture(scope="module")
def stock(tiny_llama):
    return tiny_llama(vocab_size=96, intermediate_size=96, num_hidden_layers=3, head_dim=32)


def tokens(batch, count, seed=0):
    return torch.randint(3, 96, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, cache):
    return model(ids, **as_argument(model, cache), use_cache=True).logits


def run(model, recipe, ids, steps, between=lambda cache: None):
    """Logits of every step, and when a plan was made."""
    cache, found, plans = kvc.CompressedPagedCache(model.config, recipe), [], []
    logits(model, ids[:, :-steps], cache)
    for i in range(ids.shape[1] - steps, ids.shape[1]):
        between(cache)
        before = cache.run_report.statistics.plans
        found.append(logits(model, ids[:, i : i + 1], cache))
        plans.append(cache.run_report.statistics.plans > before)
    return torch.cat(found, dim=1), plans, cache


@pytest.mark.parametrize("recipe", ["auto", "kv-compress", "k8v4", "h2o"])
def test_a_step_that_stays_prepared_is_one_that_is_prepared_anew(stock, recipe):
    model = kvc.patch(copy.deepcopy(stock), recipe)
    recipe, ids = kvc.get_preset(recipe), tokens(3, 260)

    def forget(cache):
        for store in cache._attention.stores:
            store.tensors.plans.clear()

    kept, plans, _ = run(model, recipe, ids, 60)
    anew, plans_then, _ = run(model, recipe, ids, 60, forget)
    assert torch.equal(kept, anew) and plans == plans_then


def test_packing_into_pages_that_are_there_leaves_decode_plans_alone(stock):
    model = kvc.patch(copy.deepcopy(stock), "k8v4")
    recipe = kvc.get_preset("k8v4").with_overrides(when={"every": 4})
    _, _, cache = run(model, recipe, tokens(2, 90), 9)  # the last step decodes behind a packing
    (store,) = cache._attention.stores
    before = dict(store.tensors.plans)
    packings = cache.run_report.statistics.packings
    for _ in range(3):
        logits(model, tokens(2, 1), cache)
    assert cache.run_report.statistics.packings > packings
    assert before and all(store.tensors.plans[layer] is plan for layer, plan in before.items())


def test_the_room_that_is_left_saves_plans_and_keeps_the_budget(stock):
    model = kvc.patch(copy.deepcopy(stock), "auto")
    ids, made = tokens(1, 1400, seed=2), {}
    for headroom in (1 / 256, 1 / 8):
        plan = kvc.RateDistortion(small=0.0, headroom=headroom)
        recipe = kvc.get_preset("auto").with_overrides(plan=plan, budget=0.15)
        sizes = []
        _, plans, _ = run(model, recipe, ids, 200, lambda cache, sizes=sizes: sizes.append(cache.memory()))
        made[headroom] = sum(plans)
        assert all(report.total <= 0.15 * report.dense * 1.02 for report in sizes[32:])
    assert 0 < made[1 / 8] < made[1 / 256] / 2


def test_new_slots_enter_the_best_tier_that_any_stay_in(stock):
    """At small budgets that is the cheapest, where a plan leaves room for them, so that few plans follow packings."""
    model, budget = kvc.patch(copy.deepcopy(stock), "auto"), 1 / 16
    recipe, sizes, better, packed = kvc.get_preset("auto").with_overrides(budget=budget), [], [], []

    def look(cache):
        sizes.append(cache.memory())
        packed.append(cache.run_report.statistics.packings)
        better.extend(int(store.lengths[:2].sum()) for store in cache._attention.stores)

    _, plans, cache = run(model, recipe, tokens(1, 1400, seed=2), 200, look)
    assert not any(better) and int(torch.stack(cache.slots()).sum()) > 0
    assert all(report.total <= budget * report.dense * 1.02 for report in sizes)
    packings = 200 // recipe.when.tight
    assert cache.run_report.statistics.packings - packed[0] == packings
    (store,) = cache._attention.stores
    assert store.tail(0).capacity == recipe.when.tight < recipe.when.every
    assert 0 < sum(plans) <= packings * 2 // 3
    rows = [recipe.with_overrides(budget=each) for each in (budget, 1 / 4)]
    cache = kvc.CompressedPagedCache(model.config, rows)
    logits(model, tokens(2, 300), cache)
    assert (cache._attention.entry, cache._attention.every) == (0, recipe.when.every)
    cache.batch_select_indices(torch.tensor([0]))
    assert (cache._attention.entry, cache._attention.every) == (2, recipe.when.tight)


def test_sequences_take_turns_and_each_as_if_alone(stock):
    model = kvc.patch(copy.deepcopy(stock), "auto")
    plan = kvc.RateDistortion(small=0.0, headroom=1 / 8)
    recipe = kvc.get_preset("auto").with_overrides(plan=plan, budget=0.15)
    ids = tokens(4, 1400, seed=5)
    together, plans, _ = run(model, recipe, ids, 200)
    alone = [run(model, recipe, ids[i : i + 1], 200) for i in range(4)]
    assert len({tuple(mine) for _, mine, _ in alone}) > 1  # not all at the same steps
    for i, (mine, own, _) in enumerate(alone):
        # Matrix products over other batch sizes round differently, and a code may flip to its neighbour.
        assert (together[i : i + 1] - mine).abs().mean() < 2e-3 * mine.std()
        assert all(any_of for any_of, of_mine in zip(plans, own, strict=True) if of_mine)


def test_what_is_gathered_and_decided_of_some_sequences_is_that_of_all(stock):
    model = kvc.patch(copy.deepcopy(stock), "auto")
    _, _, cache = run(model, kvc.get_preset("auto"), tokens(4, 300), 9)
    (store,) = cache._attention.stores
    parts, fields, some = [StorePart(store, (0, 1, 2), (2, 2, 2))], ("score",), torch.tensor([1, 3])
    whole, part = (gather_slots(parts, fields, 300, 291, sequences) for sequences in (None, some))
    assert torch.equal(part.filled, whole.filled[some])
    assert torch.equal(part.positions * part.filled, (whole.positions * whole.filled)[some])
    assert torch.equal(part.fields["score"] * part.filled, (whole.fields["score"] * whole.filled)[some])

    targets = torch.randint(-1, 3, whole.filled.shape, generator=torch.Generator().manual_seed(1))
    protected = whole.filled & (whole.positions < 4)
    stay = whole.tier.expand_as(targets).clone()
    stay[some] = targets[some]
    of_all = Decision.of(parts, whole, stay, protected)
    of_some = Decision.of(parts, part, targets[some], protected[some], some)
    assert torch.equal(of_all.counts[0], of_some.counts[0])
    chosen = torch.zeros(4, dtype=torch.bool).index_fill_(0, some, True).repeat_interleave(2).repeat(3)
    assert torch.equal(of_all.targets[0][chosen], of_some.targets[0][chosen])
    assert torch.equal(of_all.protected[0][chosen], of_some.protected[0][chosen])
    assert not (of_some.targets[0][~chosen] < 0).any()
