"""Observers against attention computed densely in plain torch."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

import kvcompress_hf as kvc
from kvcompress_hf.kernels import Logits
from kvcompress_hf.observers import Chunk, NewTokens
from kvcompress_hf.paging.slots import Slots

BATCH, KV_HEADS, GROUP, DIM = 2, 2, 3, 16
SCALE = DIM**-0.5


def attend(cache, query, key, value):
    """One chunk through both layers of a cache, both with the same states."""
    for layer in range(2):
        cache.attend(layer, query, key, value, None, scaling=SCALE, dense=lambda: torch.zeros(1))


def states(tokens, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, heads, tokens, DIM, generator=g) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)]


def probabilities(query, key, first):
    """`[batch, kv_heads, group, queries, keys]` of queries at positions `first`, `first + 1`, ..."""
    q = query.unflatten(1, (KV_HEADS, GROUP))
    logits = q @ key[:, :, None].transpose(-1, -2) * SCALE
    seen = torch.arange(key.shape[2]) <= torch.arange(first, first + query.shape[2])[:, None]
    return logits.masked_fill(~seen, -torch.inf).softmax(-1)


def stored(cache, field):
    """A field of layer 1 in position order, `[batch, kv_heads, slots]`."""
    store = cache.inspect().stores[0]
    positions = store.read_field(0, "position").view(2, BATCH, KV_HEADS, -1)[1]
    values = store.read_field(0, field).view(2, BATCH, KV_HEADS, -1)[1]
    return values.gather(-1, positions.long().argsort(dim=-1))


def cache_with(observer, heads=KV_HEADS, group=GROUP, **parts):
    shape = dict(hidden_size=96, num_attention_heads=heads * group, num_key_value_heads=heads, head_dim=DIM)
    config = LlamaConfig(num_hidden_layers=2, **shape)
    when = kvc.When(every=8, decode=observer.scores_decoded)
    recipe = kvc.Recipe(observer=observer, budget=kvc.Budget(10**6), plan=kvc.LowestPlan(), when=when, **parts)
    return kvc.CompressedPagedCache(config, recipe)


@pytest.fixture
def make_slots_of():
    def make(group, **fields):
        """One slot that three queries of a prompt have seen."""
        shape = (1, 1, 1)
        return Slots(
            fields={name: value.view(shape) for name, value in fields.items()},
            positions=torch.zeros(shape, dtype=torch.int32),
            filled=torch.ones(shape, dtype=torch.bool),
            tier=torch.zeros(1, dtype=torch.int64),
            layer_of_row=torch.zeros(1, dtype=torch.int64),
            group=torch.tensor([group]),
            seen=3,
            prompt=3,
        )

    return make


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("pool", [1, 7])
@pytest.mark.parametrize("chunks", [(50,), (30, 20), (5, 40, 5)])
def test_window_scores_are_those_of_the_last_queries(power, pool, chunks):
    query, key, value = states(sum(chunks), 0)
    window = 12
    cache = cache_with(kvc.WindowScores(window=window, power=power, pool=pool))
    start = 0
    for count in chunks:
        part = slice(start, start + count)
        attend(cache, query[:, :, part], key[:, :, part], value[:, :, part])
        start += count
    observing = min(window, chunks[-1])
    p = probabilities(query[:, :, -observing:], key, start - observing)
    scores = p.pow(power).sum(3)  # over the observing queries
    pooled = F.max_pool1d(scores.flatten(0, 1), pool, 1, pool // 2).view_as(scores)
    torch.testing.assert_close(stored(cache, "score"), pooled.sum(2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunks", [(40,), (25, 15)])
def test_decode_steps_add_their_probabilities(chunks):
    prompt, steps = sum(chunks), 8
    query, key, value = states(prompt + steps, 1)
    cache = cache_with(kvc.RunningScores("mean", std=True))
    start = 0
    for count in (*chunks, *[1] * steps):
        part = slice(start, start + count)
        attend(cache, query[:, :, part], key[:, :, part], value[:, :, part])
        start += count
    p = probabilities(query, key, 0)
    torch.testing.assert_close(stored(cache, "sum"), p.sum((2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stored(cache, "square"), p.square().sum((2, 3)), atol=1e-4, rtol=1e-4)


def test_the_value_factor_and_key_direction_follow_from_keys_and_values():
    query, key, value = states(40, 2)
    cache = cache_with(kvc.WindowScores(value=True))
    attend(cache, query, key, value)
    expected = (value - value.mean(2, keepdim=True)).square().sum(-1)
    torch.testing.assert_close(stored(cache, "value"), expected, atol=1e-4, rtol=1e-4)
    cache = cache_with(kvc.KeyDiff())
    attend(cache, query, key, value)
    expected = -F.cosine_similarity(key, key.mean(2, keepdim=True).expand_as(key), dim=-1)
    torch.testing.assert_close(stored(cache, "score"), expected, atol=1e-4, rtol=1e-4)


def test_the_last_query_alone_counts_for_tova():
    query, key, value = states(48, 3)
    cache = cache_with(kvc.RunningScores("last"))
    attend(cache, query[:, :, :40], key[:, :, :40], value[:, :, :40])
    torch.testing.assert_close(stored(cache, "sum"), probabilities(query[:, :, 39:40], key[:, :, :40], 39).sum((2, 3)))
    for i in range(40, 48):
        attend(cache, query[:, :, i : i + 1], key[:, :, i : i + 1], value[:, :, i : i + 1])
    last = probabilities(query[:, :, 47:], key, 47).sum((2, 3))
    torch.testing.assert_close(stored(cache, "sum"), last, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunks", [(40,), (25, 15)])
@pytest.mark.parametrize("count", ["below", "above"])
def test_persistence_counts_queries_against_the_uniform_attention(chunks, count):
    window, steps = 10, 8
    query, key, value = states(sum(chunks) + steps, 4)
    cache = cache_with(kvc.PersistenceScores(window, count))
    expected = torch.zeros(BATCH, KV_HEADS, sum(chunks) + steps)
    start = 0
    for tokens in (*chunks, *[1] * steps):
        part = slice(start, start + tokens)
        attend(cache, query[:, :, part], key[:, :, part], value[:, :, part])
        for i in range(start + max(0, tokens - window), start + tokens):
            p = probabilities(query[:, :, i : i + 1], key[:, :, : i + 1], i)[:, :, :, 0]
            votes = (p > 1 / (i + 1)).float() if count == "above" else -(p < 1 / (i + 1)).float()
            expected[..., : i + 1] += votes.sum(2) if i else 0  # the first query gives all to itself, just 1/n
        start += tokens
    assert torch.equal(stored(cache, "count"), expected)


def test_persistence_of_the_published_matrix():
    """`count_above_uniform` of the RoCo vectors, part A: attention prescribed through one-hot queries."""
    vectors = json.loads((Path(__file__).parents[1] / "plans" / "data" / "roco_easykv_vectors.json").read_text())["A"]
    attention = torch.tensor(vectors["A_percent"]) / 100
    # Query i picks coordinate i of every key; key j carries the logit of row i there.
    key = torch.zeros(1, 1, 10, 16)
    key[0, 0, :, :10] = attention.clamp(min=1e-12).log().T
    query = torch.eye(10, 16)[None, None]
    cache = cache_with(kvc.PersistenceScores(count="above"), heads=1, group=1)
    for layer in range(2):
        cache.attend(layer, query, key, key, None, scaling=1.0, dense=lambda: torch.zeros(1))
    store = cache.inspect().stores[0]
    assert store.read_field(0, "count")[0].tolist() == vectors["count_above_uniform"]


def test_group_means_are_taken_before_squaring():
    query, key, value = states(30, 5)
    cache = cache_with(kvc.GroupMeanScores("mean", std=True))
    start = 0
    for tokens in (12, 10, *[1] * 8):
        part = slice(start, start + tokens)
        attend(cache, query[:, :, part], key[:, :, part], value[:, :, part])
        start += tokens
    p = probabilities(query, key, 0).mean(2)
    torch.testing.assert_close(stored(cache, "sum"), p.sum(2), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(stored(cache, "square"), p.square().sum(2), atol=1e-5, rtol=1e-4)


def test_heads_that_disagree_look_settled_to_a_group_mean(make_slots_of):
    """Two heads with 0.8, 0, 0.4 and 0, 0.8, 0.4: no deviation of the mean, 0.327 per head."""
    heads = torch.tensor([[0.8, 0.0, 0.4], [0.0, 0.8, 0.4]])
    mean = heads.mean(0)
    slots = make_slots_of(sum=heads.sum(), square=heads.square().sum(), group=2)
    assert float(kvc.RunningScores("mean", std=True).spread(slots)) == pytest.approx(0.327, abs=1e-3)
    slots = make_slots_of(sum=mean.sum(), square=mean.square().sum(), group=2)
    assert float(kvc.GroupMeanScores("mean", std=True).spread(slots)) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("chunks", [(50,), (30, 20)])
@pytest.mark.parametrize(
    ("covariance", "value_norm", "epsilon"), [(True, True, 0), (True, True, 0.01), (False, False, 0)]
)
def test_expected_attention_is_the_mean_over_normal_queries(chunks, covariance, value_norm, epsilon):
    query, key, value = states(50, 6)
    cache = cache_with(kvc.ExpectedAttention(queries=16, covariance=covariance, value=value_norm, epsilon=epsilon))
    start = 0
    for tokens in chunks:
        part = slice(start, start + tokens)
        attend(cache, query[:, :, part], key[:, :, part], value[:, :, part])
        start += tokens
    last = query[:, :, -16:].unflatten(1, (KV_HEADS, GROUP)).double()
    logits = torch.zeros(BATCH, KV_HEADS, GROUP, 50, dtype=torch.float64)
    for b in range(BATCH):
        for h in range(KV_HEADS):
            for g in range(GROUP):
                mean, spread = last[b, h, g].mean(0), torch.cov(last[b, h, g].T, correction=0)
                for j in range(50):
                    k = key[b, h, j].double()
                    logits[b, h, g, j] = SCALE * k @ mean + (SCALE**2 / 2 * k @ spread @ k if covariance else 0)
    expected = logits.softmax(-1).mean(2)
    if value_norm:
        expected = (expected + epsilon) * value.double().norm(dim=-1)
    torch.testing.assert_close(stored(cache, "score"), expected.float(), atol=1e-6, rtol=1e-4)


def test_expected_attention_agrees_with_drawn_queries():
    """The formula against the mean attention of many queries really drawn; it neglects how the denominator varies."""
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(DIM, generator=g)
    query = (mean + torch.randn(1, 1, 20_000, DIM, generator=g)).expand(BATCH, KV_HEADS * GROUP, -1, -1)
    key = torch.randn(1, 1, 40, DIM, generator=g).expand(BATCH, KV_HEADS, -1, -1) * 0.5
    drawn = (query[0, 0] @ key[0, 0].T * SCALE).softmax(-1).mean(0)
    cache = cache_with(kvc.ExpectedAttention(queries=40, value=False))
    attend(cache, query[:, :, :40], key, key)
    got = stored(cache, "score")[0, 0]
    assert torch.corrcoef(torch.stack([got, drawn]))[0, 1] > 0.95


@pytest.mark.parametrize("exclude", [1, 10])
def test_the_full_range_leaves_out_the_nearest_queries(exclude):
    """KV-Compress' full variant: every query counts for keys that are `exclude` or more positions back."""
    query, key, value = states(60, 7)
    cache = cache_with(kvc.WindowScores(window=None, power=2, pool=1, exclude=exclude))
    attend(cache, query, key, value)
    distance = torch.arange(60)[:, None] - torch.arange(60)
    p = torch.where(distance >= exclude, probabilities(query, key, 0), 0.0)
    torch.testing.assert_close(stored(cache, "score"), p.square().sum((2, 3)), atol=1e-5, rtol=1e-4)


def test_maxima_over_the_group_go_on_in_decode():
    query, key, value = states(48, 8)
    cache = cache_with(kvc.WindowScores(window=12, power=1, pool=1, group="max"))
    attend(cache, query[:, :, :40], key[:, :, :40], value[:, :, :40])
    for i in range(40, 48):
        attend(cache, query[:, :, i : i + 1], key[:, :, i : i + 1], value[:, :, i : i + 1])
    p = probabilities(query, key, 0)
    expected = p[:, :, :, 28:40].sum(3).amax(2) + p[:, :, :, 40:].amax(2).sum(2)  # as LeanKV's code in both phases
    torch.testing.assert_close(stored(cache, "score"), expected, atol=1e-5, rtol=1e-4)


def test_scores_fade_by_half_lives_and_so_do_their_counts(make_slots_of):
    query, key, value = states(64, 9)
    cache = cache_with(kvc.WindowScores(window=8, power=1, pool=1, mean=True, half_life=4))
    attend(cache, query[:, :, :40], key[:, :, :40], value[:, :, :40])
    for i in range(40, 64):
        attend(cache, query[:, :, i : i + 1], key[:, :, i : i + 1], value[:, :, i : i + 1])
    p = probabilities(query, key, 0).sum(2)
    # Packed every 8 steps, so each block of steps has faded by a quarter for every packing since, its own included.
    blocks = [p[:, :, 40 + 8 * b : 48 + 8 * b].sum(2) / 4 ** (3 - b) for b in range(3)]
    expected = p[:, :, 32:40].sum(2) / 64 + sum(blocks)
    torch.testing.assert_close(stored(cache, "score"), expected, atol=1e-5, rtol=1e-4)
    slots = make_slots_of(score=torch.tensor(1.0), group=1)
    slots = replace(slots, seen=19, prompt=3)  # three queries of the prompt, then 16 steps
    mean = kvc.WindowScores(window=8, power=1, mean=True, half_life=4).importance(slots)
    assert float(mean) == pytest.approx(1 / (3 / 16 + sum(0.5 ** (age / 4) for age in range(16))))


def test_names_that_chunks_had_in_0_1_still_work_and_warn():
    query, key, value = states(5, seed=0)
    new = NewTokens(query, key, value, Logits(0.5, softcap=3.0, window=4), position=7)
    chunk = Chunk(store=None, layer=0, new=new)
    then = {"query": query, "keys": key, "values": value, "position": 7, "valid": None}
    for name, wanted in {**then, "scale": 0.5, "softcap": 3.0, "window": 4, "sinks": None}.items():
        with pytest.warns(DeprecationWarning, match=rf"chunk\.{name} is now chunk\.new\."):
            assert getattr(chunk, name) is wanted
    with pytest.raises(AttributeError, match="'Chunk' object has no attribute 'tokens'"):
        getattr(chunk, "tokens")  # noqa: B009
