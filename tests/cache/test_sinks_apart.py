"""Recipes without a plan that store the first tokens of each sequence in a tier of their own."""

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
