"""Reading a prompt again, against the attention matrices of the stock model."""

import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument

TOKENS, LEAD = 70, 8


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(eos_token_id=2, vocab_size=97, head_dim=16, initializer_range=0.3, attn_implementation="eager")


def prompt(batch=1, seed=0):
    return torch.randint(1, 97, (batch, TOKENS), generator=torch.Generator().manual_seed(seed))


def recipe(score="max", chunk=32, **changes):
    parts = dict(budget=kvc.Budget(10**6), plan=kvc.LowestPlan(), when=kvc.When(decode=score == "square")) | changes
    return kvc.Recipe(observer=kvc.ReconstructionScores(chunk=chunk, score=score), **parts)


@torch.no_grad()
def dense_scores(model, ids, score, chunk):
    """Per layer `[kv_heads, tokens]`, from the attention matrices of every chunk read after the whole prompt."""
    past = kvc.cache_of(model(ids, use_cache=True, **as_argument(model, DynamicCache())))
    result = [torch.zeros(2, TOKENS) for _ in range(2)]
    for start in range(0, TOKENS, chunk):
        part = ids[:, max(0, start - LEAD) : start + chunk]
        positions = torch.arange(TOKENS, TOKENS + part.shape[1])[None]
        again = as_argument(model, copy.deepcopy(past))
        out = model(part, position_ids=positions, output_attentions=True, **again)
        for layer, p in enumerate(out.attentions):
            p = p[0, :, :, :TOKENS].unflatten(0, (2, 2))  # kv head, group, query, key
            if score == "max":
                result[layer] = torch.maximum(result[layer], p.amax((1, 2)))
            else:
                result[layer] += p.square().sum((1, 2))
    return result


def stored(cache):
    store = cache.inspect().stores[0]
    order = store.read_field(0, "position").long().argsort(-1)
    scores = store.read_field(0, "score").gather(-1, order)
    return scores.view(store.layers, store.batch, -1, scores.shape[-1])


@pytest.mark.parametrize("score", ["max", "square"])
@pytest.mark.parametrize("chunk", [16, 32, 100])
def test_scores_are_those_of_the_attention_matrices(model, score, chunk):
    cache = kvc.prefill(model, prompt(), recipe(score, chunk))
    assert cache.get_seq_length() == TOKENS and not cache.awaits_second_reading
    for layer, expected in enumerate(dense_scores(model, prompt(), score, chunk)):
        torch.testing.assert_close(stored(cache)[layer, 0], expected, atol=1e-4, rtol=1e-3)


def test_padding_changes_nothing(model):
    ids, mask = prompt(2), torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :9] = 0
    cache = kvc.prefill(model, ids, recipe(chunk=100), attention_mask=mask)
    alone = kvc.prefill(model, ids[1:, 9:], recipe(chunk=100))
    together = stored(cache)[:, 1].sort(-1, descending=True).values
    expected = stored(alone)[:, 0].sort(-1, descending=True).values
    torch.testing.assert_close(together[..., : TOKENS - 9], expected, atol=1e-4, rtol=1e-3)
    assert not together[..., TOKENS - 9 :].any()


def test_a_prompt_in_chunks_is_read_again_as_a_whole(model):
    whole = stored(kvc.prefill(model, prompt(), recipe()))
    pieces = stored(kvc.prefill(model, prompt(), recipe(), chunk_size=24))
    torch.testing.assert_close(whole, pieces, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("preset", ["kvzip", "auto-kvzip"])
def test_generate_reads_again_before_it_compresses(model, preset):
    ids = prompt(2)
    arguments = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    with kvc.patched(model, preset, budget=0.4):
        out = model.generate(ids, **arguments, return_dict_in_generate=True)
        stored_alone = kvc.prefill(model, ids[:1], preset, budget=0.4)
        alone = model.generate(ids[:1], **arguments)
    cache = kvc.cache_of(out)
    assert not cache.awaits_second_reading and cache.run_report.statistics.evicted_slots
    assert stored_alone.run_report.statistics.evicted_slots
    assert torch.equal(out.sequences[:1], alone)


def test_what_cannot_be_read_again_is_refused(model):
    embeds = model.get_input_embeddings()(prompt())
    with kvc.patched(model, "kvzip"), pytest.raises(kvc.UnsupportedFeatureError, match="needs its token ids"):
        model.generate(inputs_embeds=embeds, max_new_tokens=4)
    changed = recipe("square", when=kvc.When(every=4))
    with kvc.patched(model, changed):
        cache = kvc.CompressedPagedCache(model.config, changed)
        ids = prompt()
        model(ids, past_key_values=cache)
        with pytest.raises(kvc.UnsupportedFeatureError, match="filled without"):
            for _ in range(5):
                model(ids[:, :1], past_key_values=cache)


def test_values_are_refused():
    with pytest.raises(ValueError, match=r"ReconstructionScores.score is 'mean'; it must be 'max' or 'square'"):
        kvc.ReconstructionScores(score="mean")
    with pytest.raises(ValueError, match="chunk is 4"):
        kvc.ReconstructionScores(chunk=4)
