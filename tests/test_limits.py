"""Odd values for every number a person may give: refused when given, by name, and nothing else changes."""

import math

import numpy as np
import pytest
import torch

import kvcompress_hf as kvc
from kvcompress_hf.observers.expected import ExpectedAttention
from kvcompress_hf.observers.per_query import PersistenceScores
from kvcompress_hf.observers.reconstruction import ReconstructionScores
from kvcompress_hf.observers.simple import Chance
from kvcompress_hf.observers.window import WindowScores
from kvcompress_hf.plans.kv_compress import PagePlan
from kvcompress_hf.plans.lowest import LowestPlan
from kvcompress_hf.plans.rate_distortion import RateDistortion
from kvcompress_hf.plans.thresholds import ThresholdPlan
from kvcompress_hf.recipe import Budget, Protect, When
from kvcompress_hf.units import parse_bytes

HUGE = 10**400
NEVER = [math.nan, math.inf, -math.inf, True, -1, "7", b"7", HUGE, -HUGE, 2**70, None, [3], np.int64(7), 3 + 0j]
NEVER_IDS = ["nan", "inf", "-inf", "True", "-1", "text", "bytes", "1e400", "-1e400", "2**70", "None", "list"]
NEVER_IDS += ["np.int64", "complex"]
WHOLE = [
    (Protect, "sinks"),
    (Protect, "recent"),
    (When, "every"),
    (WindowScores, "power"),
    (WindowScores, "pool"),
    (WindowScores, "exclude"),
    (PersistenceScores, "window"),
    (ExpectedAttention, "queries"),
    (ReconstructionScores, "chunk"),
    (Chance, "seed"),
    (LowestPlan, "protect_unsettled"),
    (RateDistortion, "small_tiers"),
]
OPTIONAL = [(WindowScores, "window"), (WindowScores, "half_life"), (When, "interval")]
REAL = [
    (ThresholdPlan, "alpha_high"),
    (ThresholdPlan, "alpha_low"),
    (LowestPlan, "floor"),
    (LowestPlan, "pyramid"),
    (PagePlan, "floor"),
    (RateDistortion, "kappa"),
    (RateDistortion, "small"),
    (RateDistortion, "headroom"),
]


@pytest.mark.parametrize("value", NEVER, ids=NEVER_IDS)
@pytest.mark.parametrize(("part", "name"), WHOLE + REAL, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_parts_of_recipes(part, name, value):
    with pytest.raises(ValueError, match=rf"{part.__name__}\.{name} is "):
        part(**{name: value})


@pytest.mark.parametrize("value", [v for v in NEVER if v is not None] + [0, 2.0])
@pytest.mark.parametrize(("part", "name"), OPTIONAL, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_optional_parts_of_recipes(part, name, value):
    with pytest.raises(ValueError, match=rf"{part.__name__}\.{name} is "):
        part(**{name: value})


@pytest.mark.parametrize("value", [2.0, 4.5])
@pytest.mark.parametrize(("part", "name"), WHOLE, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_whole_numbers_are_not_fractions(part, name, value):
    with pytest.raises(ValueError, match="integer"):
        part(**{name: value})


@pytest.mark.parametrize("value", [value for value in NEVER if value not in (-1, 2**70)])
def test_every_bias_is_a_finite_number(value):
    with pytest.raises(ValueError, match=r"PagePlan\.bias is "):
        PagePlan(bias=((0.0, value),))


@pytest.mark.parametrize("value", [*(v for v in NEVER if v is not None), 0, 100, 2**24 + 64, 2**31, 2**64])
def test_page_bytes(value):
    with pytest.raises(ValueError, match=r"page_bytes is "):
        kvc.get_preset("k8v4").with_overrides(page_bytes=value)


@pytest.mark.parametrize("value", [*(v for v in NEVER if v not in (None, "7")), 0, 0.0, 1.5, "0B", "9" * 400 + "B"])
def test_budgets(value):
    with pytest.raises((ValueError, TypeError), match="budget|more than any machine"):
        Budget(value)


@pytest.mark.parametrize(
    "text", ["9" * 400 + "B", "9" * 5000 + "TiB", "16EiB", "1e9B", "nanB", "-1B", "", "0.5B", "1 B B"]
)
def test_sizes(text):
    with pytest.raises(ValueError, match="size|byte"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["8388608TiB", "9007199254740993000B"])
def test_sizes_beyond_64_bits(text):
    with pytest.raises(ValueError, match="more than any machine"):
        parse_bytes(text)


def test_numpy_floats_become_plain():
    plan = ThresholdPlan(alpha_high=np.float64(1.5))
    assert type(plan.alpha_high) is float and type(Budget(np.float64(0.25)).amount) is float


@pytest.mark.parametrize(("depth", "reason"), ((500, "nested"), (100_000, "long")))
def test_deeply_nested_json(depth, reason):
    with pytest.raises(ValueError, match=reason):
        kvc.Recipe.from_json('{"a":' * depth + "1" + "}" * depth)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return kvc.patch(
        tiny_llama(
            eos_token_id=2, initializer_range=0.02, hidden_size=32, intermediate_size=32, head_dim=16, pad_token_id=0
        ),
        "k8v4",
    )


@pytest.mark.parametrize("value", [*(v for v in NEVER if v is not None), 0, 0.0, 1e9, "", "-1MiB", "9" * 400 + "B"])
def test_max_bytes(model, value, tmp_path):
    with pytest.raises((ValueError, TypeError), match="max_bytes|size|byte|machine"):
        kvc.CompressedPagedCache(model.config, "k8v4", max_bytes=value)
    kvc.prefill(model, torch.arange(3, 30)[None]).save(tmp_path / "cache")
    with pytest.raises((ValueError, TypeError), match="max_bytes|size|byte|machine"):
        kvc.CompressedPagedCache.load(tmp_path / "cache", model, max_bytes=value)


@pytest.mark.parametrize("value", [*(v for v in NEVER if v is not None), 0, 2.0, 2**31])
def test_prompt_tokens_and_chunk_size(model, value):
    with pytest.raises(ValueError, match="prompt_tokens is "):
        kvc.CompressedPagedCache(model.config, "auto", prompt_tokens=value)
    with pytest.raises(ValueError, match="chunk_size is "):
        kvc.prefill(model, torch.arange(3, 30)[None], chunk_size=value)
    for name in ("stride", "skip"):
        with pytest.raises(ValueError, match=f"{name} is "):
            kvc.perplexity(model, torch.arange(3, 30)[None], "k8v4", **{name: value})


def held(cache):
    return cache.get_seq_length(), cache.batch_size, [slots.tolist() for slots in cache.slots()], cache.memory().total


ODD_INDICES = [
    torch.tensor([0, 3]),
    torch.tensor([-4]),
    torch.tensor([0.0, 1.0]),
    torch.tensor([[0, 1]]),
    torch.tensor(1),
    torch.tensor([], dtype=torch.long),
    torch.tensor([True, False]),
    torch.zeros(3, dtype=torch.bool),
    torch.tensor([2**62]),
    torch.tensor([0j]),
    [0, 2**70],
    ["a"],
    None,
    math.nan,
]


@pytest.mark.parametrize("indices", ODD_INDICES, ids=str)
@pytest.mark.parametrize("method", ["batch_select_indices", "reorder_cache"])
def test_odd_indices_change_nothing(model, method, indices):
    cache = kvc.prefill(model, torch.randint(3, 64, (3, 40), generator=torch.Generator().manual_seed(0)))
    before = held(cache)
    with pytest.raises(ValueError, match="integers from -3 to 2"):
        getattr(cache, method)(indices)
    assert held(cache) == before
    model(torch.tensor([[3], [4], [5]]), past_key_values=cache)


@pytest.mark.parametrize("repeats", [0, -1, 1.5, math.nan, True, "2", None, 2**40, 10**400])
def test_odd_repeats_change_nothing(model, repeats):
    cache = kvc.prefill(model, torch.arange(3, 30)[None])
    before = held(cache)
    with pytest.raises(ValueError, match="repeats is "):
        cache.batch_repeat_interleave(repeats)
    assert held(cache) == before


@pytest.mark.parametrize("tokens", [1, 2**70, math.nan, -1.5, True, "1", None])
def test_odd_crops_change_nothing(model, tokens):
    cache = kvc.prefill(model, torch.arange(3, 30)[None])
    before = held(cache)
    with pytest.raises(ValueError, match="crop takes|tokens_to_remove is "):
        cache.crop(tokens)
    assert held(cache) == before


@pytest.mark.parametrize(
    ("indices", "same"),
    [
        (torch.tensor([-1, 0]), [2, 0]),
        (torch.tensor([True, False, True]), [0, 2]),
        ([1, 1], [1, 1]),
        (np.array([2, -3]), [2, 0]),
        (torch.tensor([2], dtype=torch.int32), [2]),
        (torch.tensor([1, 0], dtype=torch.uint8), [1, 0]),
    ],
)
def test_indices_select_as_stock_does(model, indices, same):
    ids = torch.randint(3, 64, (3, 40), generator=torch.Generator().manual_seed(0))
    cache = kvc.prefill(model, ids, "lossless")
    cache.batch_select_indices(indices)
    expected = kvc.prefill(model, ids[same], "lossless")
    new = torch.full((len(same), 1), 5)
    torch.testing.assert_close(model(new, past_key_values=cache).logits, model(new, past_key_values=expected).logits)


def test_a_pool_wider_than_any_prompt(model):
    observer = WindowScores(pool=2**31 - 1)
    recipe = kvc.get_preset("kv-compress").with_overrides(observer=observer, budget=0.5)
    cache = kvc.prefill(model, torch.arange(3, 60)[None], recipe)
    assert cache.get_seq_length() == 57


@pytest.mark.parametrize("half_life", [2**20, 2**31 - 1])
def test_a_half_life_beyond_float32_counts_every_step(model, half_life):
    """As good as none: a slot seen by more queries has the larger denominator."""
    from types import SimpleNamespace

    from kvcompress_hf.observers.base import queries_that_saw

    slots = SimpleNamespace(prompt=10, seen=110, positions=torch.tensor([[[12, 60, 109]]], dtype=torch.int32))
    plain = queries_that_saw(slots, 32)
    torch.testing.assert_close(queries_that_saw(slots, 32, 0.5 ** (1 / half_life)), plain, rtol=1e-3, atol=0)
