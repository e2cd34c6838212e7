"""The repository's trained model on real text: what the demo shows, in small."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompress_hf as kvc
from kvcompress_hf.cli.facts import make_questions

MODEL = Path(__file__).parents[1] / "examples" / "models" / "kvlm-tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def questions(tokenizer):
    text = (MODEL / "haystack.txt").read_text()
    return make_questions(tokenizer, text, count=12, prompt_tokens=2200, seed=0)


def right_answers(model, tokenizer, questions, **kwargs):
    right, kept, caches = 0, [], []
    for question in questions:
        ids = tokenizer(question.prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=9, do_sample=False, return_dict_in_generate=True, **kwargs)
        answer = tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        right += question.is_right(answer)
        kept.append(out.sequences[0, ids.shape[1] :].tolist())
        caches.append(kvc.cache_of(out))
    return right, kept, caches


def test_facts_in_2200_tokens_are_found_and_compression_keeps_them(model, tokenizer, questions):
    assert all(2000 < len(tokenizer(q.prompt).input_ids) <= 2200 for q in questions)
    stock, tokens, _ = right_answers(model, tokenizer, questions)
    assert stock >= 9
    with kvc.patched(model, "lossless"):
        right, same, _ = right_answers(model, tokenizer, questions)
        assert right == stock and same == tokens
    with kvc.patched(model, "k8v4"):
        right, _, _ = right_answers(model, tokenizer, questions)
        assert right >= stock - 1  # one answer of twelve may turn on a rounding, either way
    # In float32 an eighth of the bytes is what a quarter is in 16 bits.
    with kvc.patched(model, "kv-compress", budget=1 / 8, tiers="k8v4"):
        right, _, caches = right_answers(model, tokenizer, questions)
        assert right >= stock - 2
        heads = torch.cat([layer.flatten() for layer in caches[0].slots()])
        assert heads.unique().numel() > 1 and heads.max() < 2200
        assert all(cache.memory().ratio < 0.135 for cache in caches)
    with kvc.patched(model, "streaming", budget=1 / 16):
        right, _, _ = right_answers(model, tokenizer, questions)
        assert right <= stock / 2  # a control: blind eviction must lose the facts, or the test shows nothing
