"""The command as a person runs it."""

import json
from pathlib import Path

import pytest

from kvcompress_hf.cli import main
from kvcompress_hf.cli.models import find_model

MODEL = str(Path(__file__).parents[1] / "examples" / "models" / "kvlm-tiny")


def test_presets_and_doctor_say_what_there_is(capsys):
    assert main(["presets"]) == 0
    assert "kv-compress" in capsys.readouterr().out
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "cpu" in out and "transformers" in out
    assert "cuda driver" in out and "NVRTC" in out and "backend on cuda" in out


def test_generate_prints_text_and_memory(capsys):
    arguments = ["generate", "--model", MODEL, "--prompt", "It was a dark night, and", "--recipe", "kv-compress"]
    assert main([*arguments, "--budget", "1/2", "--max-new-tokens", "12", "--compare"]) == 0
    captured = capsys.readouterr()
    assert "dark" in captured.out  # the text goes to stdout, the figures to stderr
    assert "kv-compress" in captured.err and "KiB" in captured.err and "%" in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "zip"], "Unknown preset 'zip'"),
        (["--recipe", "kv-compress", "--budget", "7.5"], "must lie in"),
        (["--recipe", "lossless", "--budget", "1/2"], "no observer"),
        (["--recipe", '{"preset": "auto", "budgt": 1}'], "Unknown recipe part 'budgt'"),
        (["--recipe", '{"preset": "auto"'], "not the JSON of a recipe"),
        (["--device", "gpu"], "'gpu' is no device of torch"),
        (["--model", "/no/such/folder"], "no model in /no/such/folder"),
    ],
)
def test_mistakes_are_answered_in_a_line(capsys, arguments, words):
    assert main(["generate", "--model", MODEL, "--prompt", "Once", *arguments]) == 1
    captured = capsys.readouterr()
    assert words in captured.err and "Traceback" not in captured.err


def test_the_demo_on_the_tiny_model_writes_its_table_answers_figures_and_picture(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["demo", "--model", MODEL, "--dtype", "float32", "--new-tokens", "8", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    figures = json.loads((tmp_path / "demo.json").read_text())
    methods = {method["title"]: method for method in figures["methods"]}
    assert list(methods)[:2] == ["stock", "lossless"] and all(title in out for title in methods)
    assert {"date", "machine", "versions"} <= set(figures)
    stock, lossless = methods["stock"], methods["lossless"]
    assert stock["right"] >= 1 and lossless["same_text"] == len(figures["questions"])
    for budget in (4, 8, 16):
        method = methods[f"auto, 1/{budget}"]
        assert method["total"] == sum(method["memory"].values()) and method["ratio"] <= 1.02 / budget
        assert method["file_bytes"] < stock["total"] / 2 and method["load_seconds"] < method["second_seconds"]
    assert "What is the pass key?" in out and "head 1" in out and "loads" in out
    assert (tmp_path / "heads.png").stat().st_size > 10_000


def test_short_names_stand_for_the_repositorys_models(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_model() == MODEL and find_model("tiny") == MODEL
    assert find_model("some/hub-id") == "some/hub-id" and find_model("kvlm") == "kvlm"
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    assert find_model("tiny") == "tiny"  # a folder of that name goes first


def test_a_short_name_without_a_checkout_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvcompress_hf.cli.models.__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(FileNotFoundError, match="kvlm-eval here: run this inside a clone"):
        find_model("eval")
