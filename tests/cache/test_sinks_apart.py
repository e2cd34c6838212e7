"""Recipes without a plan, or with one that keeps or evicts, that store the first tokens of each sequence in a tier of
their own."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument

SINKS = 4


@pytest.fixture(scope="module")
def model(tiny_llama):
    return kvc.patch(tiny_llama(eos_token_id=None, vocab_size=97, head_dim=16, initializer_range=0.3), "k4v4")


def ids_of(batch, tokens):
    return torch.randint(1, 97, (batch, tokens), generator=torch.Generator().manual_seed(0))


def packed(cache):
    """Slots per tier `[tiers, layers, batch, kv_heads]`."""
    store = cache.inspect().stores[0]
    return store.lengths_on_host().view(2, store.layers, store.batch, -1)


def feed(model, cache, ids, **inputs):
    with torch.no_grad():
        return model(ids, use_cache=True, **as_argument(model, cache), **inputs).logits


@pytest.mark.parametrize("parts", [(60,), (3, 57), (1, 2, 30, 27), (2, *[1] * 58)])
def test_the_first_four_tokens_are_native_however_they_come(model, parts):
    cache = kvc.CompressedPagedCache(model.config, "k4v4")
    for part in ids_of(1, 60).split(parts, dim=1):
        feed(model, cache, part)
    first, rest = packed(cache)
    in_tail = 60 - int((first + rest)[0, 0, 0])
    assert (first == SINKS).all() and (rest == 60 - SINKS - in_tail).all() and in_tail < 32
    # What they hold are the very keys and values of the first tokens.
    lossless = kvc.prefill(model, ids_of(1, 60), kvc.Recipe(centre_keys=False))
    for layer in range(2):
        mine = [x[..., :SINKS, :] for x in states(cache, layer, SINKS)]
        theirs = [x[..., :SINKS, :] for x in states(lossless, layer, 60)]
        for ours, exact in zip(mine, theirs, strict=True):
            torch.testing.assert_close(ours, exact, atol=2e-3, rtol=1e-3)


def states(cache, layer, slots):
    """Whole keys and values of the first tier of a layer, `[kv_heads, slots, head_dim]`."""
    store = cache.inspect().stores[0]
    keys, values = store.backend.read_slots(store.rows(layer), 0, slots)
    return store.whole(layer, keys[None])[0], values


def test_padding_does_not_count(model):
    ids, mask = ids_of(3, 40), torch.ones(3, 40, dtype=torch.long)
    for row, pads in ((1, 7), (2, 38)):
        mask[row, :pads] = 0
    cache = kvc.prefill(model, ids, "k4v4", attention_mask=mask)
    first, rest = packed(cache)
    assert first[0, :, 0].tolist() == [4, 4, 2]
    assert rest[0, :, 0].tolist() == [36, 29, 0]
    # The sequence that has not four tokens yet gets them with the next.
    feed(model, cache, ids_of(3, 6), attention_mask=torch.cat([mask, torch.ones(3, 6, dtype=torch.long)], 1))
    first, rest = packed(cache)
    assert first[0, :, 0].tolist() == [4, 4, 4] and rest[0, :, 0].tolist() == [42, 35, 4]


def test_they_take_a_page_per_head(model):
    ids = ids_of(1, 300)
    apart, alike = kvc.prefill(model, ids, "k4v4"), kvc.prefill(model, ids, kvc.Recipe(tiers=("k4v4",)))
    rows = sum(heads.numel() for heads in apart.slots())
    page = apart.inspect().stores[0].layout.page_bytes
    assert 0 < apart.memory().total - alike.memory().total <= 2 * rows * (page + 16)


def test_tokens_can_be_taken_back_into_the_first(model):
    cache = kvc.prefill(model, ids_of(1, 40), "k4v4")
    cache.crop(-10)
    assert [int(slots[0, 0, 0]) for slots in packed(cache)] == [4, 26]
    cache.crop(-27)
    assert [int(slots[0, 0, 0]) for slots in packed(cache)] == [3, 0]
    feed(model, cache, ids_of(1, 20))
    assert [int(slots[0, 0, 0]) for slots in packed(cache)] == [4, 19]


def test_windows_have_none():
    shape = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_hidden_layers=1)
    model = MistralForCausalLM(MistralConfig(vocab_size=97, intermediate_size=64, sliding_window=24, **shape)).eval()
    cache = kvc.prefill(model, ids_of(1, 40), "k4v4")
    first, rest = packed(cache)
    assert not first.any() and (rest == 23).all()


def test_recipes_of_before_have_one_tier_still():
    old = kvc.Recipe.from_json('{"name": "k4v4", "tiers": ["k4v4"]}')
    assert not old.sinks_apart and old.tiers == ("k4v4",)
    mine = kvc.get_preset("k4v4")
    assert mine.sinks_apart == SINKS and kvc.Recipe.from_json(mine.to_json()) == mine
    assert not mine.with_overrides(tiers="k8v4").sinks_apart
    with pytest.raises(ValueError, match="without a plan.*protect="):
        kvc.Recipe(tiers=("native", "k4v4"))
    with pytest.raises(ValueError, match="without a plan"):
        kvc.Recipe(tiers=("native", "k8v4", "k4v4"), protect=kvc.Protect(sinks=4))


# -- with a plan -------------------------------------------------------------------------------------------------------

PLANS = [kvc.LowestPlan(), kvc.LowestPlan(scope="sequence", floor=0.3), kvc.LowestPlan(pyramid=0.5), kvc.PagePlan()]


def planned(plan, budget, tiers=("native", "k4v4"), **protect):
    protect = kvc.Protect(**{"sinks": SINKS, "recent": 6, **protect})
    when = kvc.When(every=8)
    return kvc.Recipe("planned", kvc.Chance(), protect, kvc.Budget(budget), plan, tiers, when)


@pytest.mark.parametrize("budget", [30, 0.4, "28KiB"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_plans_leave_them_alone_and_keep_the_budget_with_the_others(model, plan, budget):
    recipe = planned(plan, budget)
    with kvc.patched(model, recipe):
        cache = kvc.prefill(model, ids_of(2, 120), recipe)
        for at in range(48):
            feed(model, cache, ids_of(2, 168)[:, 120 + at : 121 + at])
            if at % 8 == 7:
                first, rest = packed(cache)
                assert (first == SINKS).all()
                if isinstance(budget, int):
                    page = cache.inspect().stores[0].layout.tiers[1].slots
                    others, rows = rest.sum((0, 2)), rest.shape[0] * rest.shape[2]
                    by_pages = isinstance(plan, kvc.PagePlan)
                    most = max(rows, -(-budget * rows // page)) * page if by_pages else (budget - SINKS) * rows
                    assert (others <= most).all() and (others >= most - by_pages * rows * page).all()
                else:
                    allowed = int(28 * 1024 if isinstance(budget, str) else budget * cache.memory().dense / 2)
                    assert cache.memory().total <= 2 * allowed
    assert cache.run_report.statistics.plans == 7


def test_what_goes_is_the_same_as_in_one_tier(model):
    """With a number of tokens as the budget, only where the sinks lie differs."""
    kept = []
    for tiers in (("native", "k4v4"), ("k4v4",)):
        recipe = planned(kvc.LowestPlan(), 30, tiers)
        with kvc.patched(model, recipe):
            cache = kvc.prefill(model, ids_of(1, 120), recipe)
            kept.append([row.tolist() for row in cache.inspect().stores[0].positions()])
    assert kept[0] == kept[1] and len(kept[0][0]) == 30


def test_a_prompt_of_sinks_alone_is_planned_for(model):
    recipe = planned(kvc.LowestPlan(), 30)
    with kvc.patched(model, recipe):
        cache = kvc.prefill(model, ids_of(1, 3), recipe)
    first, rest = packed(cache)
    assert (first == 3).all() and not rest.any() and cache.run_report.statistics.plans == 1


def test_a_protected_prompt_comes_on_top(model):
    recipe = planned(kvc.LowestPlan(), 16, prompt=True)
    with kvc.patched(model, recipe):
        cache = kvc.prefill(model, ids_of(1, 50), recipe)
        for at in range(40):
            feed(model, cache, ids_of(1, 90)[:, 50 + at : 51 + at])
    first, rest = packed(cache)
    assert (first == SINKS).all() and (rest == 50 + 16 - SINKS).all()


def test_two_tiers_still_need_sinks_or_a_plan_that_lowers():
    with pytest.raises(ValueError, match="LowestPlan only keeps or evicts.*protect={'sinks': 4}"):
        planned(kvc.LowestPlan(), 30, sinks=0)
    with pytest.raises(ValueError, match="LowestPlan only keeps or evicts"):
        planned(kvc.LowestPlan(), 30, ("native", "k8v4", "k4v4"))
