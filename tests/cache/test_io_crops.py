"""What is saved is loaded again: after crops, padding anywhere, copies; and what cannot be kept says so."""

import copy
import io
import pickle

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvcompress_hf as kvc


def build(seed=0, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=16,
        eos_token_id=None,
        initializer_range=0.2,
        **changes,
    )
    return kvc.patch(LlamaForCausalLM(config).eval(), "lossless")


@pytest.fixture(scope="module")
def model():
    return build()


def tokens(batch, count, seed=0):
    return torch.randint(3, 64, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, cache, mask=None):
    return model(ids, past_key_values=cache, attention_mask=mask, use_cache=True).logits


def goes_on_alike(model, cache, loaded, mask=None, steps=40):
    assert loaded.get_seq_length() == cache.get_seq_length()
    batch = max(cache.batch_size, loaded.batch_size, 1)
    for step in range(steps):
        new = tokens(batch, 9 if step == 20 else 1, seed=step)
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(new)], 1)
        assert torch.equal(logits(model, new, loaded, mask), logits(model, new, cache, mask))


@pytest.mark.parametrize("recipe", ["lossless", "k8v4"])
@pytest.mark.parametrize("removed", [1, 7, 30, 59, 60])
@pytest.mark.parametrize("decoded", [0, 10])
def test_saved_after_a_crop(model, recipe, removed, decoded, tmp_path):
    cache = kvc.CompressedPagedCache(model.config, recipe)
    ids = tokens(1, 60)
    logits(model, ids[:, : 60 - decoded], cache)
    for i in range(60 - decoded, 60):
        logits(model, ids[:, i : i + 1], cache)
    cache.crop(-removed)
    cache.save(tmp_path / "cache")
    loaded = kvc.CompressedPagedCache.load(tmp_path / "cache", model)
    goes_on_alike(model, cache, loaded)


@pytest.mark.parametrize("recipe", ["lossless", "auto"])
def test_saved_after_decoded_padding(model, recipe, tmp_path):
    """A token that is padding in one row and a token in another; no row fills the tail as far as it is counted."""
    cache = kvc.CompressedPagedCache(model.config, recipe)
    mask = torch.ones(3, 30, dtype=torch.long)
    logits(model, tokens(3, 30), cache, mask)
    for step, rows in enumerate(([0], [1, 2], [], [0, 1, 2])):
        new = torch.ones(3, 1, dtype=torch.long)
        new[rows] = 0
        mask = torch.cat([mask, new], 1)
        logits(model, tokens(3, 1, seed=step), cache, mask)
        cache.save(tmp_path / "cache")
        loaded = kvc.CompressedPagedCache.load(tmp_path / "cache", model)
        goes_on_alike(model, cache.fork(), loaded, mask)


def test_memory_behind_the_slots_of_a_row_does_not_get_into_the_file(model, tmp_path):
    cache = kvc.CompressedPagedCache(model.config, "lossless")
    mask = torch.ones(2, 30, dtype=torch.long)
    logits(model, tokens(2, 30), cache, mask)
    mask = torch.cat([mask, torch.tensor([[1], [0]])], 1)
    logits(model, tokens(2, 1), cache, mask)
    files = []
    for secret in (7.0, 9.0):
        store = cache.inspect().stores[0]
        store.tail_keys[:, 1] = store.tail_values[:, 1] = secret
        cache.save(tmp_path / "cache")
        files.append((tmp_path / "cache").read_bytes())
    assert files[0] == files[1]


def test_copies_are_forks(model):
    cache = kvc.prefill(model, tokens(1, 50), "k8v4")
    more = tokens(1, 40, seed=3)
    expected = logits(model, more, cache.fork())
    for make in (copy.copy, copy.deepcopy):
        parent = cache.fork()
        copied = make(parent)
        del parent
        other = kvc.prefill(model, tokens(1, 50, seed=4), "k8v4")  # takes the pages that came free, if any did
        assert torch.equal(logits(model, more, copied), expected) and other.get_seq_length() == 50
        assert cache.get_seq_length() == 50


def test_pickling_says_what_to_do(model):
    cache = kvc.prefill(model, tokens(1, 20), "k8v4")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match=r"cache.save\(path\)"):
            pickle.dumps({"past": cache}, protocol=protocol)
    with pytest.raises(TypeError, match=r"cache.save\(path\)"):
        torch.save([cache], io.BytesIO())
    out = model.generate(tokens(1, 20), max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(TypeError, match="such as output.sequences"):
        pickle.dumps(out)
    assert torch.equal(pickle.loads(pickle.dumps(out.sequences)), out.sequences)
    assert logits(model, tokens(1, 3), cache).shape[1] == 3


def test_a_cache_filled_by_other_weights_is_refused(model, tmp_path):
    ids = tokens(1, 50)
    cache = kvc.prefill(model, ids, "k8v4")
    cache.save(tmp_path / "cache")
    question = torch.cat([ids, tokens(1, 5, seed=2)], 1)
    expected = model.generate(question, past_key_values=cache.fork(), max_new_tokens=4, do_sample=False)
    other = build(seed=1)
    loaded = kvc.CompressedPagedCache.load(tmp_path / "cache", model)
    for each in (cache, cache.fork(), loaded):
        with pytest.raises(ValueError, match="holds 50 tokens that were read with other weights"):
            other.generate(question, past_key_values=each, max_new_tokens=4)
    same = copy.deepcopy(model)
    again = same.generate(question, past_key_values=cache.fork(), max_new_tokens=4, do_sample=False)
    assert torch.equal(again, expected)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "v_proj" in name:
                parameter.mul_(1.01)
    with pytest.raises(ValueError, match="other weights"):
        tuned.generate(question, past_key_values=cache.fork(), max_new_tokens=4)
    cache.reset()  # empty, so it is anybody's
    assert other.generate(ids, past_key_values=cache, max_new_tokens=4).shape == (1, 54)
