"""The evaluation model: heads that training made find facts in real text, and compression keeps what they need."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompress_hf as kvc
from kvcompress_hf.cli.facts import make_questions
from kvcompress_hf.cli.models import find_model

MODEL = Path(find_model("eval"))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def prompts():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    questions = make_questions(tokenizer, (MODEL / "haystack.txt").read_text(), count=8, prompt_tokens=1500, seed=1)
    ids = [tokenizer(question.prompt, return_tensors="pt").input_ids for question in questions]
    assert all(1300 < prompt.shape[1] <= 1500 for prompt in ids)
    return tokenizer, list(zip(questions, ids, strict=True))


def right_answers(model, prompts):
    tokenizer, asked = prompts
    right, ratios = 0, []
    for question, ids in asked:
        out = model.generate(ids, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
        right += question.is_right(tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True))
        if isinstance(kvc.cache_of(out), kvc.CompressedPagedCache):
            ratios.append(kvc.cache_of(out).memory().ratio)
    return right, ratios


def test_facts_are_found_and_an_eighth_of_the_bytes_keeps_them(model, prompts):
    stock, _ = right_answers(model, prompts)
    assert stock >= 7
    with kvc.patched(model, "auto", budget=1 / 8):
        right, ratios = right_answers(model, prompts)
        assert right >= stock - 1 and max(ratios) < 0.135
    with kvc.patched(model, "streaming", budget=1 / 8):
        assert right_answers(model, prompts)[0] <= stock / 2  # a control: blind eviction must lose the facts


def test_answers_to_questions_that_come_later_are_kept_too(model, prompts):
    tokenizer, asked = prompts
    window = dataclasses.replace(kvc.get_preset("auto").observer, non_causal=False, foresee=False)

    def right(**changes):
        found = 0
        for question, _ in asked:
            context, later = question.prompt.split("\nWhat")
            ids = tokenizer(context, return_tensors="pt").input_ids
            cache = kvc.prefill(model, ids, "auto", budget=1 / 16, **changes)
            assert cache.memory().ratio < 0.075
            later = tokenizer("\nWhat" + later, add_special_tokens=False, return_tensors="pt").input_ids
            ids = torch.cat([ids, later], 1)
            out = model.generate(ids, kvcompress=cache, max_new_tokens=9, do_sample=False)
            found += question.is_right(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        return found

    stock, _ = right_answers(model, prompts)
    with kvc.patched(model):
        assert right() >= stock - 1
        assert right(observer=window) <= stock / 2  # a control: the last queries cannot know the question


def test_the_heads_that_ablation_found_are_needed(model, prompts):
    heads = json.loads((MODEL / "figures.json").read_text())["ablation"]["heads"]
    assert len(heads) == model.config.num_hidden_layers * model.config.num_attention_heads
    size, stock = model.config.head_dim, right_answers(model, prompts)[0]

    def without(head):
        def clear(_module, args):
            outputs = args[0].clone()
            outputs[..., head["head"] * size : (head["head"] + 1) * size] = 0
            return (outputs,)

        hook = model.model.layers[head["layer"]].self_attn.o_proj.register_forward_pre_hook(clear)
        try:
            return right_answers(model, prompts)[0]
        finally:
            hook.remove()

    assert without(heads[0]) <= stock / 2 and without(heads[-1]) >= stock - 1
