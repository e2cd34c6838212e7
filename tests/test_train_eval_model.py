"""examples/train_eval_model on a corpus made here: text to tokens, training in pieces, export, measuring."""

import dataclasses
import importlib
import itertools
import json
import random
import sys
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[1] / "examples" / "train_eval_model"
NAMES = ("card", "corpus", "export", "facts", "prepare", "prove", "recipe", "sources", "tasks", "train", "weights")


@pytest.fixture(scope="module")
def scripts():
    """The folder's modules by name. They import each other as scripts do; nothing of that is left behind."""
    path, modules = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in NAMES}
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(FOLDER.parent) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def prose(rng, words, sentences):
    made = [" ".join(rng.choices(words, k=rng.randint(5, 12))).capitalize() + "." for _ in range(sentences)]
    return "\n\n".join(" ".join(made[i : i + 6]) for i in range(0, len(made), 6))


def add_package(folder, name, licence, text):
    (folder / name / "_vendor").mkdir(parents=True)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (folder / name / "core.py").write_text(text)
    (folder / name / "_vendor" / "other.py").write_text("VENDORED = 1\n" * 100)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nLicense-Expression: {licence}\n"
    )
    (info / "RECORD").write_text(f"{name}/core.py,,\n{name}/_vendor/other.py,,\n{name}-1.0.dist-info/METADATA,,\n")


@pytest.fixture(scope="module")
def data(scripts, tmp_path_factory):
    """What prepare.py makes of three small novels, four packages and a library."""
    root = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = sorted({"".join(rng.choices("abcdefghilmnoprstu", k=rng.randint(4, 6))) for _ in range(1200)})
    for folder in ("novels", "packages", "library/site-packages"):
        (root / folder).mkdir(parents=True)
    for name, sentences in (("One", 900), ("Two", 900), ("Doyle_Hound_1902", 500)):
        (root / "novels" / f"{name}.txt").write_text(prose(rng, words, sentences))

    def code(name, functions):
        return "".join(
            f"def {name}_{rng.choice(words)}(value):\n    {rng.choice(words)} = value\n    return value\n\n"
            for _ in range(functions)
        )

    add_package(root / "packages", "goodlib", "MIT AND (BSD-3-Clause OR Apache-2.0)", code("goodlib", 300))
    add_package(root / "packages", "badlib", "MIT AND GPL-3.0-only", code("badlib", 50))
    add_package(root / "packages", "networkx", "BSD-3-Clause", code("networkx", 150))
    add_package(root / "packages", "twin", "MIT", (root / "packages" / "goodlib" / "core.py").read_text())
    (root / "library" / "abc.py").write_text(code("library", 200))
    (root / "library" / "tables.py").write_text("TABLE = [" + "1234567, " * 200 + "]\n")
    (root / "library" / "site-packages" / "stray.py").write_text(code("stray", 50))
    arguments = ["--novels", root / "novels", "--packages", root / "packages", "--library", root / "library"]
    scripts["prepare"].main([str(a) for a in (*arguments, "--vocab", 512, "--context", 512, "--out", root / "data")])
    return root / "data"


def test_only_permissive_text_gets_in_and_what_is_held_out_stays_out(scripts, data):
    corpus = scripts["corpus"].Corpus(data)
    decoded = {name: corpus.tokenizer.decode(tokens.tolist()) for name, tokens in corpus.streams.items()}
    assert "def goodlib_" in decoded["train-code"] and "def library_" in decoded["train-code"]
    assert "def networkx_" in decoded["heldout-code"] and "networkx" not in decoded["train-code"]
    for unwanted in ("badlib", "VENDORED", "1234567", "stray"):
        assert unwanted not in decoded["train-code"] + decoded["heldout-code"]
    sources = {source["name"]: source for source in corpus.manifest["sources"]}
    assert sources["Doyle_Hound_1902"]["stream"] == "heldout-prose" and sources["One"]["stream"] == "train-prose"
    assert sources["goodlib 1.0"]["licence"] == "MIT AND (BSD-3-Clause OR Apache-2.0)"
    assert "twin 1.0" not in sources  # the same text again
    assert not set(corpus.words["train"]) & set(corpus.words["heldout"])
    assert sum(len(tokens) for tokens in corpus.streams.values()) == sum(s["tokens"] for s in sources.values())


@pytest.mark.parametrize(
    "fields, allowed",
    [
        ({"License-Expression": "Apache-2.0 WITH LLVM-exception"}, True),
        ({"License-Expression": "MPL-2.0 AND MIT"}, False),
        ({"License-Expression": "LicenseRef-Own"}, False),
        ({"Classifier": "License :: OSI Approved :: BSD License"}, True),
        ({"Classifier": "License :: OSI Approved :: GNU General Public License (GPL)", "License": "BSD"}, False),
        ({"Classifier": "License :: Other/Proprietary License"}, False),
        ({"License": "Apache 2.0 License"}, True),
        ({"License": "BSD 3-Clause or GPLv3"}, False),
        ({"License": "see the file"}, False),
        ({}, False),
    ],
)
def test_licences_are_read_from_metadata(scripts, fields, allowed):
    metadata = Message()
    for name, value in fields.items():
        metadata[name] = value
    assert (scripts["sources"].permissive_licence(metadata) is not None) is allowed


@pytest.fixture(scope="module")
def maker(scripts, data):
    return scripts["tasks"].Maker(scripts["corpus"].Corpus(data), "train", scripts["recipe"].RECIPES["toy"])


def test_batches_depend_on_the_step_alone(scripts, maker):
    recipe = maker.recipe
    kinds = np.zeros(3)
    for step in range(12):
        ids, weights, of_rows = maker.batch(step)
        assert ids.shape == weights.shape == (recipe.tokens_per_step // recipe.length(step), recipe.length(step) + 1)
        assert all(np.array_equal(a, b) for a, b in zip((ids, weights, of_rows), maker.batch(step), strict=True))
        assert (ids[:, 0] == scripts["corpus"].SPECIAL["<s>"]).all()
        kinds += np.bincount(of_rows, minlength=3)
    assert not np.array_equal(maker.batch(0)[0], maker.batch(1)[0])
    assert kinds.min() > 0
    eval_recipe = scripts["recipe"].RECIPES["eval"]
    assert [eval_recipe.length(step) for step in (0, 2000, 3000, 10**6)] == [512, 1024, 2048, 4096]
    assert [eval_recipe.length(eval_recipe.first_step(n) - 1) for n in (1024, 2048, 4096)] == [512, 1024, 2048]
    assert max(eval_recipe.task_share(step) for step in (0, 10**6)) <= 0.25
    cpu = scripts["recipe"].RECIPES["cpu"]
    assert [cpu.task_share(step) for step in (0, 1739, 1740)] == [0.5, 0.5, 0.15]


def answers(scripts, maker, task, seed, size=500):
    """The text of a task, and its answers with the text before each."""
    row = scripts["tasks"].Row(size)
    getattr(scripts["tasks"], f"_{task}")(maker, row, random.Random(seed), size - 1)
    found, start = [], None
    for i, weight in enumerate([*row.weights, 0.0]):
        if weight == scripts["tasks"].ANSWER:
            start = i if start is None else start
        elif start is not None:
            found.append((maker.tokenizer.decode(row.ids[:start]), maker.tokenizer.decode(row.ids[start:i]).strip()))
            start = None
    assert len(row.ids) <= size and found
    return found


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_right(scripts, maker, seed):
    for before, value in answers(scripts, maker, "needles", seed):
        assert value in before
    for before, value in answers(scripts, maker, "key_values", seed):
        line = before.rsplit("\n", 1)[-1]
        assert f"\n{line}{value}" in "\n" + before
    for before, value in answers(scripts, maker, "variables", seed):
        name = before.rsplit("VAR ", 1)[-1].removesuffix(" is")
        while not (given := before.split(f"VAR {name} = ", 1)[1].split(".", 1)[0]).isdigit():
            name = given.removeprefix("VAR ")
        assert given == value
    for before, value in answers(scripts, maker, "sorting", seed):
        items = before.rsplit("Sort: ", 1)[-1].split("\n")[0].split()
        assert value.split() == sorted(items, key=int if items[0].isdigit() else str)
    for before, value in answers(scripts, maker, "counting", seed):
        word = before.rsplit("Occurrences of ", 1)[-1].removesuffix(":")
        assert before.rsplit("Words: ", 1)[-1].split(".")[0].split().count(word) == int(value)


def test_a_passage_comes_again(scripts, maker):
    row = scripts["tasks"].Row(400)
    scripts["tasks"]._repetition(maker, row, random.Random(1), 399)
    assert row.ids[-16:] in [row.ids[i : i + 16] for i in range(1, len(row.ids) - 32)]


def test_weights_come_back_without_loss(scripts, tmp_path, monkeypatch):
    module = scripts["weights"]
    tensors = {"a": torch.randn(300, 70).to(torch.bfloat16) * 0.02, "b": torch.tensor([0.0, -1.0]).to(torch.bfloat16)}
    monkeypatch.setattr(module, "SHARD_BYTES", 9000)
    files = module.write_weights(tmp_path, tensors, {"step": 3})
    assert len(files) > 3 and all(file.stat().st_size <= 9000 for file in files)
    assert sum(file.stat().st_size for file in files) < 0.8 * 2 * 21_002
    read, facts = module.read_weights(tmp_path)
    assert facts == {"step": 3} and all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    files[0].write_bytes(files[1].read_bytes())
    with pytest.raises(ValueError, match="damaged"):
        module.read_weights(tmp_path)


@pytest.fixture(scope="module")
def train(scripts, data, tmp_path_factory):
    """Runs train.py; returns its log without what the clock put there, and the folder of its weights."""
    root = tmp_path_factory.mktemp("runs")

    def run(name, *more):
        folders = ["--data", data, "--state", root / name / "state", "--out", root / name / "out"]
        scripts["train"].main([str(a) for a in (*folders, "--recipe", "toy", "--device", "cpu", *more)])
        log = [json.loads(line) for line in (root / name / "out" / "train_log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "tokens/s"} for line in log], root / name / "out"

    return run


@pytest.fixture(scope="module")
def whole(train):
    return train("whole", "--steps", 8)


def test_training_in_pieces_gives_the_curve_of_one_run(scripts, train, whole):
    log, weights = whole
    assert [line["step"] for line in log] == list(range(1, 9)) and log[-1]["loss"] < log[0]["loss"]
    assert {line["length"] for line in log} == {256, 512} and "held out" in log[3]
    train("pieces", "--steps", 2)
    stopped, _ = train("pieces", "--minutes", 0)  # no time for a step
    assert len(stopped) == 2
    train("pieces", "--steps", 6)
    again, pieces = train("pieces", "--steps", 8)
    assert again == log
    read = scripts["weights"].read_weights
    assert all(torch.equal(tensor, read(pieces)[0][name]) for name, tensor in read(weights)[0].items())


def test_training_with_muon_in_pieces_gives_the_curve_of_one_run(scripts, train, whole, monkeypatch):
    recipes = scripts["recipe"].RECIPES
    monkeypatch.setitem(recipes, "toy", dataclasses.replace(recipes["toy"], muon=True))
    log, _ = train("muon", "--steps", 4)
    assert log[-1]["loss"] < log[0]["loss"] and log != whole[0][:4]
    train("muon pieces", "--steps", 2)
    assert train("muon pieces", "--steps", 4)[0] == log


def test_training_goes_on_from_weights_alone(scripts, train, whole):
    log, _ = whole
    _, weights = train("cut", "--steps", 4)
    again, out = train("elsewhere", "--weights", weights, "--steps", 6)
    assert again[:4] == log[:4] and again[4]["loss"] == log[4]["loss"]  # the same weights, the same batch
    assert again[4]["lr"] < log[4]["lr"]  # warming up anew
    assert scripts["weights"].read_weights(out)[1]["step"] == 6


def test_the_last_piece_takes_the_learning_rate_to_zero(scripts, train):
    train("finish", "--steps", 3)
    log, out = train("finish", "--steps", 7, "--finish")
    rates = [line["lr"] for line in log]
    assert rates[2] > rates[3] > rates[4] > rates[5] > rates[6] > 0 and rates[6] < rates[2] / 4
    assert scripts["weights"].read_weights(out)[1]["finished"]
    unchanged, _ = train("finish", "--steps", 20)
    assert unchanged == log


def test_the_decay_is_planned_to_end_before_time_is_up(scripts, train, monkeypatch):
    monkeypatch.setattr(scripts["train"].Pace, "SKIPPED", 1)
    monkeypatch.setattr(scripts["train"].Pace, "MEASURED", 2)
    ticks = itertools.count(step=0.6)  # every look at the clock takes 0.6 seconds: some 4 a step
    monkeypatch.setattr(scripts["train"], "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    log, out = train("clock", "--minutes", 1, "--finish")
    rates = [line["lr"] for line in log]
    assert rates[2] == scripts["recipe"].RECIPES["toy"].lr and rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < rates[2] / 4
    facts = scripts["weights"].read_weights(out)[1]
    assert facts["finished"] and 45 < facts["seconds"] < 60


@pytest.fixture(scope="module")
def model_folder(scripts, data, whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "kvlm-toy"
    scripts["export"].main(["--weights", str(whole[1]), "--data", str(data), "--out", str(folder)])
    return folder


def test_the_exported_model_is_the_trained_one(scripts, data, whole, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert model.dtype == torch.bfloat16 and tokenizer("value").input_ids[0] == model.config.bos_token_id
    tensors, _ = scripts["weights"].read_weights(whole[1])
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    # What training computes layer by layer is what the whole model computes.
    ids = torch.randint(3, 512, (2, 65))
    losses = scripts["train"].Losses(model, compiled=False)(ids)
    torch.testing.assert_close(losses, scripts["prove"].token_losses(model, ids), atol=1e-3, rtol=0)
    out = model.generate(torch.tensor([tokenizer("def library").input_ids]), max_new_tokens=3, do_sample=False)
    assert out.shape[1] > 3


def test_proving_measures_and_writes_the_card(scripts, data, whole, model_folder):
    counts = ["--windows", "4", "--contexts", "2", "--ablation-contexts", "1"]
    scripts["prove"].main(["--model", str(model_folder), "--data", str(data), "--device", "cpu", *counts])
    figures = json.loads((model_folder / "figures.json").read_text())
    assert figures["losses"]["code"]["near"] == 32 and figures["losses"]["code"]["far"] == 500
    assert figures["needles"]["512"]["questions"] == 16
    assert len(figures["ablation"]["heads"]) == 8 and len(figures["reached"]) == 4
    card = (model_folder / "README.md").read_text()
    again = model_folder.parent / "again"  # as after measuring on another machine
    exported = ["--weights", str(whole[1]), "--data", str(data), "--out", str(again)]
    scripts["export"].main([*exported, "--figures", str(model_folder / "figures.json")])
    assert (again / "README.md").read_text() == card.replace("kvlm-toy", "again")
    assert "goodlib 1.0" in card and "8 magic numbers of 7 digits" in card and "**not reached**" in card


def test_needles_hold_what_they_ask(scripts, data, model_folder):
    prove = scripts["prove"]
    maker = scripts["tasks"].Maker(scripts["corpus"].Corpus(data), "heldout", scripts["recipe"].RECIPES["toy"])
    needles = prove.make_needles(maker, 512, 8, random.Random(0))
    assert 400 < needles.context.shape[1] + needles.asked.shape[1] <= 512
    context = maker.tokenizer.decode(needles.context[0].tolist())
    for ids, scored in zip(needles.asked, needles.answers, strict=True):
        value = maker.tokenizer.decode(ids[scored].tolist()).strip()
        key = maker.tokenizer.decode(ids.tolist()).split("number for ")[1].split(" mentioned")[0]
        assert f"numbers for {key} is: {value}." in context
    # Batched on a shared cache each question gets what it gets by itself, without one.
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    _, losses = prove.ask(model, needles)
    whole = torch.cat([needles.context, needles.asked[:1]], 1)
    alone = prove.token_losses(model, whole)[0, needles.context.shape[1] - 1 :][needles.answers[0]]
    assert losses[0] == pytest.approx(alone.mean().item(), abs=1e-4)


def test_a_head_is_removed_and_comes_back(scripts, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 512, (1, 40))
    before = scripts["prove"].token_losses(model, ids)
    with scripts["prove"].without_head(model, layer=1, head=2):
        removed = scripts["prove"].token_losses(model, ids)
    assert torch.equal(before, scripts["prove"].token_losses(model, ids)) and not torch.equal(before, removed)
    size = model.config.head_dim
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 2 * size : 3 * size] = 0
    torch.testing.assert_close(removed, scripts["prove"].token_losses(model, ids), atol=1e-5, rtol=0)


def test_the_command_evaluates_the_folder(model_folder, capsys, tmp_path, monkeypatch):
    from kvcompress_hf.cli import main

    monkeypatch.chdir(tmp_path)  # figures go into the working directory
    assert main(["eval", "--model", str(model_folder), "--context", "800", "--contexts", "1", "--recipes", "k8v4"]) == 0
    assert "kvlm-toy" in capsys.readouterr().out
