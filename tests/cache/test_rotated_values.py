"""Values kept Hadamard-rotated where some are of 2 bits: attention's output is turned back, and loses less."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, MistralConfig, MistralForCausalLM

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument
from kvcompress_hf.io.container import StoredFile
from kvcompress_hf.kernels.quantize import hadamard
from kvcompress_hf.plans.distortion import measure_distortion

TINY = Path(__file__).parents[2] / "examples" / "models" / "kvlm-tiny"


@pytest.fixture
def rotated(monkeypatch):
    """Rotates the values of every recipe: native ones lose nothing, so every difference from stock is a mistake."""
    monkeypatch.setattr(kvc.Recipe, "rotates_values", True)


@pytest.fixture(scope="module")
def stock(tiny_llama):
    return tiny_llama(vocab_size=96, head_dim=48, num_hidden_layers=3)


@pytest.fixture(scope="module")
def model(stock):
    return kvc.patch(copy.deepcopy(stock), "lossless")


@pytest.fixture(scope="module")
def windowed():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 20}
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    return MistralForCausalLM(MistralConfig(**sizes, **heads, initializer_range=0.2, eos_token_id=None)).eval()


def tokens(batch, count, seed=0):
    return torch.randint(3, 96, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, cache, mask=None):
    where = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, position_ids=where, use_cache=True, **as_argument(model, cache)).logits


def fresh(model, recipe="lossless"):
    return kvc.CompressedPagedCache(model.config, recipe)


def read(model, cache, ids, pieces):
    return torch.cat([logits(model, part, cache) for part in ids.split(list(pieces), dim=1)], dim=1)


def store_of(cache):
    return cache.inspect().stores[0]


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", kvc.presets())
def test_recipes_with_values_of_2_bits_rotate(name):
    recipe = kvc.get_preset(name)
    assert recipe.rotates_values == any(tier.endswith("v2") for tier in recipe.tiers)


@pytest.mark.parametrize("pieces", [(90,), (40, 50), (60, *(1,) * 30), (20, 7, *(1,) * 40, 23)])
def test_any_cut_of_the_input_gives_the_stock_logits(rotated, stock, model, pieces):
    ids, cache = tokens(2, 90), fresh(model)
    close(read(model, cache, ids, pieces), read(stock, DynamicCache(config=stock.config), ids, pieces))
    assert store_of(cache).rotates_values


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_every_head_dim(rotated, tiny_llama, head_dim):
    stock = tiny_llama(head_dim=head_dim)
    model, ids = kvc.patch(copy.deepcopy(stock), "lossless"), tokens(1, 40).clamp(max=63)
    close(read(model, fresh(model), ids, (20, 1, 1, 18)), stock(ids).logits)


@pytest.mark.parametrize("pieces", [(50, 40), (30, *(1,) * 60)])
def test_sliding_windows(rotated, windowed, pieces):
    model, ids = kvc.patch(copy.deepcopy(windowed), "lossless"), tokens(2, 90)
    close(read(model, fresh(model), ids, pieces), windowed(ids).logits)


def test_pages_and_tail_hold_rotated_values_and_nothing_else_does(rotated, stock, model):
    ids, cache, exact = tokens(1, 70), fresh(model), DynamicCache(config=stock.config)
    for one, other in ((model, cache), (stock, exact)):
        read(one, other, ids, (60, *(1,) * 10))
    store = store_of(cache)
    values = torch.stack([layer.values for layer in exact.layers])  # [layers, 1, kv_heads, 70, head_dim]
    _, packed = store.backend.read_slots(store.rows(), 0, 60)
    close(packed.view_as(values[..., :60, :]), hadamard(values[..., :60, :], 16))
    close(store.tail_values[..., :10, :], hadamard(values[..., 60:, :], 16))
    close(store.rotated(store.tail_values[0, ..., :10, :]), values[0, ..., 60:, :])


def test_padded_rows_are_those_alone(rotated, stock, model):
    ids, mask = tokens(2, 80), torch.ones(2, 80, dtype=torch.long)
    mask[0, :30] = 0
    cache, exact = fresh(model), DynamicCache(config=stock.config)
    real = mask[:, :, None].bool()
    close(torch.where(real, logits(model, ids, cache, mask), 0), torch.where(real, logits(stock, ids, exact, mask), 0))
    for count in (1, 5):
        more, mask = tokens(2, count, seed=count), torch.cat([mask, torch.ones(2, count, dtype=torch.long)], 1)
        close(logits(model, more, cache, mask), logits(stock, more, exact, mask))


@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"prefill_chunk_size": 24}, {"prompt_lookup_num_tokens": 3}])
def test_generation_is_the_stock_model_s(rotated, stock, model, arguments):
    ids = tokens(1, 20).repeat(1, 4)
    run = {"max_new_tokens": 40, "do_sample": False, **arguments}
    assert torch.equal(model.generate(ids, **run), stock.generate(ids, **run))


def test_forks_and_tokens_taken_back(rotated, model):
    ids, cache = tokens(1, 80), fresh(model)
    logits(model, ids[:, :60], cache)
    fork = cache.fork()
    logits(model, tokens(1, 15, seed=3), fork)
    cache.activate_past_recording()
    logits(model, tokens(1, 9, seed=2), cache)
    cache.crop(-9)
    cache.stop_past_recording()
    want = logits(model, ids, fresh(model))[:, 60:]
    close(logits(model, ids[:, 60:], cache), want)
    fork.crop(-15)
    close(logits(model, ids[:, 60:], fork), want)


@pytest.mark.parametrize("preset", ["auto", "expected-attention", "kv-compress", "roco"])
def test_observers_come_to_the_same_scores(model, monkeypatch, preset):
    ids, fields = tokens(2, 120), []
    recipe = kvc.get_preset(preset).with_overrides(tiers=("native",), budget=1000)
    for rotates in (False, True):
        monkeypatch.setattr(kvc.Recipe, "rotates_values", rotates)
        cache = fresh(model, recipe)
        read(model, cache, ids, (60, *(1,) * 20, 40))
        store = store_of(cache)
        names = [name for name in store.layout.fields if name != "position"]
        fields.append(torch.stack([store.read_field(0, name) for name in names]))
    assert fields[0].std() > 0
    torch.testing.assert_close(*fields, atol=1e-4, rtol=5e-3)


def test_observers_describe_the_model_s_own_values(rotated, stock, model, monkeypatch):
    """Of a chunk on its way into pages, and of a tail, where all layers come together."""
    seen = []

    def describe(keys, values, key_mean, value_mean):
        seen.append((values, value_mean))
        return {}

    monkeypatch.setattr("kvcompress_hf.runtime.packing.describe_of", lambda state: describe)
    ids, cache, exact = tokens(1, 92), fresh(model), DynamicCache(config=stock.config)
    for one, other in ((model, cache), (stock, exact)):
        read(one, other, ids, (60, *(1,) * 32))
    values = torch.stack([layer.values[0] for layer in exact.layers])
    layers = len(values)
    close(torch.cat([each for each, _ in seen[:layers]]), values[:, :, :60])
    close(seen[layers][0], values[:, :, 60:])
    close(seen[layers][1], values.mean(2, keepdim=True))
    assert len(seen) == layers + 1 and store_of(cache).rotates_values


@pytest.mark.parametrize("recipe", ["k4v2", "k2v2", "leankv"])
def test_a_saved_cache_goes_on_with_the_same_logits(model, tmp_path, recipe):
    cache, more = fresh(model, recipe), tokens(2, 3, seed=2)
    read(model, cache, tokens(2, 60), (50, *(1,) * 10))
    cache.save(tmp_path / "cache")
    assert StoredFile(tmp_path / "cache").metadata["format_version"] == "2"
    loaded = kvc.CompressedPagedCache.load(tmp_path / "cache", model)
    assert store_of(loaded).rotates_values
    assert torch.equal(logits(model, more, loaded), logits(model, more, cache))
    loaded.reset()
    read(model, loaded, tokens(2, 60), (50, *(1,) * 10))
    assert torch.equal(
        logits(model, more, loaded), logits(model, more, kvc.CompressedPagedCache.load(tmp_path / "cache", model))
    )


def test_a_file_of_before_goes_on_without(model, tmp_path, monkeypatch):
    ids, more = tokens(2, 60), tokens(2, 40, seed=2)
    with monkeypatch.context() as then:
        then.setattr(kvc.Recipe, "rotates_values", False)
        old = fresh(model, "k4v2")
        read(model, old, ids, (50, *(1,) * 10))
        old.save(tmp_path / "cache")
        want = read(model, old, more, (1,) * 40)
    metadata = StoredFile(tmp_path / "cache").metadata
    assert metadata["format_version"] == "1" and "rotates_values" not in json.loads(metadata["state"])["stores"][0]
    loaded = kvc.CompressedPagedCache.load(tmp_path / "cache", model)
    assert not store_of(loaded).rotates_values and not store_of(loaded.fork()).rotates_values
    assert torch.equal(read(model, loaded, more, (1,) * 40), want)
    loaded.save(tmp_path / "again")
    assert StoredFile(tmp_path / "again").metadata["format_version"] == "1"


def test_rotated_values_of_a_recipe_without_are_refused(model, tmp_path, monkeypatch):
    with monkeypatch.context() as then:
        then.setattr(kvc.Recipe, "rotates_values", True)
        cache = fresh(model)
        logits(model, tokens(1, 20), cache)
        cache.save(tmp_path / "cache")
    with pytest.raises(kvc.CacheFormatError, match="rotated values, where the recipe keeps them as they are"):
        kvc.CompressedPagedCache.load(tmp_path / "cache", model)


@torch.no_grad()
def test_values_with_large_channels_lose_less(monkeypatch):
    """On the trained tiny model, with one channel of each head made larger and its weight in the output smaller: the
    same function, with values as trained models have them."""
    tiny = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    dim, heads = tiny.config.head_dim, tiny.config.num_key_value_heads
    for layer in tiny.model.layers:
        layer.self_attn.v_proj.weight.view(heads, dim, -1)[:, 5] *= 12
        layer.self_attn.o_proj.weight.view(tiny.config.hidden_size, -1, dim)[..., 5] /= 12
    text = (TINY / "haystack.txt").read_text(encoding="utf-8")[5000:12000]
    ids = AutoTokenizer.from_pretrained(TINY)(text, return_tensors="pt").input_ids[:, :560]
    want = tiny(ids).logits[0, 500:].log_softmax(-1)
    kvc.patch(tiny, "k4v2", check=False)
    losses = []
    for rotates in (False, True):
        monkeypatch.setattr(kvc.Recipe, "rotates_values", rotates)
        cache = fresh(tiny, "k4v2")
        logits(tiny, ids[:, :500], cache)
        got = logits(tiny, ids[:, 500:], cache)[0].log_softmax(-1)
        losses.append(float((want.exp() * (want - got)).sum(-1).mean()))
    print(losses)
    assert losses[1] < 0.5 * losses[0], losses


def test_plans_are_told_what_rotated_values_lose(model, monkeypatch):
    seen = []

    def measure(query, keys, values, *rest):
        seen.append(values)
        return measure_distortion(query, keys, values, *rest)

    monkeypatch.setattr("kvcompress_hf.runtime.compression.measure_distortion", measure)
    recipe = kvc.get_preset("auto").with_overrides(tiers=("k8v4", "k4v2"))
    for rotates in (False, True):
        monkeypatch.setattr(kvc.Recipe, "rotates_values", rotates)
        logits(model, tokens(1, 60), fresh(model, recipe))
    kept, stored = seen[0], seen[len(seen) // 2]
    close(stored, hadamard(kept, 16))
