"""The cache as transformers and people handle it: crop, reorder, select, repeat, fork, limits, misuse."""

import copy

import pytest
import torch
from transformers import DynamicCache

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument


@pytest.fixture(scope="module")
def stock(tiny_llama):
    return tiny_llama(vocab_size=96, intermediate_size=96, num_hidden_layers=3, head_dim=16)


@pytest.fixture(scope="module")
def model(stock):
    return kvc.patch(copy.deepcopy(stock), "lossless")


def tokens(batch, count, seed=0):
    return torch.randint(3, 96, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, cache, mask=None):
    return model(ids, **as_argument(model, cache), attention_mask=mask, use_cache=True).logits


def fresh(model, recipe="lossless", **kwargs):
    return kvc.CompressedPagedCache(model.config, recipe, **kwargs)


def close(a, b, recipe="lossless"):
    # Matrix products over other batch sizes round differently, and a code may flip to its neighbour.
    tolerance = 1e-4 if recipe == "lossless" else 3e-2
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("pieces", [(50,), (1, 49), (20, 30), (7, 1, 1, 33, 1, 7), (1,) * 50])
def test_any_cut_of_the_input_gives_the_stock_logits(stock, model, pieces):
    ids = tokens(2, 50)
    cache, expected = fresh(model), DynamicCache(config=stock.config)
    for part in ids.split(list(pieces), dim=1):
        close(logits(model, part, cache), logits(stock, part, expected))
    assert cache.get_seq_length() == 50


@pytest.mark.parametrize("prompt", [5, 40, 70])
@pytest.mark.parametrize("removed", [1, 4, 39])
def test_crop_leaves_what_a_shorter_past_would_have_been(model, prompt, removed):
    ids = tokens(1, prompt + 40)
    cache, shorter = fresh(model), fresh(model)
    logits(model, ids[:, :prompt], cache)
    for i in range(prompt, prompt + 39):
        logits(model, ids[:, i : i + 1], cache)
    cache.crop(-removed)
    keep = prompt + 39 - removed
    assert cache.get_seq_length() == keep
    logits(model, ids[:, :keep], shorter)
    more = tokens(1, 3, seed=9)
    close(logits(model, more, cache), logits(model, more, shorter))


def test_recording_holds_tokens_back_and_crop_commits_them(model):
    ids = tokens(1, 120)
    cache, plain = fresh(model, "k4v4"), fresh(model, "k4v4")
    logits(model, ids[:, :60], cache)
    logits(model, ids[:, :60], plain)
    cache.activate_past_recording()
    before = cache.memory().payload
    logits(model, ids[:, 60:110], cache)
    assert cache.memory().payload == before  # nothing packed while it may be taken back
    cache.crop(-50)
    for i in range(60, 70):
        close(logits(model, ids[:, i : i + 1], cache), logits(model, ids[:, i : i + 1], plain))


def test_crop_behind_an_eviction_is_refused_and_changes_nothing(model):
    ids = tokens(1, 400)
    cache = fresh(model, kvc.get_preset("kv-compress").with_overrides(budget=0.25))
    logits(model, ids, cache)
    with pytest.raises(kvc.UnsupportedFeatureError, match="crop would remove 3 tokens"):
        cache.crop(-3)
    assert cache.get_seq_length() == 400
    with pytest.raises(ValueError, match=r"crop\(-n\)"):
        cache.crop(3)


@pytest.mark.parametrize("recipe", ["lossless", "k8v4", "kv-compress"])
def test_reorder_select_and_repeat_equal_caches_filled_that_way(model, recipe):
    ids = tokens(3, 90)
    cache = fresh(model, recipe)
    logits(model, ids[:, :70], cache)
    for i in range(70, 90):
        logits(model, ids[:, i : i + 1], cache)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 3, 5]))
    chosen = ids[order].repeat_interleave(2, 0)[[0, 2, 3, 5]]
    again = fresh(model, recipe)
    logits(model, chosen[:, :70], again)
    for i in range(70, 90):
        logits(model, chosen[:, i : i + 1], again)
    for step in range(40):  # long enough to pack shared partial pages
        more = tokens(4, 1, seed=100 + step)  # the sequences diverge
        close(logits(model, more, cache), logits(model, more, again), recipe)
    assert cache.batch_size == 4


def test_repeated_sequences_share_pages(model):
    cache = fresh(model, "k8v4")
    logits(model, tokens(1, 2000), cache)
    one = cache.memory().total
    cache.batch_repeat_interleave(8)
    assert cache.memory().total < 1.1 * one
    assert cache.memory().dense == 8 * 2000 * 3 * 2 * 2 * 16 * 4


@pytest.mark.parametrize("recipe", ["lossless", "k8v4", "kv-compress"])
@pytest.mark.parametrize("how", ["fork", "deepcopy"])
def test_forks_go_their_own_ways(model, recipe, how):
    ids = tokens(2, 100)
    cache, control = fresh(model, recipe), fresh(model, recipe)
    for c in (cache, control):
        logits(model, ids[:, :80], c)
        for i in range(80, 100):
            logits(model, ids[:, i : i + 1], c)
    twin = cache.fork() if how == "fork" else copy.deepcopy(cache)
    total = cache.memory().total
    for step in range(40):
        more = tokens(2, 1, seed=step)
        other = tokens(2, 1, seed=1000 + step)
        expected = logits(model, more, control)
        logits(model, other, twin)
        close(logits(model, more, cache), expected, recipe)
    assert cache.memory().total >= total
    del twin
    assert cache.memory().forks == 0


@pytest.mark.parametrize("recipe", ["kv-compress", "h2o", "snapkv"])
def test_a_fork_that_reads_on_leaves_its_parent_alone(model, recipe):
    cache = fresh(model, recipe)
    logits(model, tokens(1, 200), cache)
    store = cache.inspect().stores[0]
    before = [store.read_field(0, name) for name in store.layout.fields]
    logits(model, tokens(1, 20, seed=3), cache.fork())
    for name, values in zip(store.layout.fields, before, strict=True):
        assert torch.equal(store.read_field(0, name), values)


def test_ten_forks_cost_little_until_they_diverge(model):
    cache = fresh(model, "k8v4")
    logits(model, tokens(1, 4096), cache)
    logits(model, tokens(1, 1), cache)
    one = cache.memory().total
    forks = [cache.fork() for _ in range(10)]
    stores = [fork.inspect().stores[0] for fork in forks]
    assert {store.tail_keys.data_ptr() for store in stores} == {cache.inspect().stores[0].tail_keys.data_ptr()}
    assert (
        sum(store.usage().tables for store in stores) <= 0.025 * one
    )  # heads of 16: real ones have pages 8 times as large
    assert cache.memory().total == one


def test_a_full_cache_says_so_and_stays_usable(model):
    cache = fresh(model, "lossless", max_bytes="150KiB")
    ids = tokens(1, 400)
    logits(model, ids[:, :100], cache)
    bytes_before, total_before = cache.memory().payload, cache.memory().total
    with pytest.raises(kvc.CacheMemoryError, match="max_bytes of 150.0 KiB"):
        logits(model, ids[:, 100:], cache)
    assert cache.get_seq_length() == 100
    assert (cache.memory().payload, cache.memory().total) == (bytes_before, total_before)
    again = fresh(model)
    logits(model, ids[:, :100], again)
    close(logits(model, ids[:, 100:110], cache), logits(model, ids[:, 100:110], again))


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("recipe", ["lossless", "kv-compress"])
def test_a_forward_that_stops_half_way_is_noticed_and_taken_back(model, recipe, count):
    ids = tokens(1, 60)
    cache, control = fresh(model, recipe), fresh(model, recipe)
    for c in (cache, control):
        logits(model, ids[:, :40], c)
        logits(model, ids[:, 40:41], c)

    def stop(*args):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            logits(model, ids[:, 41 : 41 + count], cache)
    finally:
        handle.remove()
    with pytest.raises(RuntimeError, match=f"its {count} tokens were in some layers only.*holds 41 tokens"):
        logits(model, ids[:, 41 : 41 + count], cache)
    for part in ids[:, 41:].split(count, dim=1):
        close(logits(model, part, cache), logits(model, part, control))


def test_an_empty_or_reset_cache_starts_over(stock, model):
    cache = fresh(model)
    cache.crop(0)
    cache.reset()
    cache.reorder_cache(torch.tensor([0]))
    ids = tokens(2, 12)
    close(logits(model, ids, cache), logits(stock, ids, DynamicCache(config=stock.config)))
    cache.reset()
    assert cache.batch_size == -1 and not cache.is_initialized
    ids = tokens(3, 12)  # another batch size is fine after reset
    close(logits(model, ids, cache), logits(stock, ids, DynamicCache(config=stock.config)))


@pytest.mark.parametrize("recipe", ["auto", "k8v4", "streaming", "roco"])
@pytest.mark.parametrize("ends", [False, True])
def test_a_reset_cache_records_nothing_any_more(model, recipe, ends):
    """Or it would never compress again."""
    cache, other = fresh(model, recipe), fresh(model, recipe)
    logits(model, tokens(2, 50), cache)
    cache.activate_past_recording()
    logits(model, tokens(2, 5), cache)
    if ends:
        cache.crop(-3)
    cache.reset()
    assert not cache.is_recording_past(0)
    ids = tokens(2, 80)
    for part in (ids[:, :60], *ids[:, 60:].split(1, dim=1)):
        assert torch.equal(logits(model, part, cache), logits(model, part, other))
    for mine, others in zip(cache.slots(), other.slots(), strict=True):
        assert torch.equal(mine, others)


def test_misuse_is_named(stock, model):
    cache = fresh(model)
    logits(model, tokens(2, 12), cache)
    with pytest.raises(ValueError, match="2 sequences"):
        logits(model, tokens(3, 12), cache)
    with pytest.raises(ValueError, match="page_bytes"):
        logits(model, tokens(1, 3), fresh(model, {"page_bytes": 64}))
    with pytest.raises(kvc.UnsupportedFeatureError, match="not patched"):
        logits(stock, tokens(1, 3), fresh(stock))


def test_what_transformers_asks_of_a_cache(model):
    cache = fresh(model)
    assert bool(cache) and len(cache) == 3
    assert not hasattr(cache, "to")
    assert cache.get_max_length() == -1 and cache.is_compileable is False and cache.is_croppable
    assert cache.is_sliding == [False] * 3 and cache.is_linear == [False] * 3 and cache.is_dummy == [False] * 3
    logits(model, tokens(2, 12), cache)
    assert cache.get_mask_sizes(5, 0) == (5, 12) and cache.get_query_offset() == 12
    assert "lossless" in repr(cache) and "tokens=12" in repr(cache)
    cache.layers[0].record_past = True
    assert cache.is_recording_past(0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("recipe", list(kvc.presets()))
def test_half_precision_models_run_every_preset_without_nan(stock, recipe, dtype):
    half = kvc.patch(copy.deepcopy(stock).to(dtype), recipe)
    out = half.generate(
        tokens(2, 100), max_new_tokens=40, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert all(step.isfinite().all() for step in out.logits)


def test_padded_rows_are_compressed_as_if_alone(model):
    short, long = tokens(1, 150, seed=5), tokens(1, 260, seed=6)
    ids = torch.cat([torch.cat([torch.zeros(1, 110, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(ids)
    mask[0, :110] = 0
    for recipe in ("kv-compress", "k8v4"):
        generate = dict(max_new_tokens=30, do_sample=False, return_dict_in_generate=True, kvcompress={"preset": recipe})
        both = model.generate(ids, attention_mask=mask, **generate)
        for row, prompt in enumerate((short, long)):
            alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **generate)
            assert torch.equal(both.sequences[row, 260:], alone.sequences[0, prompt.shape[1] :])
            for mine, theirs in zip(kvc.cache_of(both).slots(), kvc.cache_of(alone).slots(), strict=True):
                assert torch.equal(mine[row], theirs[0])
