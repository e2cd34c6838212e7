"""One context and many questions, chats that keep their cache, and what forks cost."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import kvcompress_hf as kvc

ROOT = Path(__file__).parents[2]
NAME = ROOT / "examples" / "models" / "kvlm-tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(NAME)


@pytest.fixture(scope="module")
def model():
    model = kvc.patch(AutoModelForCausalLM.from_pretrained(NAME).float(), "lossless")
    kvc.prefill(model, torch.tensor([[5, 6, 7]]), "auto")  # learns how positions turn queries, once per model
    return model


@pytest.fixture(scope="module")
def context(tokenizer):
    text = (NAME / "haystack.txt").read_text()[:2500]
    return tokenizer(text + " The pass key is 71432. Remember it. " + text, return_tensors="pt").input_ids


@pytest.fixture
def counted(model):
    """How many tokens go through the model."""
    counts = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(args[0].shape[1]), with_kwargs=True
    )
    yield counts
    handle.remove()


def question(tokenizer, text):
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


QUESTIONS = ("\nWhat is the pass key? The pass key is", "\nWho was there?", " The moor was")


@pytest.mark.parametrize("recipe", ["lossless", "auto", "roco"])
def test_many_questions_leave_the_parent_as_it_was(model, tokenizer, context, recipe, counted, tmp_path):
    cache = kvc.prefill(model, context, recipe)
    assert sum(counted) == context.shape[1]
    cache.save(tmp_path / "before")
    before = (tmp_path / "before").read_bytes()
    for text in QUESTIONS:
        ids = question(tokenizer, text)
        whole = torch.cat([context, ids], dim=1)
        counted.clear()
        answer = model.generate(whole, kvcompress=cache.fork(), max_new_tokens=6, do_sample=False)
        assert sum(counted) == ids.shape[1] + 5  # the context is not read again
        # Only the question, with the mask of everything.
        short = model.generate(
            ids,
            attention_mask=torch.ones_like(whole),
            kvcompress=copy.deepcopy(cache),
            max_new_tokens=6,
            do_sample=False,
        )
        assert torch.equal(short[:, ids.shape[1] :], answer[:, whole.shape[1] :])
        if recipe == "lossless":
            assert torch.equal(answer, model.generate(whole, max_new_tokens=6, do_sample=False, kvcompress=recipe))
        cache.save(tmp_path / "after")
        assert (tmp_path / "after").read_bytes() == before
    assert cache.memory().forks == 0 and cache.get_seq_length() == context.shape[1]


def test_questions_on_a_padded_batch_of_contexts(model, tokenizer):
    texts = [(NAME / "haystack.txt").read_text()[start : start + size] for start, size in ((0, 2000), (9000, 800))]
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    cache = kvc.prefill(model, batch.input_ids, "auto", attention_mask=batch.attention_mask)
    ids = question(tokenizer, QUESTIONS[0]).expand(2, -1)
    mask = torch.cat([batch.attention_mask, torch.ones_like(ids)], dim=1)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    both = model.generate(ids, attention_mask=mask, kvcompress=cache.fork(), **arguments)
    for row, text in enumerate(texts):
        alone = tokenizer(text, return_tensors="pt").input_ids
        one = kvc.prefill(model, alone, "auto")
        whole = torch.cat([alone, ids[:1]], dim=1)
        expected = model.generate(whole, kvcompress=one, **arguments)
        assert torch.equal(both[row, ids.shape[1] :], expected[0, whole.shape[1] :])


def test_a_prompt_that_the_cache_already_holds_is_refused(model, tokenizer, context):
    cache = kvc.prefill(model, context, "k8v4")
    for ids in (question(tokenizer, QUESTIONS[0]), context):
        with pytest.raises(ValueError, match=rf"holds {context.shape[1]}.*only the new tokens with an attention_mask"):
            model.generate(ids, kvcompress=cache.fork(), max_new_tokens=4)


@pytest.mark.parametrize("recipe", ["k8v4", "kv-compress"])
def test_ten_forks_of_4096_tokens_cost_little_until_they_diverge(recipe, held_bytes, tiny_llama):
    model = tiny_llama(eos_token_id=2, initializer_range=0.02, head_dim=128, max_position_embeddings=8192).to(
        torch.bfloat16
    )
    cache = kvc.prefill(model, torch.randint(0, 64, (1, 4096)), recipe)
    kvc.patch(model, recipe)
    with torch.no_grad():
        model(torch.tensor([[1]]), past_key_values=cache)
    one = held_bytes(cache)
    assert one == cache.memory().total
    forks = [cache.fork() for _ in range(10)]
    assert held_bytes(cache, *forks) <= 1.02 * one
    with torch.no_grad():
        for i, fork in enumerate(forks):
            model(torch.tensor([[i]]), past_key_values=fork)
    assert held_bytes(cache, *forks) > 1.02 * one  # the walk does see what diverges


TURNS = ("The sea was calm that day.", " What did he see?", " And then? The", " So it was.")


def test_a_chat_through_generate_reads_only_what_is_new(model, tokenizer, counted):
    cache = kvc.CompressedPagedCache(model.config, "lossless")
    ids = tokenizer("", return_tensors="pt").input_ids[:, :0]
    for turn in TURNS:
        new = tokenizer(turn, return_tensors="pt", add_special_tokens=False).input_ids
        ids = torch.cat([ids, new], dim=1)
        counted.clear()
        expected = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert sum(counted) == ids.shape[1] + 4
        seen = cache.get_seq_length()
        counted.clear()
        ids = model.generate(ids, kvcompress=cache, max_new_tokens=5, do_sample=False)
        assert torch.equal(ids, expected)
        # The last token of an answer goes in with the next turn.
        assert sum(counted) == new.shape[1] + (seen > 0) + 4
        assert cache.get_seq_length() == ids.shape[1] - 1


def test_a_chat_through_a_pipeline_reads_only_what_is_new(model, tokenizer, counted):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    cache = kvc.CompressedPagedCache(model.config, "lossless")
    text, before = "", 0
    for turn in TURNS:
        text += turn
        tokens = len(tokenizer(text).input_ids)
        counted.clear()
        answer = pipe(text, kvcompress=cache, max_new_tokens=5, do_sample=False)[0]["generated_text"]
        assert sum(counted) == tokens - before + 4
        assert answer == pipe(text, max_new_tokens=5, do_sample=False)[0]["generated_text"]
        text, before = answer, cache.get_seq_length()
        # What makes this work: the answer's text gives the tokens that the cache has seen.
        assert len(tokenizer(text).input_ids) == before + 1
    kept = kvc.report(model)
    assert kept is not None


@pytest.mark.parametrize("recipe", ["kv-compress", "auto"])
def test_a_chat_goes_on_after_save_and_load_in_every_turn(model, tokenizer, context, recipe, tmp_path):
    kept = kvc.prefill(model, context, recipe)
    stored = kept.fork()
    ids = context
    for turn in TURNS:
        ids = torch.cat([ids, question(tokenizer, turn)], dim=1)
        stored.save(tmp_path / "chat")
        stored = kvc.CompressedPagedCache.load(tmp_path / "chat", model)
        again = model.generate(ids, kvcompress=stored, max_new_tokens=9, do_sample=False)
        ids = model.generate(ids, kvcompress=kept, max_new_tokens=9, do_sample=False)
        assert torch.equal(again, ids)
