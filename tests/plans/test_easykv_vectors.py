"""EasyKV's own choices (vectors, part B) from real caches: recipes that reproduce them, and each defect by its name.

Attention is prescribed: query `i` is a one-hot vector that picks coordinate `i` of every key, and key `j` carries the
logit of row `i` there.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import kvcompress_hf as kvc
from kvcompress_hf.recipe import Part

VECTORS = json.loads((Path(__file__).parent / "data" / "roco_easykv_vectors.json").read_text())["B"]
LAYERS, KV_HEADS = 2, 2
MEAN, SUM, LAST = kvc.RunningScores("mean", std=True), kvc.RunningScores("sum"), kvc.RunningScores("last")


def logits(layer, head, tokens):
    """`[queries, keys]` of one query head: Z of the vectors."""
    i, j = torch.arange(tokens, dtype=torch.float64)[:, None], torch.arange(tokens, dtype=torch.float64)
    wave = torch.sin(1.3 * (i + 1) * (j + 2) + 0.7 * (head + 1) * (j + 1) + 0.31 * (layer + 1) * (i + 2))
    return 2 * wave + 1.5 * torch.cos(0.9 * (j + 1) * (layer + 1) + 0.4 * head)


def run(recipe, chunks, group=1):
    """Reads chunks through a cache; yields after each the positions kept, `[layers][kv_heads]` lists."""
    tokens = sum(chunks)
    dim = math.ceil(tokens * group / 16) * 16
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=dim * KV_HEADS * group,
        num_attention_heads=KV_HEADS * group,
        num_key_value_heads=KV_HEADS,
        head_dim=dim,
    )
    cache = kvc.CompressedPagedCache(config, recipe)
    query = torch.zeros(1, KV_HEADS * group, tokens, dim)
    keys = torch.zeros(LAYERS, 1, KV_HEADS, tokens, dim)
    for head in range(KV_HEADS * group):
        place = slice(head % group * tokens, head % group * tokens + tokens)
        query[0, head, :, place] = torch.eye(tokens)
        for layer in range(LAYERS):
            keys[layer, 0, head // group, :, place] = logits(layer, head, tokens).T.float()
    start = 0
    for count in chunks:
        part = slice(start, start + count)
        for layer in range(LAYERS):
            key = keys[layer, :, :, part]
            cache.attend(layer, query[:, :, part], key, key, None, scaling=1.0, dense=lambda: torch.zeros(1))
        start += count
        store = cache.inspect().stores[0]
        positions = store.read_field(0, "position")
        rows = [positions[r, : int(store.lengths[0, r])].tolist() for r in range(LAYERS * KV_HEADS)]
        yield [[sorted(rows[layer * KV_HEADS + h]) for h in range(KV_HEADS)] for layer in range(LAYERS)]


def evictions(recipe, chunks, group=1):
    """Positions that go, in order, of layer 0 head 0 and layer 1 head 1; and what those rows keep."""
    gone, kept, seen = ([], []), ([], []), 0
    for count, rows in zip(chunks, run(recipe, chunks, group), strict=True):
        for order, before, after in zip(gone, kept, (rows[0][0], rows[1][1]), strict=True):
            order += sorted({*before, *range(seen, seen + count)} - set(after))
            before[:] = after
        seen += count
    return gone, kept


def easykv(observer, budget, sinks, recent, unsettled=0):
    return kvc.Recipe(
        "easykv",
        observer,
        kvc.Protect(sinks, recent),
        kvc.Budget(budget),
        kvc.LowestPlan(protect_unsettled=unsettled),
        when=kvc.When(every=1),
    )


# The prompt of 4 is pinned and not in EasyKV's budget of 40: sinks 4, budget 44. Its window is int(0.3 * 40) = 12; RoCo
# protects the last 10, and int(0.3 * 40) + 1 - 10 = 3 of the highest deviation.
DECODE = {
    "recency": easykv(kvc.Recency(), 44, 4, 0),
    "tova": easykv(LAST, 44, 4, 0),
    "h2o_head": easykv(SUM, 44, 4, 12),
    "roco": easykv(MEAN, 44, 4, 10, 3),
}


@pytest.mark.parametrize("policy", DECODE)
def test_decoding_under_a_budget(policy):
    expected = VECTORS[f"decode_{policy}"]
    gone, kept = evictions(DECODE[policy], [4] + [1] * 60)
    assert gone[0] == expected["evicted_l0h0"] and gone[1] == expected["evicted_l1h1"]
    assert kept[0] == [0, 1, 2, 3, *expected["kept_l0h0"]]


@pytest.mark.parametrize("policy", ["h2o_head", "roco"])
def test_grouped_queries_are_averaged_before_squaring(policy):
    expected = VECTORS[f"gqa3_decode_{policy}"]["evicted_l0h0"]
    as_easykv = easykv(kvc.GroupMeanScores("mean", std=True), 44, 4, 10, 3) if policy == "roco" else DECODE[policy]
    assert evictions(as_easykv, [4] + [1] * 60, group=3)[0][0] == expected


@dataclass(frozen=True)
class FromFirstOverflow(kvc.RunningScores):
    """`keep_attention=False`, EasyKV's default: statistics begin with the first chunk that overflows the budget."""

    kind = "test-from-first-overflow"

    start: int = 0

    def observe(self, chunk):
        new = super().observe(chunk)
        if chunk.new.position < self.start:
            for name in self.fields:
                chunk.store.clear_field(name, chunk.layer)
            new = {name: torch.zeros_like(values) for name, values in new.items()}
        return new

    def _count(self, slots):
        return (slots.seen - slots.positions.clamp(min=self.start)).clamp(min=1).float()


@dataclass(frozen=True)
class LayerMean(kvc.RunningScores):
    """EasyKV's TOVA in prefill: the last query's attention is averaged over the KV heads of a layer."""

    kind = "test-layer-mean"

    def importance(self, slots):
        # All heads of a layer hold the same positions then, so position order aligns them.
        order = slots.positions.argsort(-1)
        ordered = super().importance(slots).gather(-1, order).unflatten(1, (LAYERS, KV_HEADS))
        mean = ordered.mean(2, keepdim=True).expand_as(ordered).flatten(1, 2)
        return torch.empty_like(mean).scatter_(-1, order, mean)


@pytest.fixture(autouse=True, scope="module")
def forget_the_test_observers():
    yield
    for observer in (FromFirstOverflow, LayerMean):
        Part._known.pop(("observer", observer.kind), None)


# L = 200, budget 0.5, stride 16: internal budget 116, so EasyKV holds 104 between chunks: more than int(0.5 * 200), and
# named as the budget here. Window int(0.1 * 116) = 11; RoCo protects the first 4, the last 10, and 120 - 101 - 14 = 5.
ENCODE = {
    "recency": lambda start: easykv(kvc.Recency(), 104, 4, 0),
    "tova": lambda start: easykv(LayerMean("last"), 104, 4, 11),
    "h2o_head": lambda start: easykv(FromFirstOverflow("sum", start=start) if start else SUM, 104, 4, 11),
    "roco": lambda start: easykv(FromFirstOverflow("mean", True, start=start) if start else MEAN, 104, 4, 10, 5),
}


@pytest.mark.parametrize("keep_attention", [0, 1])
@pytest.mark.parametrize("policy", ENCODE)
def test_prefill_under_a_budget(policy, keep_attention):
    expected = VECTORS[f"encode_{policy}_keep{keep_attention}"]
    assert expected["idx"] == 104 and expected["first_block"] == 88
    gone, kept = evictions(ENCODE[policy](0 if keep_attention else 104), [88] + [16] * 7)
    assert sorted(gone[0]) == sorted(expected["evicted_l0h0"])
    assert sorted(gone[1]) == sorted(expected["evicted_l1h1"])
    assert len(kept[0]) == 104


def test_tova_by_head_differs_from_easykvs_average_over_heads():
    gone, _ = evictions(easykv(LAST, 104, 4, 11), [88] + [16] * 7)
    assert sorted(gone[0]) != sorted(VECTORS["encode_tova_keep1"]["evicted_l0h0"])


def simulate(policy, layer, head, chunks, capacity, start, prefill, decode):
    """EasyKV's loop in plain Python for one head; `prefill` and `decode` are (sinks, recent, unsettled) of a phase."""
    z = logits(layer, head, sum(chunks))
    cached, total, squares, count, seen = [], {}, {}, {}, 0
    for length in chunks:
        for i in range(seen, seen + length):
            cached.append(i)
            total[i] = squares[i] = count[i] = 0
            last = dict(zip(cached, z[i, cached].softmax(0).tolist(), strict=True))
            if i >= start:
                for j, p in last.items():
                    total[j], squares[j], count[j] = total[j] + p, squares[j] + p * p, count[j] + 1
        seen += length
        sinks, recent, unsettled = decode if length == 1 else prefill
        excess = len(cached) - capacity
        if excess <= 0:
            continue
        scope = cached[sinks : len(cached) - recent]
        score = {"recency": lambda j: j, "tova": last.get, "roco": lambda j: total[j] / count[j]}[policy]
        if policy == "roco":
            deviation = {j: math.sqrt(max(0, squares[j] / count[j] - (total[j] / count[j]) ** 2)) for j in scope}
            scope = sorted(scope, key=lambda j: (deviation[j], j))[: max(len(scope) - unsettled, excess)]
        gone = sorted(scope, key=lambda j: (score(j), j))[:excess]
        cached = [j for j in cached if j not in gone]
    return cached


# Both at once: L = 120, budget 60, stride 24; EasyKV holds 72. RoCo: 10 unsettled in prefill, 4 while decoding.
AUTO = [24] * 5 + [1] * 20
PREFILL = {"recency": (4, 0, 0), "tova": (4, 8, 0), "roco": (4, 10, 10)}
DEFECT = {"recency": (4, 0, 0), "tova": (0, 0, 0), "roco": (0, 10, 4)}  # while decoding, sinks are not protected


@pytest.mark.parametrize("policy", PREFILL)
def test_prefill_and_decoding_under_a_budget(policy):
    """The original's numbers need its defect; without it, they are what a cache keeps."""
    arguments = (policy, 0, 0, AUTO, 72, 72, PREFILL[policy])
    assert simulate(*arguments, DEFECT[policy]) == VECTORS[f"auto_{policy}"]["kept_l0h0"]
    clean = simulate(*arguments, PREFILL[policy])
    assert clean[:4] == [0, 1, 2, 3]
    observer = {"recency": kvc.Recency(), "tova": LAST, "roco": FromFirstOverflow("mean", True, start=72)}[policy]
    sinks, recent, unsettled = PREFILL[policy]
    _, kept = evictions(easykv(observer, 72, sinks, recent, unsettled), AUTO)
    assert kept[0] == clean
    if policy != "recency":
        assert clean != VECTORS[f"auto_{policy}"]["kept_l0h0"]


def test_nothing_protected_leaks_at_small_budgets():
    """B4: at a budget of 29 EasyKV evicts 52 of 124 times inside its protected last 10; here never."""
    recipe = easykv(MEAN, 4 + 29, 4, 10, int(0.3 * 29) + 1)
    seen, before = 0, [[[] for _ in range(KV_HEADS)] for _ in range(LAYERS)]
    for count, rows in zip([4] + [1] * 60, run(recipe, [4] + [1] * 60), strict=True):
        seen += count
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                gone = set(before[layer][head]) - set(rows[layer][head])
                assert all(position < seen - 10 for position in gone)
                assert len(rows[layer][head]) <= 33
        before = rows
