"""Speculative decoding on a cache that already holds text, and what is left of it when the call is over or stopped."""

import copy

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from kvcompress_hf import CompressedPagedCache, UnsupportedFeatureError
from kvcompress_hf.patches import patch, prefill
from kvcompress_hf.patches.speculation import tokens_held

RECIPES = {"lossless": "lossless", "k8v4": "k8v4", "auto": {"preset": "auto", "budget": 0.5}}
HOW = ("lookup", "draft", "draft with a cache of ours")


@pytest.fixture(scope="module")
def model(build_model):
    return build_model("llama")


@pytest.fixture(scope="module")
def drafts(model):
    """A copy of the stock model that is often, but not always, right; and one whose cache is compressed as well."""
    made = []
    for seed in range(2):
        draft = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        for weight in draft.parameters():
            weight.data += 0.03 * weight.std() * torch.randn(weight.shape, generator=generator)
        made.append(draft)
    return made[0], patch(made[1], "k8v4", check=False)


def _how(how, drafts):
    if how == "lookup":
        return {"prompt_lookup_num_tokens": 4}
    return {"assistant_model": drafts[how != "draft"]}


def _generate(model, ids, cache, tokens=20, **kwargs):
    return model.generate(ids, kvcompress=cache, max_new_tokens=tokens, do_sample=False, **kwargs)


@pytest.mark.parametrize("new_only", (False, True), ids=("whole text", "only new tokens"))
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_what_the_cache_holds_is_not_read_again(recipe, how, new_only, model, drafts, prompt):
    patch(model, recipe, check=False)
    whole = torch.cat([prompt(tokens=40).repeat(1, 2), prompt(tokens=9, seed=4)], 1)
    text = prefill(model, whole[:, :80])
    ids = whole[:, 80:] if new_only else whole
    mask = torch.ones_like(whole)
    plain, tried = text.fork(), text.fork()
    want = _generate(model, ids, plain, attention_mask=mask)
    got = _generate(model, ids, tried, attention_mask=mask, **_how(how, drafts))
    assert got.tolist() == want.tolist()
    assert tried.get_seq_length() == plain.get_seq_length() == 80 + 9 + 19
    assert not tried.is_recording_past(0)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_turns_of_a_chat_are_those_of_plain_decoding(recipe, how, model, drafts, prompt):
    """Plain and speculative turns by turns, on one cache."""
    patch(model, recipe, check=False)
    texts, caches = [], []
    for extras in ([{}] * 3, [_how(how, drafts), {}, _how(how, drafts)]):
        cache, text = CompressedPagedCache(model.config, recipe), prompt(tokens=30).repeat(1, 2)
        for turn, extra in enumerate(extras):
            text = torch.cat([text, prompt(tokens=11, seed=turn)], 1)
            text = _generate(model, text, cache, tokens=12, **extra)
        texts.append(text.tolist())
        caches.append(cache)
    assert texts[0] == texts[1]
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    assert caches[1].memory().payload == caches[0].memory().payload
    assert not caches[1].is_recording_past(0)


def test_padding_with_the_new_tokens_alone_is_refused(model, prompt):
    patch(model, "lossless", check=False)
    ids, mask = prompt(tokens=40), torch.ones(1, 45, dtype=torch.long)
    mask[:, :3] = 0
    cache = prefill(model, ids, attention_mask=mask[:, :40])
    with pytest.raises(UnsupportedFeatureError, match="pass the whole text"):
        _generate(model, ids[:, :5], cache, attention_mask=mask, prompt_lookup_num_tokens=3)
    assert cache.get_seq_length() == 40 and not cache.is_recording_past(0)


def test_padding_with_the_whole_text_is_right(model, prompt):
    patch(model, "lossless", check=False)
    ids, mask = prompt(tokens=45), torch.ones(1, 45, dtype=torch.long)
    mask[:, :3] = 0
    cache = prefill(model, ids[:, :40], attention_mask=mask[:, :40])
    want = _generate(model, ids, cache.fork(), attention_mask=mask)
    assert torch.equal(_generate(model, ids, cache, attention_mask=mask, prompt_lookup_num_tokens=3), want)


def test_drafts_from_hidden_states_are_refused_on_text(model, prompt):
    class Drafts:
        requires_model_outputs = True

    patch(model, "lossless", check=False)
    with pytest.raises(UnsupportedFeatureError, match="hidden states"):
        tokens_held(prefill(model, prompt()), Drafts(), prompt(tokens=50), {}, 50)


class _Stops(BaseStreamer):
    """Raises when it gets tokens for the n-th time."""

    def __init__(self, n):
        self.left = n

    def put(self, value):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def end(self):
        pass


@pytest.mark.parametrize("stops", (2, 3, 6))
@pytest.mark.parametrize("how", HOW[:2])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_an_interrupted_call_leaves_verified_tokens_only_and_no_recording(recipe, how, stops, model, drafts, prompt):
    patch(model, recipe, check=False)
    ids = prompt(tokens=30).repeat(1, 3)
    want = _generate(model, ids, CompressedPagedCache(model.config, recipe), tokens=40)
    cache = CompressedPagedCache(model.config, recipe)
    with pytest.raises(KeyboardInterrupt):
        _generate(model, ids, cache, tokens=40, streamer=_Stops(stops), **_how(how, drafts))
    assert not cache.is_recording_past(0)
    seen = cache.get_seq_length()
    assert seen >= 90
    # Going on from the tokens that plain decoding would have written gives the rest of them.
    assert _generate(model, want[:, : seen + 1], cache, tokens=129 - seen).tolist() == want.tolist()


def test_memory_limits_hold_after_a_speculative_turn(model, prompt):
    recipe = {"preset": "kv-compress", "budget": 0.9}
    patch(model, recipe, check=False)
    cache = CompressedPagedCache(model.config, recipe, max_bytes="800KiB")
    text = _generate(model, prompt(), cache, prompt_lookup_num_tokens=3)
    text = torch.cat([text, prompt(tokens=200, seed=3)], 1)
    _generate(model, text, cache, tokens=100)
    assert all(arena.live * arena.page_bytes <= 800 * 1024 for arena in cache.inspect().arenas)
    assert cache.inspect().statistics.plans > 1


def test_a_cache_made_for_the_call_is_returned_without_recording(model, prompt):
    patch(model, "k8v4", check=False)
    out = model.generate(
        prompt(), max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3, return_dict_in_generate=True
    )
    cache = next(value for value in out.values() if isinstance(value, CompressedPagedCache))
    assert not cache.is_recording_past(0)


def test_recording_of_ones_own_stays_on(model, prompt):
    patch(model, "k8v4", check=False)
    cache = CompressedPagedCache(model.config, "k8v4")
    cache.activate_past_recording()
    text = _generate(model, prompt(), cache, tokens=6)
    assert cache.is_recording_past(0)
    cache.crop(-5)
    assert torch.equal(_generate(model, text[:, :41], cache, tokens=5)[:, :41], text[:, :41])
