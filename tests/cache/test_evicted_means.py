"""Recipes with evicted="mean": what a cache attends to, and that the means live as long as it does."""

import dataclasses
import json

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import kvcompress_hf as kvc
from kvcompress_hf.io.container import StoredFile
from kvcompress_hf.kernels.quantize import hadamard

LAYERS, HEADS, KV_HEADS, DIM, EVERY = 2, 4, 2, 16, 4
GROUP = HEADS // KV_HEADS
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM, hidden_size=64
)


def recipe(preset, **changes):
    changes = {"when": {"every": EVERY}, "evicted": "mean", **changes}
    return kvc.get_preset(preset).with_overrides(**changes)


RECIPES = {
    "h2o": recipe("h2o", budget=24, protect={"recent": 4}),
    "kv-compress": recipe("kv-compress", budget=0.4, protect={"recent": 4}),
    "snapkv": recipe("snapkv", budget=20, protect={"recent": 4}),
    "think": recipe("think", budget=0.5, tiers=("native",)),
    "streaming": recipe("streaming", budget=16),
    "auto": recipe("auto", budget=0.4, protect={"recent": 4}, tiers=("k8v8", "k8v4", "k4v4")),
}
#: Squared errors that tiers may leave, as a share of what attention gives.
LOSES = {"auto": 0.03}


class Past:
    """Every key and value that a cache was ever given, and what it should attend to: the oracle."""

    def __init__(self, cache, batch=2, pads=None):
        self.cache, self.batch, self.pads = cache, batch, pads or [0] * batch
        self.keys = [torch.zeros(batch, KV_HEADS, 0, DIM) for _ in range(LAYERS)]
        self.values = [torch.zeros(batch, KV_HEADS, 0, DIM) for _ in range(LAYERS)]

    def output(self, layer, q, kept):
        """Softmax over what is kept and, as often as slots were evicted, their mean; new tokens see those before."""
        batch, _, new, _ = q.shape
        out = torch.zeros(batch, new, HEADS, DIM, dtype=torch.float64)
        total = self.keys[layer].shape[2]
        for b in range(batch):
            for h in range(KV_HEADS):
                k, v = self.keys[layer][b, h].double(), self.values[layer][b, h].double()
                past = torch.tensor(kept[layer, b, h], dtype=torch.int64)
                gone = sorted(set(range(self.pads[b], total - new)) - set(past.tolist()))
                mean = [x[gone].mean(0, keepdim=True).expand(len(gone), -1) for x in (k, v)]
                for t in range(new):
                    seen = torch.cat([past, torch.arange(total - new, total - new + t + 1)])
                    seen = seen[seen >= self.pads[b]]
                    keys, values = torch.cat([k[seen], mean[0]]), torch.cat([v[seen], mean[1]])
                    weight = (q[b, h * GROUP : (h + 1) * GROUP, t].double() @ keys.T * DIM**-0.5).softmax(-1)
                    out[b, t, h * GROUP : (h + 1) * GROUP] = weight @ values
        return out

    def feed(self, new, mask=None):
        """One forward pass; the cache's outputs and what they should be."""
        kept = {(r.layer, r.sequence, r.head): r.positions.tolist() for r in self.cache.rows()} if len(self) else {}
        got, wanted = [], []
        for layer, (q, k, v) in enumerate(new):
            self.keys[layer] = torch.cat([self.keys[layer], k], 2)
            self.values[layer] = torch.cat([self.values[layer], v], 2)

            def dense(q=q, k=k, v=v):
                k, v = (x.repeat_interleave(GROUP, 1) for x in (k, v))
                causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
                at = causal.expand(self.batch, 1, -1, -1) if mask is None else mask
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=at).transpose(1, 2)

            got.append(self.cache.attend(layer, q, k, v, mask, scaling=DIM**-0.5, dense=dense))
            for b in range(self.batch):
                for h in range(KV_HEADS):
                    kept.setdefault((layer, b, h), [])
            wanted.append(self.output(layer, q, kept))
        return torch.stack(got), torch.stack(wanted)

    def __len__(self):
        return self.keys[0].shape[2]


def tokens(count, seed, batch=2):
    g = torch.Generator().manual_seed(seed)
    return [
        [torch.randn((batch, h, count, DIM), generator=g) for h in (HEADS, KV_HEADS, KV_HEADS)] for _ in range(LAYERS)
    ]


def loss(got, wanted):
    return float((got - wanted).square().sum() / wanted.square().sum())


def counts_of(cache):
    return [store.evicted_means.of(slice(None))[1] for store in cache.inspect().stores]


def made(name, decoded=30, batch=2):
    cache = kvc.CompressedPagedCache(CONFIG, RECIPES.get(name, name))
    past = Past(cache, batch)
    past.feed(tokens(60, 0, batch))
    for step in range(decoded):
        past.feed(tokens(1, 100 + step, batch))
    return past


@pytest.mark.parametrize("name", RECIPES)
def test_outputs_are_a_softmax_over_what_is_kept_and_the_mean_of_what_is_not(name):
    """Prompts, chunks of several sizes and single tokens, with plans in between."""
    cache = kvc.CompressedPagedCache(CONFIG, RECIPES[name])
    past, lost = Past(cache), []
    for seed, count in enumerate([60, 1, 1, 7, *(1,) * 14, 25, *(1,) * 9]):
        got, wanted = past.feed(tokens(count, seed))
        lost.append(loss(got, wanted))
    assert max(lost) < LOSES.get(name, 1e-9), lost
    (counts,) = counts_of(cache)
    kept = torch.cat([each.flatten() for each in cache.slots()])
    assert (counts > 20).all() and (counts + kept == len(past)).all()


def test_it_is_another_output_than_without():
    """The oracle would find it if the means were left out."""
    cache = kvc.CompressedPagedCache(CONFIG, dataclasses.replace(RECIPES["snapkv"], evicted="forgotten"))
    past = Past(cache)
    past.feed(tokens(60, 0))
    got, wanted = past.feed(tokens(1, 1))
    assert loss(got, wanted) > 1e-3 and "evicted_means" not in cache.inspect().stores[0].tensors.values


def test_until_something_is_evicted_nothing_is_kept_and_nothing_changes():
    large = {"budget": 200}
    with_means, without = (
        kvc.CompressedPagedCache(CONFIG, recipe("h2o", evicted=e, **large)) for e in ("mean", "forgotten")
    )
    for seed, count in enumerate([60, 1, 9, *(1,) * 6]):
        new = tokens(count, seed)
        one, other = (Past(cache).feed(new)[0] if not seed else _feed(cache, new) for cache in (with_means, without))
        assert torch.equal(one, other)
    assert with_means.memory().total == without.memory().total
    assert counts_of(with_means) == [None]


def _feed(cache, new):
    return torch.stack([cache.attend(i, *each, None, scaling=DIM**-0.5, dense=None) for i, each in enumerate(new)])


def test_means_are_of_keys_and_values_as_they_are_stored():
    """Centred keys, rotated values: what the tail would hold."""
    cache = kvc.CompressedPagedCache(CONFIG, recipe("auto", budget=0.3, tiers=("k8v8", "k4v2"), centre_keys=True))
    past, new = Past(cache), tokens(60, 0)
    for layer in new:
        layer[1] += torch.linspace(-3, 3, DIM)  # there is something to take off
    past.feed(new)
    (store,) = cache.inspect().stores
    assert store.rotates_values and store.key_shift.abs().max() > 1
    means, counts = store.evicted_means.of(slice(None))
    for row, report in enumerate(sorted(cache.rows(), key=lambda r: (r.layer, r.sequence, r.head))):
        gone = sorted(set(range(60)) - set(report.positions.tolist()))
        assert counts[row] == len(gone) > 5
        place = report.layer, report.sequence, report.head
        keys = past.keys[report.layer][report.sequence, report.head, gone] - store.key_shift[place]
        values = hadamard(past.values[report.layer][report.sequence, report.head, gone], DIM)
        torch.testing.assert_close(means[row, 0], keys.mean(0), atol=0.02, rtol=0)
        torch.testing.assert_close(means[row, 1], values.mean(0), atol=0.05, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_means_have_the_dtype_of_keys_and_follow_over_many_plans(dtype):
    cache = kvc.CompressedPagedCache(CONFIG, recipe("streaming", budget=16))
    past = Past(cache)
    given = [[[x.to(dtype) for x in layer] for layer in tokens(n, seed)] for seed, n in enumerate([40, *(1,) * 300])]
    for new in given:
        for layer in range(LAYERS):
            past.keys[layer] = torch.cat([past.keys[layer], new[layer][1].float()], 2)
        _feed_first(cache, new) if new is given[0] else _feed(cache, new)
    (store,) = cache.inspect().stores
    means, counts = store.evicted_means.of(slice(None))
    assert means.dtype is dtype and int(counts.min()) > 300
    for row, report in enumerate(sorted(cache.rows(), key=lambda r: (r.layer, r.sequence, r.head))):
        gone = sorted(set(range(340)) - set(report.positions.tolist()))
        wanted = past.keys[report.layer][report.sequence, report.head, gone].mean(0)
        torch.testing.assert_close(means[row, 0].float(), wanted, atol=8e-3, rtol=0)


def _feed_first(cache, new):
    for layer, (q, k, v) in enumerate(new):
        expanded = [x.repeat_interleave(GROUP, 1) for x in (k, v)]
        attended = torch.nn.functional.scaled_dot_product_attention(q, *expanded, is_causal=True).transpose(1, 2)
        cache.attend(layer, q, k, v, None, scaling=DIM**-0.5, dense=lambda attended=attended: attended)


@pytest.mark.parametrize("name", ["h2o", "auto"])
def test_padded_rows_are_those_alone(name):
    pads, count = [25, 0], 70
    new = tokens(count, 0)
    real = torch.arange(count) >= torch.tensor(pads)[:, None]
    mask = torch.ones(count, count, dtype=torch.bool).tril() & real[:, None, None] & real[:, None, :, None]
    cache = kvc.CompressedPagedCache(CONFIG, RECIPES[name])
    past = Past(cache, pads=pads)
    past.feed(new, mask)
    for step in range(15):
        got, wanted = past.feed(tokens(1, 50 + step))
        assert loss(got, wanted) < LOSES.get(name, 1e-9)
    alone = kvc.CompressedPagedCache(CONFIG, RECIPES[name])
    other = Past(alone, 1)
    other.feed([[x[:1, :, pads[0] :] for x in layer] for layer in new])
    for step in range(15):
        got, _ = other.feed([[x[:1] for x in layer] for layer in tokens(1, 50 + step)])
    mine = cache.inspect().stores[0].evicted_means.of(slice(None))
    for x, y in zip(mine, alone.inspect().stores[0].evicted_means.of(slice(None)), strict=True):
        x = x.unflatten(0, (LAYERS, 2, KV_HEADS))[:, 0].flatten(0, 1)
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_forks_go_their_own_ways():
    past = made("h2o")
    cache, fork = past.cache, past.cache.fork()
    other = Past(fork)
    other.keys, other.values = list(past.keys), list(past.values)
    before = counts_of(cache)[0].clone()
    for step in range(12):
        got, wanted = other.feed(tokens(1, 900 + step))
        assert loss(got, wanted) < 1e-9
    assert torch.equal(counts_of(cache)[0], before) and (counts_of(fork)[0] > before).all()
    for step in range(12):
        got, wanted = past.feed(tokens(1, 500 + step))
        assert loss(got, wanted) < 1e-9


def test_beams_take_their_means_along():
    past = made("h2o", batch=3)
    index = torch.tensor([2, 0, 2, 1])
    past.cache.batch_repeat_interleave(2)
    past.cache.batch_select_indices(torch.tensor([4, 0, 5, 3]))
    past.keys, past.values = ([x[index] for x in each] for each in (past.keys, past.values))
    past.batch, past.pads = 4, [0] * 4
    for step in range(9):
        got, wanted = past.feed(tokens(1, 500 + step, 4))
        assert loss(got, wanted) < 1e-9


def test_what_was_evicted_stays_so_when_tokens_are_taken_back():
    past = made("h2o")
    cache = past.cache
    cache.activate_past_recording()
    before, positions = counts_of(cache)[0].clone(), [r.positions.tolist() for r in cache.rows()]
    keys, values = list(past.keys), list(past.values)
    for step in range(7):
        got, wanted = past.feed(tokens(1, 700 + step))
        assert loss(got, wanted) < 1e-9
    cache.crop(-7)
    past.keys, past.values = keys, values
    assert torch.equal(counts_of(cache)[0], before) and positions == [r.positions.tolist() for r in cache.rows()]
    past.feed(tokens(1, 1))
    for count in (5, 1, 1):
        got, wanted = past.feed(tokens(count, 800 + count))
        assert loss(got, wanted) < 1e-9
    cache.crop(0)  # what was recorded is packed and planned for
    assert (counts_of(cache)[0] > before).all()
    cache.stop_past_recording()
    got, wanted = past.feed(tokens(1, 2))
    assert loss(got, wanted) < 1e-9


def test_plans_under_memory_pressure_keep_means():
    generous = recipe("kv-compress", budget=1.0, protect={"recent": 4})
    free = kvc.CompressedPagedCache(CONFIG, generous)
    Past(free).feed(tokens(120, 0))
    most = sum(arena.live * arena.page_bytes for arena in free.inspect().arenas)
    cache = kvc.CompressedPagedCache(CONFIG, generous, max_bytes=2 * most)
    past = Past(cache)
    for seed, count in enumerate([60, 60, 60]):  # room is made before the last of them is attended to
        past.feed(tokens(count, seed))
    assert counts_of(cache)[0].sum() > 0
    for seed in range(6):
        got, wanted = past.feed(tokens(1, 10 + seed))
        assert loss(got, wanted) < 1e-9


def test_reset_forgets_them():
    past = made("h2o")
    past.cache.reset()
    assert past.cache.memory().total == 0
    again = Past(past.cache)
    again.feed(tokens(30, 0))
    got, wanted = again.feed(tokens(1, 1))
    assert loss(got, wanted) < 1e-9


# -- models and files ------------------------------------------------------------------------------------------------


def llama(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, eos_token_id=None, initializer_range=0.2, **changes,
    )  # fmt: skip
    return kvc.patch(LlamaForCausalLM(config).eval(), "lossless")


@pytest.fixture(scope="module")
def model():
    return llama()


def ids_of(count, seed=0, batch=2):
    return torch.randint(3, 96, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, cache):
    return model(ids, past_key_values=cache, use_cache=True).logits


def filled(model, which, prompt=200, decoded=20):
    cache = kvc.CompressedPagedCache(model.config, which)
    cache.belongs_to(model)
    ids = ids_of(prompt + decoded)
    logits(model, ids[:, :prompt], cache)
    for i in range(prompt, prompt + decoded):
        logits(model, ids[:, i : i + 1], cache)
    return cache


MEANS = recipe("auto", budget=0.25)


@pytest.mark.parametrize("which", [MEANS, recipe("kv-compress", budget=0.25)], ids=["auto", "kv-compress"])
def test_a_saved_cache_goes_on_with_the_same_logits(model, which, tmp_path):
    cache = filled(model, which)
    cache.save(tmp_path / "cache")
    metadata = StoredFile(tmp_path / "cache").metadata
    assert metadata["format_version"] == "3"
    loaded = kvc.CompressedPagedCache.load(tmp_path / "cache", model)
    assert loaded.recipe == cache.recipe and counts_of(loaded)[0].sum() > 0
    for count in (5, *(1,) * 12):
        more = ids_of(count, seed=5)
        assert torch.equal(logits(model, more, loaded), logits(model, more, cache))
    assert torch.equal(counts_of(loaded)[0], counts_of(cache)[0])
    cache.save(tmp_path / "one")
    loaded.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_files_of_recipes_that_forget_are_as_before(model, tmp_path):
    for name, version in (("kv-compress", "1"), ("auto", "2")):
        filled(model, recipe(name, budget=0.25, evicted="forgotten")).save(tmp_path / name)
        metadata = StoredFile(tmp_path / name).metadata
        assert metadata["format_version"] == version and "evicted" not in json.loads(metadata["state"])["recipes"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("evicted_counts"), "means of evicted slots without evicted_counts"),
        (lambda values: values["evicted_counts"].neg_(), "negative numbers of evicted slots"),
        (lambda values: values["evicted_counts"].add_(10**6), "more slots kept and evicted in a row than"),
        (lambda values: values.update(evicted_counts=values["evicted_counts"].long()), "evicted_counts"),
    ],
)
def test_means_that_cannot_be_are_refused(model, change, message, tmp_path, monkeypatch):
    cache = filled(model, MEANS)
    (store,) = cache.inspect().stores
    monkeypatch.setattr("kvcompress_hf.io.writing.check_file", lambda *anything: None)
    change(store.tensors.values)
    cache.save(tmp_path / "cache")
    with pytest.raises(kvc.CacheFormatError, match=message):
        kvc.CompressedPagedCache.load(tmp_path / "cache", model)


def test_means_that_the_recipe_has_no_use_for_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr("kvcompress_hf.io.writing.check_file", lambda *anything: None)
    monkeypatch.setattr(kvc.Recipe, "keeps_mean", True)
    filled(model, recipe("kv-compress", budget=0.25, evicted="forgotten")).save(tmp_path / "cache")
    monkeypatch.undo()
    with pytest.raises(kvc.CacheFormatError, match="tensors that do not belong there"):
        kvc.CompressedPagedCache.load(tmp_path / "cache", model)
    cache = filled(model, MEANS)
    cache.inspect().stores[0].evicted = False
    monkeypatch.setattr("kvcompress_hf.io.writing.check_file", lambda *anything: None)
    cache.save(tmp_path / "cache")
    with pytest.raises(kvc.CacheFormatError, match="a store that says nothing was"):
        kvc.CompressedPagedCache.load(tmp_path / "cache", model)


def test_every_byte_counts_and_comes_out_of_the_budget(model, held_bytes):
    which = recipe("kv-compress", budget=0.25)
    cache, without = (filled(model, dataclasses.replace(which, evicted=e), 600) for e in ("mean", "forgotten"))
    assert cache.memory().total == held_bytes(cache)
    (store,) = cache.inspect().stores
    rows = store.layers * store.rows_per_layer
    means = [store.tensors.values[name] for name in ("evicted_means", "evicted_counts")]
    assert sum(each.nbytes for each in means) == rows * (2 * 16 * 4 + 4)
    assert cache.memory().metadata >= without.memory().metadata
    page = store.layout.page_bytes * rows  # as much as a page per row may lie between two plans
    assert cache.memory().total <= without.memory().total + page // 2


def test_layers_with_a_window_forget():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, sliding_window=64, layer_types=["sliding_attention", "full_attention"],
        eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    model = kvc.patch(Gemma2ForCausalLM(config).eval(), "lossless")
    cache = filled(model, recipe("h2o", budget=32, protect={"recent": 4}), 120)
    windowed = {store.geometry.windowed: store for store in cache.inspect().stores}
    assert windowed[True].evicted and windowed[True].evicted_means.of(slice(None)) == (None, None)
    assert (windowed[False].evicted_means.of(slice(None))[1] > 0).all()


def test_generate_and_speculation_give_the_same_tokens(model):
    prompt = ids_of(40, batch=1).repeat(1, 4)
    run = {"max_new_tokens": 40, "do_sample": False, "kvcompress": recipe("kv-compress", budget=0.4)}
    want = model.generate(prompt, **run)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **run), want)
    both = model.generate(prompt.repeat(2, 1), **run)
    assert torch.equal(both[0], both[1]) and torch.equal(both[:1], want)


# -- recipes ---------------------------------------------------------------------------------------------------------


def test_recipes_say_what_stays():
    assert kvc.get_preset("auto").evicted == "forgotten" and not kvc.get_preset("auto").keeps_mean
    assert "evicted" not in kvc.get_preset("auto").to_dict()
    assert MEANS.keeps_mean and kvc.Recipe.from_json(MEANS.to_json()) == MEANS
    assert eval(repr(MEANS), vars(kvc).copy() | _parts()) == MEANS


def _parts():
    return {
        name: getattr(kvc, name) for name in ("Recipe", "WindowScores", "Protect", "Budget", "RateDistortion", "When")
    }


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("auto", {"evicted": "mode"}, "Recipe.evicted is 'mode'; it must be one of forgotten, mean"),
        ("auto", {"evicted": True}, "Recipe.evicted is True; it must be one of"),
        ("auto", {"evicted": ["mean"]}, "must be one of"),
        ("k8v4", {"evicted": "mean"}, "'k8v4' has evicted='mean' but no plan: nothing is ever evicted"),
        ("streaming", {"evicted": "mean", "positions": "reindexed"}, "the keys in a mean come from many places"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(preset, changes, message):
    with pytest.raises(ValueError, match=message):
        kvc.get_preset(preset).with_overrides(**changes)


def test_rows_of_a_batch_agree():
    with pytest.raises(ValueError, match="Row 1 asks for evicted='mean' and row 0 for evicted='forgotten'"):
        kvc.CompressedPagedCache(CONFIG, ["auto", kvc.get_preset("auto").with_overrides(evicted="mean")])
