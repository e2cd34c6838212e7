"""`kvcompress eval`, on a tiny random model with a tiny tokenizer."""

import json
import math
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import kvcompress_hf as kvc
from kvcompress_hf.cli import main, parse_budget, suites, suites_run
from kvcompress_hf.cli.evaluate import make_cells, wilson
from kvcompress_hf.presets import resolve_recipe

LENGTH = 448


@pytest.fixture(scope="module")
def text():
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 8))) for _ in range(150)]
    return " ".join(" ".join(rng.choices(words, k=9)).capitalize() + "." for _ in range(400))


@pytest.fixture(scope="module")
def tokenizer(text):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([text], trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(eos_token_id=2, vocab_size=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer, text):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "haystack.txt").write_text(text)
    return path


@pytest.fixture(scope="module")
def samples(tokenizer, text):
    return suites.make_samples(tokenizer, text, count=2, length=LENGTH, seed=1)


# -- samples -----------------------------------------------------------------------------------------------------------


def test_samples_hold_their_answers(samples, tokenizer):
    assert [sample.task for sample in samples] == 2 * list(suites.TASKS)
    for sample in samples:
        assert LENGTH - 60 < len(sample.context) <= LENGTH
        assert sample.context[0] == tokenizer.bos_token_id
        context = tokenizer.decode(sample.context)
        assert len(sample.questions) == (1 if sample.task == "prose" else suites.QUESTIONS)
        for question in sample.questions:
            assert question.ids and question.answer
            if sample.task == "copy":
                joined = question.ids[1:] + question.answer
                assert any(sample.context[i : i + len(joined)] == joined for i in range(LENGTH))
            elif sample.task != "prose":
                assert tokenizer.decode(question.answer) in context
                assert tokenizer.decode(question.answer).isdigit()


def test_samples_depend_on_the_seed_alone(samples, tokenizer, text):
    assert suites.make_samples(tokenizer, text, count=1, length=LENGTH, seed=1) == samples[: len(suites.TASKS)]
    assert suites.make_samples(tokenizer, text, count=2, length=LENGTH, seed=2) != samples


def test_too_little_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the text has"):
        suites.make_samples(tokenizer, "Too short a text for this. And no more.", count=1, length=LENGTH)
    with pytest.raises(ValueError, match="at least 192 tokens"):
        suites.make_samples(tokenizer, "Anything.", count=1, length=10)


def test_too_short_contexts_are_refused(tokenizer, text):
    with pytest.raises(ValueError, match="contexts of 200 tokens are too short"):
        suites.make_samples(tokenizer, text, count=1, length=200)


# -- measuring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["lossless", "k4v2", "snapkv", "kv-compress", "h2o", "leankv", "auto", "keydiff"])
def test_a_replayed_prompt_is_a_prefill(model, samples, recipe):
    sample, recipe = samples[1], resolve_recipe(recipe)
    question = sample.questions[0]
    prefilled = kvc.prefill(model, torch.tensor([sample.context]), recipe)
    with torch.inference_mode(), kvc.patched(model, "lossless"):
        replayed = suites_run.Prompt(model, sample.context).fill(recipe)
        assert replayed.memory() == prefilled.memory()
        assert all(torch.equal(a, b) for a, b in zip(replayed.slots(), prefilled.slots(), strict=True))
        outputs = [
            suites_run.answer_on(model, cache, question.ids, question.answer).logits for cache in (replayed, prefilled)
        ]
    assert torch.equal(*outputs)


def test_lossless_answers_are_the_full_cache_s(model, samples):
    sample = samples[0]
    for question in sample.questions:
        with torch.inference_mode():
            full = suites_run.reference(model, sample.context, question)
            with kvc.patched(model, "lossless"):
                cache = suites_run.Prompt(model, sample.context).fill(resolve_recipe("lossless"))
                outputs = suites_run.answer_on(model, cache, question.ids, question.answer)
        errors = suites_run.output_errors(outputs, full)
        assert errors["logits"] < 1e-4 and max(errors["layers"]) < 1e-4 and len(errors["layers"]) == 2
        scores = suites_run.answer_scores(outputs, full, question.answer)
        assert scores["same"] == 1 and abs(scores["kl"]) < 1e-6


def test_questions_leave_the_prompt_s_cache_alone(model, samples):
    sample = samples[1]
    with torch.inference_mode(), kvc.patched(model, "lossless"):
        cache = suites_run.Prompt(model, sample.context).fill(resolve_recipe("snapkv"))
        before = [layer.clone() for layer in cache.slots()]
        first, second, again = (
            suites_run.answer_on(model, cache.fork(), question.ids, question.answer).logits
            for question in (*sample.questions, sample.questions[0])
        )
        assert cache.get_seq_length() == len(sample.context)
        assert all(torch.equal(a, b) for a, b in zip(before, cache.slots(), strict=True))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_scores_by_hand():
    full = suites_run.Outputs(torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]]))
    other = suites_run.Outputs(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    scores = suites_run.answer_scores(other, full, [1, 0])
    first = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    p = math.e / (1 + math.e)
    second = 0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))
    assert scores["kl"] == pytest.approx((first + second) / 2)
    assert scores["nll"] == pytest.approx((math.log(2) - math.log(p)) / 2)
    assert not scores["exact"] and scores["tokens"] == 0.5


def test_wilson():
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(10, 10)[1] == pytest.approx(1) and wilson(0, 10)[0] == 0


# -- the command -------------------------------------------------------------------------------------------------------


def test_cells():
    cells = make_cells("k8v4, kv-compress@k4v4, auto@page_bytes=4096@k8v4+k4v2", "1/4,64")
    assert [(cell.name.split("@")[0], cell.budget) for cell in cells] == [
        ("k8v4", ""),
        *[(name, budget) for name in ("kv-compress", "auto") for budget in ("1/4", "64")],
    ]
    assert cells[1].recipe.tiers == ("k4v4",) and cells[1].recipe.budget.amount == 0.25
    assert cells[4].recipe.page_bytes == 4096 and cells[4].recipe.tiers == ("k8v4", "k4v2")
    for recipes, budgets in (("nothing-such", "1/4"), ("snapkv", "2/1"), ("snapkv", ""), ("k8v4@size=3", "1/4")):
        with pytest.raises(ValueError):
            make_cells(recipes, budgets)


def test_quick_suite(folder, tmp_path, capsys):
    figures, curves = tmp_path / "eval.json", tmp_path / "eval.png"
    arguments = ["--model", str(folder), "--recipes", "lossless,snapkv,random", "--budgets", "1/2,1/4"]
    arguments += ["--samples", "1", "--context", str(LENGTH), "--json", str(figures), "--plot", str(curves), "--debug"]
    assert main(["eval", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.count("snapkv") == 4 and "Question unseen" in printed and "Question seen" in printed
    assert str(folder.parent) not in figures.read_text()
    read = json.loads(figures.read_text())
    assert {"model", "date", "machine", "versions", "seed", "context_tokens"} <= read.keys()
    assert read["full"]["questions"] == 10
    cells = {(cell["recipe"], cell["budget"]): cell for cell in read["cells"]}
    assert list(cells) == [("lossless", ""), *[(name, b) for name in ("snapkv", "random") for b in ("1/2", "1/4")]]
    for cell in cells.values():
        assert kvc.Recipe.from_dict(cell["definition"]).name in ("lossless", "snapkv", "random")
        for mode in ("unseen", "seen"):
            assert cell[mode]["questions"] == 10 and cell[mode]["kl"] > -1e-6
            assert 0 <= cell[mode]["attention"] < 2 and 0 <= cell[mode]["logits"] < 2
            assert not cell["budget"] or cell[mode]["ratio_most"] <= parse_budget(cell["budget"])
            assert ("prose" in cell[mode]) == (mode == "unseen")
    assert abs(cells["lossless", ""]["unseen"]["kl"]) < 1e-6 and cells["lossless", ""]["seen"]["tokens_as_full"] == 1
    assert cells["snapkv", "1/4"]["seen"]["ratio"] < cells["snapkv", "1/2"]["seen"]["ratio"] < 0.6
    assert cells["snapkv", "1/4"]["unseen"]["kl"] > 1e-4
    assert curves.read_bytes().startswith(b"\x89PNG")


def test_output_error_suite(folder, tmp_path, capsys):
    figures, curves = tmp_path / "errors.json", tmp_path / "errors.png"
    arguments = ["--suite", "output-error", "--model", str(folder), "--recipes", "lossless,k4v4,snapkv"]
    arguments += ["--budgets", "1/4", "--samples", "1", "--context", str(LENGTH), "--modes", "unseen"]
    assert main(["eval", *arguments, "--json", str(figures), "--plot", str(curves), "--debug"]) == 0
    assert "layer 1" in capsys.readouterr().out and curves.stat().st_size > 1000
    cells = {cell["recipe"]: cell["unseen"] for cell in json.loads(figures.read_text())["cells"]}
    assert cells["lossless"]["logits"] < 1e-4 < cells["k4v4"]["logits"] < cells["snapkv"]["logits"]
    assert all(len(cell["layers"]) == 2 for cell in cells.values())


def test_a_run_adds_to_an_earlier_one(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["eval", "--model", str(folder), "--samples", "1", "--context", str(LENGTH), "--modes", "unseen"]
    figures = tmp_path / "kvcompress_eval.json"
    assert main([*arguments, "--recipes", "k8v4"]) == 0
    first = json.loads(figures.read_text())["cells"]
    assert figures.with_suffix(".png").exists()
    assert main([*arguments, "--recipes", "k8v4,k4v4", "--add"]) == 0
    both = json.loads(figures.read_text())
    assert [cell["recipe"] for cell in both["cells"]] == ["k8v4", "k4v4"] and both["cells"][:1] == first
    assert main([*arguments, "--recipes", "snapkv", "--add", "--seed", "1"]) == 1
    assert "seed=0" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["auto", "kv-compress", "h2o", "snapkv", "k8v4"])
def test_bytes_are_those_of_a_cache_that_decodes(model, samples, recipe):
    """With the tail's room, and nothing that only the measuring took; the cache is as it was."""
    recipe = resolve_recipe(recipe)
    token = torch.zeros((1, 1), dtype=torch.int64)
    with torch.inference_mode(), kvc.patched(model, "lossless"):
        prompt = suites_run.Prompt(model, samples[1].context)
        measured, plain = prompt.fill(recipe), prompt.fill(recipe)
        ratio = suites_run.ratio_while_decoding(model, measured)
        assert measured.get_seq_length() == plain.get_seq_length()
        again = model(token, past_key_values=measured).logits
        assert torch.equal(again, model(token, past_key_values=plain).logits)
        # What the taken back token leaves noted until the next pass is a few hundred bytes, and counted.
        assert ratio == pytest.approx(plain.memory().ratio, rel=0.003)


def test_mistakes_are_named(folder, tmp_path, capsys):
    for arguments, message in (
        (["--recipes", "no-such"], "Unknown preset 'no-such'"),
        (["--modes", "sideways"], "--modes 'sideways'"),
        (["--text", str(tmp_path / "none.txt")], "no long text"),
        (["--samples", "0"], "at least 1 context"),
    ):
        assert main(["eval", "--model", str(folder), *arguments]) == 1
        assert message in capsys.readouterr().err
