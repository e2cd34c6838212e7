"""Any observer, protection, budget, plan, tiers and time together: it runs and keeps its budget, or says why not.

The presets too: their budget holds after every event, bytes stay flat in a long decode, statistics are finite in half
precision.
"""

import itertools
from functools import partial

import pytest
import torch
from transformers import LlamaConfig

import kvcompress_hf as kvc
from kvcompress_hf.units import parse_bytes

KV_HEADS, GROUP, DIM, LAYERS, PROMPT, STEPS = 2, 2, 32, 2, 150, 36
DENSE = 2 * LAYERS * KV_HEADS * DIM * 4  # bytes per token, float32

OBSERVERS = {
    "window": kvc.WindowScores(window=16),
    "window-max": kvc.WindowScores(window=16, power=1, group="max", mean=True, half_life=32),
    "window-full": kvc.WindowScores(window=None, pool=1, exclude=10, value=True, equalise=True),
    "window-again": kvc.WindowScores(window=16, pool=3, mean=True, non_causal=True),
    "window-once": kvc.WindowScores(window=16, decode=False),
    "running": kvc.RunningScores("mean", std=True),
    "last": kvc.RunningScores("last"),
    "group-mean": kvc.GroupMeanScores("mean", std=True),
    "persistence": kvc.PersistenceScores(window=8),
    "expected": kvc.ExpectedAttention(queries=32),
    "recency": kvc.Recency(),
    "random": kvc.Chance(),
    "keydiff": kvc.KeyDiff(),
}
PLANS = {
    "pages": kvc.PagePlan(),
    "pages-floor": kvc.PagePlan(floor=0.5, normalise=True),
    "head": kvc.LowestPlan(),
    "unsettled": kvc.LowestPlan(protect_unsettled=8),
    "layer": kvc.LowestPlan(scope="layer", floor=0.2),
    "sequence": kvc.LowestPlan(scope="sequence"),
    "pyramid": kvc.LowestPlan(pyramid=0.5),
    "thresholds": kvc.ThresholdPlan(alpha_high=1.0, alpha_low=0.05),
    "rate-distortion": kvc.RateDistortion(),
}
BUDGETS = {"tokens": 64, "fraction": 0.4, "bytes": "64KiB", "none": None}
TIERS = {"native": ("native",), "k8v4": ("k8v4",), "two": ("k8v4", "k4v2"), "three": ("native", "k8v4", "k2v2")}
WHEN = {
    "continual": kvc.When(every=8),
    "once": kvc.When(every=8, decode=False),
    "late": kvc.When(prefill=False, every=12, interval=24),
}
PROTECT = {"none": kvc.Protect(), "both": kvc.Protect(sinks=2, recent=16)}

EVERYTHING = list(itertools.product(OBSERVERS, PLANS, BUDGETS, TIERS, WHEN, PROTECT))


def refused(observer, plan, budget, tiers, when, protect):
    """The reason for which a combination makes no sense, as the message must say it; `None` if it does."""
    if observer in ("window-once", "expected") and when != "once":
        return "gives them no score"
    if budget == "none" and plan != "thresholds":
        return "needs a budget"
    sinks_apart = tiers == "two" and PROTECT[protect].sinks  # they alone lie in the first
    if tiers in ("two", "three") and plan not in ("thresholds", "rate-distortion") and not sinks_apart:
        return "takes one tier"
    if tiers == "three" and plan == "thresholds":
        return "a high and a low tier"
    if plan == "unsettled" and observer not in ("running", "group-mean"):
        return "standard\\s+deviation"
    return None


def build(observer, plan, budget, tiers, when, protect):
    return kvc.Recipe(
        observer=OBSERVERS[observer],
        plan=PLANS[plan],
        budget=None if BUDGETS[budget] is None else kvc.Budget(BUDGETS[budget]),
        tiers=TIERS[tiers],
        when=WHEN[when],
        protect=PROTECT[protect],
    )


def test_every_combination_is_a_recipe_or_refused_with_the_reason():
    for case in EVERYTHING:
        reason = refused(*case)
        if reason is None:
            recipe = build(*case)
            assert kvc.Recipe.from_json(recipe.to_json()) == recipe
        else:
            with pytest.raises(ValueError, match=reason):
                build(*case)


def sampled():
    """Two combinations that make sense for every pair of observer and plan, the other parts drawn at random."""
    order = torch.randperm(len(EVERYTHING), generator=torch.Generator().manual_seed(0)).tolist()
    chosen: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for case in (EVERYTHING[i] for i in order):
        mine = chosen.setdefault(case[:2], [])
        if len(mine) < 2 and refused(*case) is None:
            mine.append(case)
    return [case for cases in chosen.values() for case in cases]


@pytest.fixture(scope="module")
def states():
    return states_of(PROMPT + STEPS)


def cache_of(recipe, **arguments):
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=DIM * KV_HEADS * GROUP,
        num_attention_heads=KV_HEADS * GROUP,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
    )
    return kvc.CompressedPagedCache(config, recipe, **arguments)


def read(cache, states, chunks):
    """Feeds chunks to a cache; yields the tokens seen and whether a plan has just been made."""
    seen = 0
    for i, count in enumerate(chunks):
        plans = cache.run_report.statistics.plans
        attend(cache, states, slice(seen, seen + count))
        seen += count
        if cache.awaits_second_reading and (i + 1 == len(chunks) or chunks[i + 1] == 1):
            with cache.second_reading():
                attend(cache, states, slice(0, seen))
        yield seen, cache.run_report.statistics.plans > plans


def attend(cache, states, now):
    for layer in range(LAYERS):
        q, k, v = (x[layer, :, :, now] for x in states)
        dense = partial(torch.zeros, 1, q.shape[2], KV_HEADS * GROUP, DIM)
        out = cache.attend(layer, q, k, v, None, scaling=DIM**-0.5, dense=dense)
        assert out.isfinite().all()


@pytest.mark.parametrize("part", range(10))
def test_combinations_run_and_keep_their_budget(part, states):
    for case in sampled()[part::10]:
        recipe = build(*case)
        cache = cache_of(recipe, prompt_tokens=PROMPT)
        for seen, planned in read(cache, states, [100, 50] + [1] * STEPS):
            if planned:  # right after a plan, the cap holds
                check_budget(cache, recipe, max(seen, PROMPT), case)
        expected = {"continual": 2 + STEPS // 8, "once": 2, "late": 2}[case[4]]
        plans = cache.run_report.statistics.plans
        # Rate-distortion plans only when the budget is exceeded.
        assert plans == expected or (recipe.plan.headroom and plans < expected), case


def states_of(tokens, seed=3):
    g = torch.Generator().manual_seed(seed)
    heads = (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    return [torch.randn(LAYERS, 1, h, tokens, DIM, generator=g) * 1.5 for h in heads]


def plans_by_itself(recipe):
    """Without the model: not by reading the prompt again."""
    return recipe.plan is not None and not recipe.observer.reads_again


PLANNING = sorted(name for name in kvc.presets() if plans_by_itself(kvc.get_preset(name)))
DECODING = [name for name in PLANNING if kvc.get_preset(name).when.decode]


@pytest.mark.parametrize("budget", [96, 0.6, "112KiB"])
@pytest.mark.parametrize("preset", PLANNING)
def test_presets_keep_their_budget_after_every_event(preset, budget, states):
    recipe = kvc.get_preset(preset).with_overrides(budget=budget)
    cache = cache_of(recipe, prompt_tokens=PROMPT)
    events = 0
    for seen, planned in read(cache, states, [100, 50] + [1] * STEPS):
        if planned:
            events += 1
            check_budget(cache, recipe, max(seen, PROMPT), preset)
    assert events > 2 or preset not in DECODING or recipe.plan.headroom or recipe.when.every > STEPS


@pytest.mark.parametrize("preset", DECODING)
def test_bytes_stay_flat_in_a_long_decode(preset):
    """300 tokens at a fixed byte budget: what is allocated moves by no more than a page per row and tier."""
    recipe = kvc.get_preset(preset).with_overrides(budget="64KiB", when={"every": 16})
    cache = cache_of(recipe)
    sizes = []
    for seen, planned in read(cache, states_of(160 + 304), [160] + [1] * 304):
        if planned and seen > 160:
            sizes.append(cache.memory().total)
    layout = cache.inspect().stores[0].layout
    assert len(sizes) == 19
    assert max(sizes) - min(sizes) <= LAYERS * KV_HEADS * layout.page_bytes * len(recipe.tiers)


@pytest.mark.parametrize("budget", [1 / 4, "160KiB"])
@pytest.mark.parametrize("preset", DECODING)
def test_measured_bytes_never_exceed_the_budget(preset, budget):
    """Everything counted, tail and tables included, after the prompt and at every decode step."""
    prompt, steps = 600, 96
    recipe = kvc.get_preset(preset).with_overrides(budget=budget)
    recipe = recipe.with_overrides(when={"every": min(recipe.when.every, 32)})  # a tail of 128 alone takes as much
    cache = cache_of(recipe, prompt_tokens=prompt)
    for seen, _ in read(cache, states_of(prompt + steps), [prompt] + [1] * steps):
        allowed = parse_bytes(budget) if isinstance(budget, str) else budget * DENSE * seen
        assert cache.memory().total <= allowed, seen
    assert cache.run_report.statistics.plans > 1


@pytest.mark.parametrize("every", [4, 8])
def test_measured_bytes_never_exceed_a_small_budget(every):
    prompt, steps, budget = 2400, 160, 1 / 16
    cache = cache_of(kvc.get_preset("auto").with_overrides(budget=budget, when={"every": every}), prompt_tokens=prompt)
    for seen, _ in read(cache, states_of(prompt + steps), [prompt] + [1] * steps):
        assert cache.memory().total <= budget * DENSE * seen, seen
    assert 1 < cache.run_report.statistics.plans < cache.run_report.statistics.packings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", PLANNING)
def test_statistics_are_fp32_and_finite_in_half_precision(preset, dtype):
    recipe = kvc.get_preset(preset)
    if recipe.budget is not None:
        recipe = recipe.with_overrides(budget="48KiB")
    # Large logits: most probabilities are so small that their squares would be zero in fp16.
    states = [(x * 2).to(dtype) for x in states_of(196)]
    cache = cache_of(recipe)
    for _ in read(cache, states, [100, 60] + [1] * 36):
        pass
    store = cache.inspect().stores[0]
    for name in set(store.layout.fields) - {"position"}:
        for tier in range(len(recipe.tiers)):
            values = store.read_field(tier, name)
            assert values.dtype is torch.float32 and values.isfinite().all()


def check_budget(cache, recipe, tokens, case):
    store = cache.inspect().stores[0]
    slots = store.slots()
    assert int(store.tail_lengths.max()) == 0
    if recipe.budget is None:
        return
    amount = recipe.budget.amount
    pages = sum(int(store.pages(tier, store.lengths[tier]).sum()) for tier in range(len(recipe.tiers)))
    held = pages * store.layout.page_bytes
    if isinstance(amount, int):
        if isinstance(recipe.plan, kvc.LowestPlan):
            assert int(slots.sum()) <= amount * slots.numel(), case
            if recipe.plan.scope == "head" and not recipe.plan.pyramid:
                assert int(slots.max()) <= amount, case
        else:
            # Whole pages of the best tier: ceil(C x rows / b). Slots only move down, so at sizes this small a row
            # of a rate-distortion plan may need a page more for the tiers that it has started.
            # Where sinks lie apart, every row has a page for them.
            entry = store.layout.tiers[int(recipe.sinks_apart > 0)]
            most = -(-amount * slots.numel() // entry.slots)
            if recipe.sinks_apart or (isinstance(recipe.plan, kvc.RateDistortion) and len(recipe.tiers) > 1):
                most += slots.numel()
            assert held <= most * store.layout.page_bytes, case
    else:
        assert held <= (parse_bytes(amount) if isinstance(amount, str) else amount * tokens * DENSE), case
