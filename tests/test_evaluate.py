"""`kvcompress eval`: contexts, probes, measuring and the command, on a tiny random model and on one that retrieves."""

import json
import math
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import kvcompress_hf as kvc
from kvcompress_hf.cli import main, parse_budget, suites, suites_run
from kvcompress_hf.cli.chat import chat_form, plain_form
from kvcompress_hf.cli.eval_run import Run
from kvcompress_hf.cli.evaluate import MODES, make_cells
from kvcompress_hf.cli.linears import linears_in_float32
from kvcompress_hf.cli.models import find_model
from kvcompress_hf.cli.texts import SPLITS, Text, find_texts, pieces_of
from kvcompress_hf.presets import resolve_recipe

AMOUNTS = suites.Amounts(tokens=24, summary=12, turn=6, cue=8, copied=8)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)

LENGTH = 800


@pytest.fixture(scope="module")
def text():
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 8))) for _ in range(150)]
    return " ".join(" ".join(rng.choices(words, k=9)).capitalize() + "." for _ in range(700))


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
def texts(text):
    middle = text.index(". ", len(text) // 2) + 1
    return [Text("first", text[:middle]), Text("second", text[middle:])]


def make(tokenizer, texts, **changes):
    arguments = {"count": 2, "length": LENGTH, "amounts": AMOUNTS, "seed": 1, **changes}
    return suites.make_samples(tokenizer, texts, arguments.pop("form", plain_form()), **arguments)


@pytest.fixture(scope="module")
def samples(tokenizer, texts):
    return make(tokenizer, texts)


def of(sample, probe):
    return [exchange for exchange in sample.exchanges if exchange.probe == probe]


# -- texts -------------------------------------------------------------------------------------------------------------


def test_splits_have_no_author_and_no_text_in_common():
    found = {split: find_texts("smollm2", split) for split in SPLITS}
    authors = {split: {text.name.split("_")[0] for text in texts} for split, texts in found.items()}
    assert all(len(names) == len(found[split]) >= 8 for split, names in authors.items())
    assert not authors["dev"] & authors["test"]
    pieces = {
        split: {p for text in texts for p in pieces_of(text.text) if len(p) > 80} for split, texts in found.items()
    }
    assert len(pieces["dev"]) > 1000 and not pieces["dev"] & pieces["test"]


def test_a_model_with_a_text_of_its_own_has_both_splits_from_it(folder, text):
    [dev], [test] = (find_texts(str(folder), split) for split in SPLITS)
    assert dev.text + test.text == text and abs(len(dev.text) - len(test.text)) < 200


def test_given_texts(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.txt").write_text(name)
    assert [text.name for text in find_texts("any", "dev", tmp_path)] == ["a", "b"]
    assert find_texts("any", "test", tmp_path / "b.txt") == [Text("b", "b")]
    with pytest.raises(FileNotFoundError, match="no long text at"):
        find_texts("any", "dev", tmp_path / "none.txt")


def test_pieces_are_the_text():
    text = "He said: “Go!” She\nwent.  Then\r\n\r\n\r\nA new paragraph? 'Yes.' Mr. X"
    assert pieces_of(text) == ['He said: "Go!"', " She went.", " Then", "\n\nA new paragraph?", " 'Yes.'", " Mr.", " X"]


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_samples_hold_their_answers(tokenizer, texts, chat):
    tokenizer.chat_template = TEMPLATE
    samples = make(tokenizer, texts, form=chat_form(tokenizer) if chat else plain_form())
    assert [sample.text for sample in samples] == ["first", "second"]
    for sample, text in zip(samples, texts, strict=True):
        last = sample.exchanges[0].turns[0].given[0]  # the context's last token begins every exchange
        whole = [*sample.context, last]
        assert LENGTH - 60 < len(whole) <= LENGTH and whole[0] == tokenizer.bos_token_id
        assert tokenizer.decode(whole).count("[user]") == chat
        assert [exchange.probe for exchange in sample.exchanges] == (
            ["needle"] + 3 * ["multi-key"] + 3 * ["copy"] + ["prose", "summary", "generation", "conversation"]
        )
        assert all(exchange.turns[0].given[0] == last for exchange in sample.exchanges)
        for exchange in of(sample, "needle") + of(sample, "multi-key"):
            [turn] = exchange.turns
            answer = tokenizer.decode(turn.answer)
            assert answer.isdigit() and answer in tokenizer.decode(whole)
            assert tokenizer.decode(turn.given).count("[assistant]") == chat
        for exchange in of(sample, "copy"):
            passage = exchange.turns[0].given[-AMOUNTS.cue :] + exchange.turns[0].answer
            assert len(passage) == AMOUNTS.cue + AMOUNTS.copied
            assert any(whole[i : i + len(passage)] == passage for i in range(LENGTH))
        [prose] = of(sample, "prose")
        assert len(prose.turns[0].answer) == AMOUNTS.tokens
        assert tokenizer.decode(whole[-12:] + prose.turns[0].answer) in text.text
        [talk] = of(sample, "conversation")
        assert len(talk.turns) == 10 and talk.grows and not any(turn.answer for turn in talk.turns)


def test_chat_samples_are_what_the_template_writes(tokenizer, texts):
    tokenizer.chat_template = TEMPLATE
    form = chat_form(tokenizer)
    messages = [("user", "The text.\n\nWho?"), ("assistant", "She."), ("user", "Why?")]
    messages = [{"role": role, "content": content} for role, content in messages]
    written = form.before + "The text." + form.ask("Who?") + "She." + form.ask("Why?", later=True)
    assert written == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="use plain text"):
        chat_form(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat_form(tokenizer)


def test_samples_depend_on_the_seed_alone(samples, tokenizer, texts):
    assert make(tokenizer, texts, count=1) == samples[:1]
    assert make(tokenizer, texts, seed=2)[0].context != samples[0].context
    many = make(tokenizer, texts, count=6)
    assert many[:2] == samples and len({tuple(sample.context) for sample in many}) == 6


@pytest.mark.parametrize(
    ("short", "changes", "message"),
    [
        (Text("short", "Too short a text for this. And no more."), {}, "the text short has"),
        (None, {"length": 10}, "at least 192 tokens"),
        (None, {"length": 200}, "contexts of 200 tokens are too short: give at least"),
        (None, {"count": 0}, "at least 1 context"),
    ],
)
def test_what_cannot_be_made_is_refused(tokenizer, texts, short, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tokenizer, [short] if short else texts, **changes)


# -- measuring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["lossless", "k4v2", "snapkv", "kv-compress", "h2o", "leankv", "auto", "keydiff"])
def test_a_replayed_prompt_is_a_prefill(model, samples, recipe):
    sample, recipe = samples[1], resolve_recipe(recipe)
    question = sample.exchanges[0]
    prefilled = kvc.prefill(model, torch.tensor([sample.context]), recipe)
    with torch.inference_mode(), kvc.patched(model, "lossless"):
        replayed = suites_run.Prompt(model, sample.context).fill(recipe)
        assert replayed.memory() == prefilled.memory()
        assert all(torch.equal(a, b) for a, b in zip(replayed.slots(), prefilled.slots(), strict=True))
        outputs = [suites_run.play(model, cache, question).logits for cache in (replayed, prefilled)]
    assert torch.equal(*outputs)


def test_the_full_cache_is_a_stock_forward_pass(model, samples):
    sample = samples[0]
    turns = (suites.Turn([5, 6], [7, 8, 9]), suites.Turn([10], [11]))
    with torch.inference_mode():
        ids = torch.tensor([[*sample.context, 5, 6, 7, 8, 9, 10]])
        stock = model(ids).logits[0, [-5, -4, -3, -1]]
        with kvc.patched(model, "lossless"):
            full = suites_run.FullCache(model, sample.context)
            played = [full.play(suites.Exchange("any", turns, grows=grows)) for grows in (False, True, False)]
    for outputs in played:  # each from the context alone
        assert torch.allclose(outputs.logits, stock, atol=1e-4)


def test_missing_answers_are_greedy_decoding(model, samples):
    [talk] = of(samples[0], "conversation")
    ids = torch.tensor([samples[0].context + talk.turns[0].given])
    stock = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=talk.write, do_sample=False)
    with torch.inference_mode(), kvc.patched(model, "lossless"):
        cache = suites_run.Prompt(model, samples[0].context).fill(resolve_recipe("lossless"))
        written = suites_run.write_answers(model, cache, talk)
        assert [turn.given for turn in written.turns] == [turn.given for turn in talk.turns]
        assert all(0 < len(turn.answer) <= talk.write for turn in written.turns)
        assert written.turns[0].answer == stock[0, ids.shape[1] :].tolist()
        assert suites_run.write_answers(model, cache, written) == written


def test_questions_leave_the_prompt_s_cache_alone(model, samples):
    sample = samples[1]
    with torch.inference_mode(), kvc.patched(model, "lossless"):
        cache = suites_run.Prompt(model, sample.context).fill(resolve_recipe("snapkv"))
        before = [layer.clone() for layer in cache.slots()]
        first, second, again = (suites_run.play(model, cache.fork(), sample.exchanges[i]).logits for i in (0, 1, 0))
        assert cache.get_seq_length() == len(sample.context)
        assert all(torch.equal(a, b) for a, b in zip(before, cache.slots(), strict=True))
    assert torch.equal(first, again) and not torch.equal(first[:5], second[:5])


def test_what_grows_is_compressed_on_the_way(model, samples):
    turns = tuple(suites.Turn([3 + i] * 30, [4 + i] * 20) for i in range(8))
    recipe = resolve_recipe("recency", budget=1 / 4)
    with torch.inference_mode(), kvc.patched(model, "lossless"):
        prompt = suites_run.Prompt(model, samples[0].context)
        slots = []
        for grows in (False, True):
            cache = prompt.fill(recipe)
            suites_run.play(model, cache, suites.Exchange("any", turns, grows=grows))
            slots.append(sum(int(layer.sum()) for layer in cache.slots()))
    assert slots[1] < 0.7 * slots[0]


def test_scores_by_hand():
    full = suites_run.Outputs(torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]]))
    other = suites_run.Outputs(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    scores = suites_run.answer_scores(other, full, [1, 0])
    first = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    p = math.e / (1 + math.e)
    second = 0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))
    assert scores["kl"] == pytest.approx((first + second) / 2)
    assert scores["nll"] == pytest.approx((math.log(2) - math.log(p)) / 2)
    assert scores["nll_change"] == pytest.approx(scores["nll"] - (math.log(4 / 3) + math.log(2)) / 2)
    assert not scores["right"] and scores["full_right"] and scores["as_full"] == 0.5


def test_linear_layers_in_float32_change_rounding_alone(tiny_llama, monkeypatch):
    model, ids = tiny_llama(tie_word_embeddings=True).to(torch.bfloat16), torch.tensor([list(range(2, 40))])
    with torch.inference_mode():
        stock = model(ids, use_cache=False).logits
        for capability, done in (("AVX512", False), ("AVX2", True)):
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
            with linears_in_float32(model) as quicker, kvc.patched(model, "lossless"):
                logits = model(ids, use_cache=False).logits
            assert quicker == done and logits.dtype == torch.bfloat16
            assert torch.allclose(logits.float(), stock.float(), atol=0.02 * float(stock.abs().max()))
        assert torch.equal(model(ids, use_cache=False).logits, stock)
        with linears_in_float32(tiny_llama()) as quicker:
            assert not quicker  # float32 already


@pytest.fixture(scope="module")
def retrieving():
    """The evaluation model on one context, with every probe: nothing lost, little lost, and nearly everything lost."""
    name = find_model("eval")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    samples = make(tokenizer, find_texts(name, "dev"), count=1, length=700, seed=0)
    cells = make_cells("lossless,k8v4,recency", "1/16")
    full, results = Run(model, suites.PROBES, MODES).measure(samples, cells, 700)
    return full, {cell["recipe"]: cell for cell in results}


@pytest.mark.parametrize("probe", suites.PROBES)
def test_every_probe_sees_what_is_lost(retrieving, probe):
    full, cells = retrieving
    kl = {name: cell["unseen"][probe]["kl"]["value"] for name, cell in cells.items()}
    assert abs(full["unseen"][probe]["kl"]["value"]) < 1e-6
    assert abs(kl["lossless"]) < 1e-6 < kl["k8v4"] < kl["recency"] / 10 and kl["recency"] > 0.01
    assert cells["lossless"]["unseen"][probe]["as_full"]["value"] == 1
    assert cells["recency"]["unseen"][probe]["as_full"]["value"] < 1
    changes = {name: abs(cell["unseen"][probe]["nll_change"]["value"]) for name, cell in cells.items()}
    assert changes["lossless"] < 1e-5 < changes["recency"]
    if probe in suites.ASKED:
        right = full["unseen"][probe]["right"]
        assert sum(right["values"]) >= sum(right["of"]) / 2  # else the figures below would say nothing
        for mode in MODES:
            assert cells["lossless"][mode][probe]["kept"]["value"] == 1
            assert cells["recency"][mode][probe]["kept"]["value"] == 0


def test_seen_questions_are_among_what_is_compressed(retrieving):
    _, cells = retrieving
    assert set(cells["k8v4"]["seen"]) == {"questions", *suites.ASKED}
    assert abs(cells["lossless"]["seen"]["questions"]["kl"]["value"]) < 1e-5
    bytes_taken = cells["recency"]["bytes"]
    assert bytes_taken["ratio"] < 0.2 and 0 < bytes_taken["grown"] < 0.2


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


def test_the_command(folder, tmp_path, capsys):
    figures, curves = tmp_path / "eval.json", tmp_path / "eval.png"
    arguments = ["--model", str(folder), "--recipes", "lossless,snapkv,random", "--budgets", "1/2,1/4"]
    arguments += ["--probes", "needle,copy,summary", "--tokens", "8", "--against", "snapkv"]
    arguments += ["--contexts", "2", "--context", f"{LENGTH},{LENGTH + 100}"]
    assert main(["eval", *arguments, "--output", str(figures), "--plot", str(curves), "--debug"]) == 0
    captured = capsys.readouterr()
    for words in (
        "Answers, 800 tokens",
        "Text, 900 tokens",
        "copy ΔNLL",
        "seen: KL",
        "Differences to snapkv",
        "plain form",
    ):
        assert words in captured.out
    assert captured.err.count("context 2 of 2") == 2
    written = figures.read_text()
    assert str(folder.parent) not in written
    read = json.loads(written)
    assert {"model", "date", "machine", "versions", "seed", "split", "texts", "contexts", "tokens"} <= read.keys()
    assert read["split"] == "dev" and read["texts"] == ["haystack"] and list(read["full"]) == ["800", "900"]
    cells = {(cell["recipe"], cell["budget"], cell["context"]): cell for cell in read["cells"]}
    budgets = [("lossless", ""), *[(name, b) for name in ("snapkv", "random") for b in ("1/2", "1/4")]]
    assert list(cells) == [(*one, length) for length in (800, 900) for one in budgets]
    for (name, budget, _), cell in cells.items():
        assert kvc.Recipe.from_dict(cell["definition"]).name == name
        assert not budget or cell["bytes"]["most"] <= parse_budget(budget)
        assert list(cell["unseen"]) == ["questions", "needle", "copy", "summary"]
        figure = cell["unseen"]["copy"]["kl"]
        assert len(figure["values"]) == 2 and figure["low"] <= figure["value"] <= figure["high"]
        # Without a partner, and for itself, nothing is compared.
        assert ("difference" in cell) == (name == "random")
    difference = cells["random", "1/4", 800]["difference"]["unseen"]["copy"]["kl"]
    values = [cells[name, "1/4", 800]["unseen"]["copy"]["kl"]["value"] for name in ("random", "snapkv")]
    assert difference["value"] == pytest.approx(values[0] - values[1], abs=1e-5)
    assert cells["snapkv", "1/4", 800]["bytes"]["ratio"] < cells["snapkv", "1/2", 800]["bytes"]["ratio"] < 0.6
    assert all(line.count("[") == line.count("]") for line in written.splitlines() if '"values"' in line)
    assert curves.read_bytes().startswith(b"\x89PNG")


def test_output_error_suite(folder, tmp_path, capsys):
    figures, curves = tmp_path / "errors.json", tmp_path / "errors.png"
    arguments = ["--suite", "output-error", "--model", str(folder), "--recipes", "lossless,k4v4,snapkv"]
    arguments += ["--budgets", "1/4", "--contexts", "1", "--context", str(LENGTH), "--modes", "unseen"]
    assert main(["eval", *arguments, "--output", str(figures), "--plot", str(curves), "--debug"]) == 0
    assert "layer 1" in capsys.readouterr().out and curves.stat().st_size > 1000
    cells = {cell["recipe"]: cell["unseen"]["prose"] for cell in json.loads(figures.read_text())["cells"]}
    errors = {name: cell["logits"]["value"] for name, cell in cells.items()}
    assert errors["lossless"] < 1e-4 < errors["k4v4"] < errors["snapkv"]
    assert all(len(cell["layers"]) == 2 for cell in cells.values())


def test_a_run_adds_to_an_earlier_one(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "eval",
        "--model",
        str(folder),
        "--contexts",
        "1",
        "--modes",
        "unseen",
        "--probes",
        "prose",
        "--context",
    ]
    figures = tmp_path / "kvcompress_eval.json"
    assert main([*arguments, str(LENGTH), "--recipes", "k8v4"]) == 0
    first = json.loads(figures.read_text())["cells"]
    assert figures.with_suffix(".png").exists()
    assert main([*arguments, f"{LENGTH},900", "--recipes", "k8v4,k4v4", "--add", "--against", "k8v4"]) == 0
    both = json.loads(figures.read_text())
    found = [(cell["recipe"], cell["context"]) for cell in both["cells"]]
    assert found == [("k8v4", LENGTH), ("k4v4", LENGTH), ("k8v4", 900), ("k4v4", 900)] and both["cells"][:1] == first
    assert "difference" in both["cells"][1]
    assert main([*arguments, str(LENGTH), "--recipes", "snapkv", "--add", "--seed", "1"]) == 1
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
        (["--modes", "seen", "--probes", "prose"], "--modes seen"),
        (["--probes", "dance"], "--probes 'dance'"),
        (["--suite", "output-error", "--probes", "copy"], "leave --probes out"),
        (["--tokens", "1"], "--tokens 1"),
        (["--context", "long"], "--context 'long'"),
        (["--form", "chat"], "no chat template"),
        (["--text", str(tmp_path / "none.txt")], "no long text"),
        (["--contexts", "0"], "at least 1 context"),
    ):
        assert main(["eval", "--model", str(folder), *arguments]) == 1
        assert message in capsys.readouterr().err
