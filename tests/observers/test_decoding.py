"""TriAttention and R-KV: what they keep is what dense loops over the papers' formulas would keep, from the model's own
projections; and what is remembered of queries lives the life of the cache."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument
from kvcompress_hf.observers import Look
from kvcompress_hf.paging.key_turn import Rotation, turn
from kvcompress_hf.paging.queries import Queries, band_norms
from kvcompress_hf.runtime.past import Past

HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 16, 2
GROUP = HEADS // KV_HEADS
FREQUENCIES = 10000.0 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
SIZES = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, head_dim=DIM)


@pytest.fixture
def model():
    torch.manual_seed(3)
    config = LlamaConfig(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rope_theta=10000.0, **SIZES)
    return LlamaForCausalLM(config).eval()


def read(model, ids, mask, recipe, decoded):
    """A cache that has read a prompt and then tokens one by one; and the projections of all tokens, by layer:
    queries and keys before rotary embedding, `[batch, tokens, heads, head_dim]`."""
    heard = {f"{what}{layer}": [] for what in "qk" for layer in range(LAYERS)}
    hooks = []
    for layer, block in enumerate(model.model.layers):
        for what, module in (("q", block.self_attn.q_proj), ("k", block.self_attn.k_proj)):
            into = heard[f"{what}{layer}"]
            hooks.append(module.register_forward_hook(lambda _, __, out, into=into: into.append(out.detach())))
    tokens = ids.shape[1]
    prompt = tokens - decoded
    with kvc.patched(model, recipe), torch.no_grad():
        kvc.prefill(model, ids[:1, :4], recipe)  # how position turns queries is learnt by a pass of its own
        for each in heard.values():
            each.clear()
        cache = kvc.prefill(model, ids[:, :prompt], recipe, attention_mask=mask[:, :prompt])
        for at in range(prompt, tokens):
            model(
                ids[:, at : at + 1],
                attention_mask=mask[:, : at + 1],
                position_ids=mask[:, : at + 1].sum(1, keepdim=True) - 1,
                use_cache=True,
                **as_argument(model, cache),
            )
    for hook in hooks:
        hook.remove()
    joined = {name: torch.cat(parts, dim=1).unflatten(-1, (-1, DIM)).double() for name, parts in heard.items()}
    return cache, joined


def kept_positions(cache, layer, sequence, head):
    """Positions that a row holds, ascending."""
    (store,) = cache.inspect().stores
    return store.positions()[(layer * store.batch + sequence) * KV_HEADS + head].tolist()


def bands(vector):
    """The pairs of Llama's channels as complex numbers."""
    return [complex(vector[i], vector[i + DIM // 2]) for i in range(DIM // 2)]


def triattention_scores(queries, keys, offsets):
    """The paper's formulas word by word, for one KV head: `queries` `[group, tokens, head_dim]` and `keys`
    `[tokens, head_dim]` before rotary embedding; the newest query is the last token's."""
    tokens = keys.shape[0]
    of_heads = []
    for head in queries:
        rows = [bands(query) for query in head]
        mean = [sum(row[f] for row in rows) / tokens for f in range(DIM // 2)]
        mean_norm = [sum(abs(row[f]) for row in rows) / tokens for f in range(DIM // 2)]
        scores = []
        for place, key in enumerate(keys):
            k, total = bands(key), 0.0
            for offset in range(offsets + 1):
                distance = tokens - 1 + 2**offset - place
                for f in range(DIM // 2):
                    angle = math.atan2(mean[f].imag, mean[f].real) - math.atan2(k[f].imag, k[f].real)
                    total += abs(mean[f]) * abs(k[f]) * math.cos(float(FREQUENCIES[f]) * distance + angle)
            series = total / (offsets + 1)
            norms = sum((1 - abs(mean[f]) / mean_norm[f]) * mean_norm[f] * abs(k[f]) for f in range(DIM // 2))
            scores.append(series + norms)
        scores = torch.tensor(scores, dtype=torch.float64)
        of_heads.append((scores - scores.mean()) / scores.std(unbiased=False))
    return torch.stack(of_heads).amax(0)


def rkv_scores(queries, keys, window, weight, pool, threshold):
    """R-KV for one KV head, in loops: `queries` `[group, tokens, head_dim]` and `keys` `[tokens, head_dim]`, turned."""
    tokens = keys.shape[0]
    older = tokens - window
    importance = torch.zeros(tokens, dtype=torch.float64)
    for at in range(older, tokens):
        logits = torch.stack([query[at] @ keys.T / DIM**0.5 for query in queries]).amax(0)
        importance[:older] += logits[:older].softmax(0) / window
    pooled = torch.stack([importance[max(0, j - pool // 2) : j + pool // 2 + 1].max() for j in range(tokens)])
    unit = keys / keys.norm(dim=-1, keepdim=True)
    alike = unit @ unit.T
    for i in range(tokens):
        alike[i, i] = 0
        near = [j for j in range(tokens) if j != i and alike[i, j] > threshold]
        if near:
            alike[i, near[-1]] = 0  # the most recent of the near-duplicates is not redundant
    redundancy = alike.mean(0).softmax(0)
    return weight * pooled - (1 - weight) * redundancy


def padded(tokens=(40, 29), seed=0):
    ids = torch.randint(3, 64, (len(tokens), max(tokens)), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, count in enumerate(tokens):
        mask[row, : max(tokens) - count] = 0
    return ids, mask


def turned(states):
    """`[tokens, ..., head_dim]` as rotary embedding leaves them."""
    at = torch.arange(states.shape[0])
    return turn(states, at if states.dim() == 2 else at[:, None], FREQUENCIES.float()).double()


CASES = [
    (kvc.QueryCentres(), kvc.Protect(), 8),
    (kvc.QueryCentres(offsets=3), kvc.Protect(), 0),
    (kvc.RedundancyAware(), kvc.Protect(recent=8), 8),
    (kvc.RedundancyAware(window=4, weight=0.6, pool=3, threshold=0.1), kvc.Protect(recent=4), 0),
]


@pytest.mark.parametrize("observer, protect, decoded", CASES, ids=str)
def test_it_keeps_what_the_formulas_keep(model, observer, protect, decoded):
    """One plan at the end, over a prompt and what was decoded after it; padded, grouped queries."""
    lengths = (40, 29)
    ids, mask = padded(lengths)
    left = 20
    recipe = kvc.Recipe(
        "formulas",
        observer=observer,
        protect=protect,
        budget=kvc.Budget(left),
        plan=kvc.LowestPlan(),
        when=kvc.When(every=max(decoded, 1), prefill=not decoded),
    )
    cache, heard = read(model, ids, mask, recipe, decoded)
    for layer in range(LAYERS):
        for row, count in enumerate(lengths):
            first = ids.shape[1] - count
            queries, keys = (heard[f"{what}{layer}"][row, first:] for what in "qk")
            for head in range(KV_HEADS):
                mine = queries[:, head * GROUP : (head + 1) * GROUP]
                if isinstance(observer, kvc.QueryCentres):
                    scores = triattention_scores(mine.transpose(0, 1), keys[:, head], observer.offsets)
                else:
                    settings = (observer.window, observer.weight, observer.pool, observer.threshold)
                    scores = rkv_scores(turned(mine).transpose(0, 1), turned(keys[:, head]), *settings)
                scores[count - protect.recent :] = math.inf
                best = (scores.topk(left).indices.sort().values + first).tolist()
                assert kept_positions(cache, layer, row, head) == best


# -- what is remembered of queries ------------------------------------------------------------------------------------

ROTATIONS = {
    "llama": Rotation(FREQUENCIES.float()),
    "interleaved": Rotation(FREQUENCIES.float(), interleaved=True),
    "partial": Rotation(FREQUENCIES.float()[:3], start=4),
    "partial, interleaved": Rotation(FREQUENCIES.float()[:3], start=DIM - 6, interleaved=True),
    "backwards": Rotation(-FREQUENCIES.float()),
    "none": Rotation(torch.zeros(0)),
    "unknown": None,
}


def pairs_of(rotation):
    """The channels of each pair, and the channels that have no partner."""
    width = 0 if rotation is None else rotation.width
    start = 0 if rotation is None else rotation.start
    half = width // 2
    if width and rotation.interleaved:
        pairs = [(start + 2 * i, start + 2 * i + 1) for i in range(half)]
    else:
        pairs = [(start + i, start + i + half) for i in range(half)]
    return pairs, [i for i in range(DIM) if not start <= i < start + width]


def turned_by(vector, by, rotation):
    """One vector rotated on, pair by pair."""
    result = vector.double().clone()
    for (i, j), frequency in zip(pairs_of(rotation)[0], [] if rotation is None else rotation.inv_freq, strict=True):
        spun = complex(vector[i], vector[j]) * complex(math.cos(by * frequency), math.sin(by * frequency))
        result[i], result[j] = spun.real, spun.imag
    return result


def norms_of(vector, rotation):
    pairs, alone = pairs_of(rotation)
    return [math.hypot(vector[i], vector[j]) for i, j in pairs] + [abs(float(vector[i])) for i in alone]


def memory_after(chunks, rotation, newest, head_dim=DIM):
    """A store's memory of the queries in chunks `(query, valid)` of one layer."""
    config = LlamaConfig(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, **SIZES)
    cache = kvc.CompressedPagedCache(config, "k8v8")
    key = torch.zeros((2, KV_HEADS, 1, head_dim))
    cache.attend(0, torch.zeros((2, HEADS, 1, head_dim)), key, key, None, scaling=1.0, dense=lambda: key)
    memory = cache.inspect().stores[0].queries
    for query, valid in chunks:
        memory.add(1, query, valid, rotation, centres=True, newest=newest)
    return memory.of(1, rotation)


@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
def test_centres_are_the_means_of_queries_at_position_zero(rotation):
    g = torch.Generator().manual_seed(5)
    lengths, newest = [5, 1, 2, 1], 4
    chunks, real = [], [[], []]
    for tokens in lengths:
        query = torch.randn((2, HEADS, tokens, DIM), generator=g)
        valid = torch.ones((2, tokens), dtype=torch.bool)
        valid[1, : tokens - 1] = False  # the second sequence has one real token per chunk
        query[1, :, : tokens - 1] = torch.nan
        chunks.append((query, valid if tokens > 1 else None))
        for row in range(2):
            real[row] += list(query[row].transpose(0, 1)[valid[row]])
    found = memory_after(chunks, rotation, newest)
    assert found.seen.tolist() == [len(real[0]), len(real[1])] == [9, 4]
    for row, tokens in enumerate(real):
        for head in range(HEADS):
            at_zero = [turned_by(query[head], -place, rotation) for place, query in enumerate(tokens)]
            where = (row, head // GROUP, head % GROUP)
            torch.testing.assert_close(found.centre[where], torch.stack(at_zero).mean(0).float(), atol=1e-5, rtol=1e-5)
            norms = torch.tensor([norms_of(query, rotation) for query in at_zero]).mean(0)
            torch.testing.assert_close(found.norms[where], norms, atol=1e-5, rtol=1e-5)
            last = torch.stack([query[head] for query in tokens[-newest:]])
            assert torch.equal(found.newest[where], last)


def test_a_long_chunk_counts_as_its_tokens_one_by_one():
    rotation, g = ROTATIONS["llama"], torch.Generator().manual_seed(6)
    query = torch.randn((2, HEADS, 2100, DIM), generator=g)
    whole, parts = (
        memory_after([(query, None)], rotation, 3),
        memory_after(
            [(part, torch.ones((2, part.shape[2]), dtype=torch.bool)) for part in query.split(300, dim=2)], rotation, 3
        ),
    )
    assert whole.seen.tolist() == parts.seen.tolist() == [2100, 2100]
    torch.testing.assert_close(whole.centre, parts.centre, atol=1e-5, rtol=1e-4)
    assert torch.equal(whole.newest, parts.newest)


@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
def test_expected_logits_are_means_over_past_queries_at_coming_positions(rotation):
    """The trigonometric series is what the queries so far would give if they stood where the next ones will."""
    g = torch.Generator().manual_seed(7)
    seen, slots, offsets = 6, 5, 3
    past = torch.randn((GROUP, seen, DIM), generator=g).double()  # at position 0
    keys = torch.randn((slots, DIM), generator=g).double()  # as stored
    of_heads = []
    for head in past:
        centre = head.mean(0)
        norms = torch.tensor([norms_of(query, rotation) for query in head]).mean(0)
        scores = []
        for key in keys:
            given = [
                turned_by(query, seen - 1 + 2**step, rotation) @ key for query in head for step in range(offsets + 1)
            ]
            scattered = [
                (mean - at) * k
                for mean, at, k in zip(norms, norms_of(centre, rotation), norms_of(key, rotation), strict=True)
            ]
            scores.append(float(sum(given) / len(given) + sum(scattered)))
        scores = torch.tensor(scores)
        of_heads.append((scores - scores.mean()) / scores.std(unbiased=False))
    expected = torch.stack(of_heads).amax(0)

    filled = torch.tensor([True] * slots + [False])[None, None]
    stored = torch.cat([keys.float(), torch.full((1, DIM), 1e4)])[None, None]
    mean_norms = torch.stack([torch.tensor([norms_of(q, rotation) for q in head]).mean(0) for head in past])
    queries = Queries(torch.tensor([seen]), past.mean(1)[None, None].float(), mean_norms[None, None], None)
    look = Look(stored, torch.arange(slots + 1)[None, None].int(), filled, queries, None, rotation)
    found = kvc.QueryCentres(offsets=offsets).look(look)["score"][0, 0, :slots]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert band_norms(keys, rotation).shape == (slots, DIM - (0 if rotation is None else rotation.width // 2))


# -- the life of a cache ----------------------------------------------------------------------------------------------

PRESETS = ["r-kv", "triattention", "think"]


def decoding_recipe(name):
    return kvc.get_preset(name).with_overrides(budget="24KiB", when={"every": 8}, page_bytes=None)


def tokens_after(model, cache, ids, count=40):
    """Greedy tokens, and what the rows then hold."""
    found = []
    for _ in range(count):
        ids = model(ids, use_cache=True, **as_argument(model, cache)).logits[:, -1:].argmax(-1)
        found.append(ids)
    return torch.cat(found, dim=1), [s.tolist() for s in cache.inspect().stores[0].positions()]


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_forks_files_and_chosen_sequences_go_on_as_the_cache_would(model, name, tmp_path):
    recipe = decoding_recipe(name)
    ids, _ = padded((70, 70), seed=2)
    with kvc.patched(model, recipe):
        cache = kvc.prefill(model, ids, recipe)
        tokens_after(model, cache, ids[:, -1:], 13)
        fork = cache.fork()
        cache.save(tmp_path / "file")
        loaded = kvc.CompressedPagedCache.load(tmp_path / "file", model)
        swapped = cache.fork()
        swapped.reorder_cache(torch.tensor([1, 0, 1]))
        plans = cache.run_report.statistics.plans
        expected, held = tokens_after(model, cache, ids[:, -1:])
        assert cache.run_report.statistics.plans > plans + 3
        for other in (fork, loaded):
            tokens, positions = tokens_after(model, other, ids[:, -1:])
            assert torch.equal(tokens, expected) and positions == held
        tokens, _ = tokens_after(model, swapped, ids[[1, 0, 1], -1:])
        assert torch.equal(tokens, expected[[1, 0, 1]])


def stop(past):
    raise MemoryError("simulated")


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_a_step_that_fails_leaves_no_trace(model, name, monkeypatch):
    recipe = decoding_recipe(name)
    ids, _ = padded((70, 70), seed=2)
    with kvc.patched(model, recipe):
        cache = kvc.prefill(model, ids, recipe)
        twin = cache.fork()
        tensors = cache.inspect().stores[0].tensors.values
        before = {name: values.clone() for name, values in tensors.items() if "quer" in name}
        assert len(before) > 1
        with monkeypatch.context() as context:
            context.setattr(Past, "_end_forward", stop)
            with pytest.raises(MemoryError, match="simulated"):
                model(ids[:, -1:], use_cache=True, **as_argument(model, cache))
        tensors = cache.inspect().stores[0].tensors.values
        assert all(torch.equal(values, tensors[name]) for name, values in before.items())
        tokens, held = tokens_after(model, cache, ids[:, -1:])
        tokens_of_twin, held_by_twin = tokens_after(model, twin, ids[:, -1:])
        assert torch.equal(tokens, tokens_of_twin) and held == held_by_twin


def test_think_keeps_the_first_tokens_native_and_all_others_in_four_bits(model):
    recipe = decoding_recipe("think")
    ids, _ = padded((120, 120), seed=4)
    with kvc.patched(model, recipe):
        cache = kvc.prefill(model, ids, recipe)
        (store,) = cache.inspect().stores
        assert store.lengths[0].tolist() == [4] * store.lengths.shape[1]
        assert store.read_field(0, "position").tolist() == [[0, 1, 2, 3]] * store.lengths.shape[1]
        assert int(store.lengths[1].min()) >= 16 and int(store.lengths[1].sum()) < 116 * store.lengths.shape[1]


def test_layers_with_other_numbers_of_query_heads_are_refused():
    config = LlamaConfig(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, **SIZES)
    cache = kvc.CompressedPagedCache(config, "triattention")
    key = torch.zeros((1, KV_HEADS, 2, DIM))
    cache.attend(0, torch.zeros((1, 4, 2, DIM)), key, key, None, scaling=1.0, dense=lambda: key)
    with pytest.raises(kvc.UnsupportedFeatureError, match="has 3 query heads per KV head and another 2"):
        cache.attend(1, torch.zeros((1, 6, 2, DIM)), key, key, None, scaling=1.0, dense=lambda: key)


@pytest.mark.parametrize(
    "made, said",
    [
        (lambda: kvc.QueryCentres(offsets=-1), "offsets"),
        (lambda: kvc.RedundancyAware(window=0), "window"),
        (lambda: kvc.RedundancyAware(pool=4), "odd"),
        (lambda: kvc.RedundancyAware(weight=1.5), "weight"),
        (lambda: kvc.RedundancyAware(threshold=2.0), "threshold"),
    ],
)
def test_values_out_of_range_are_refused(made, said):
    with pytest.raises(ValueError, match=said):
        made()
