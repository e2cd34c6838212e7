"""benchmarks/peers: versions are pinned, programs elsewhere answer or are refused, figures become tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "peers"
RESULTS = FOLDER.parent / "results"


@pytest.fixture
def peers(monkeypatch):
    """Modules of the folder by name, as its command imports them."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    yield __import__
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_every_peer_pins_every_version(peers):
    names = set(peers("run").NAMES) - {"tables"}
    assert {path.stem for path in (FOLDER / "requirements").glob("*.txt")} == names
    for path in (FOLDER / "requirements").glob("*.txt"):
        lines = path.read_text().splitlines()
        assert lines and all(line.count("==") == 1 and "+" not in line for line in lines), path


def test_an_environment_is_made_once_and_again_when_versions_change(peers, monkeypatch, tmp_path):
    environment = peers("environment")
    wanted = tmp_path / "wanted.txt"
    wanted.write_text("one==1")
    monkeypatch.setattr(environment, "BUILD", tmp_path)
    monkeypatch.setattr(environment, "requirements_of", lambda peer: wanted)
    asked = []

    def run(command, **kwargs):
        asked.append(command[1:4])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(environment.subprocess, "run", run)
    (tmp_path / "someone").mkdir()
    python = environment.python_of("someone")
    assert environment.python_of("someone") == python
    assert len([one for one in asked if one[:2] == ["-m", "pip"]]) == 1
    wanted.write_text("one==2")
    environment.python_of("someone")
    assert len([one for one in asked if one[:2] == ["-m", "pip"]]) == 2
    assert environment.python_of(environment.OURS) == Path(sys.executable)


PROGRAM = """
import os, sys
sys.path.insert(0, {folder!r})
from worker import serve, setting, time_steps

def refuse():
    raise ValueError("four bits")

def about():
    print("a library says something")
    return setting()

steps = {{"steps": lambda: time_steps(lambda: None, 60, 3)}}
serve({{"about": about, "refuse": refuse, "die": lambda: os._exit(9), **steps}})
"""


def test_a_program_answers_refuses_and_dies(peers, monkeypatch, tmp_path):
    worker = peers("worker")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(folder=str(FOLDER)))
    monkeypatch.setattr(worker, "BUILD", tmp_path)
    asked = worker.Worker("someone", "ours", str(program), {"model": "a"}, threads=1)
    assert asked.ask("about") == {"model": "a", "threads": 1}
    assert [len(times) for times in asked.ask("steps").values()] == [3, 3]
    with pytest.raises(worker.PeerError, match="ValueError: four bits"):
        asked.ask("refuse")
    assert asked.ask("about")["threads"] == 1  # a refusal is not the end
    with pytest.raises(worker.PeerError, match="ended with 9.*\n.*a library says something"):
        asked.ask("die")
    asked.close()


def test_slopes_are_per_stored_token_of_all_sequences(peers):
    rows = [
        {"engine": "e", "batch": batch, "held": held, "ms": 5 + 2e-3 * held * batch, "least_ms": 4, "processor_ms": 1}
        for batch in (1, 4)
        for held in (500, 2000, 8000)
    ]
    found = peers("speed").slopes([*rows, {"engine": "other", "batch": 1, "refused": "no"}])
    assert found == {"e": {batch: {"ns": 2000.0, "least_ns": 0.0, "processor_ns": 0.0} for batch in ("1", "4")}}


def test_bytes_of_a_press_count_its_masks(peers):
    score = {"right": True, "full_right": True, "as_full": 1.0, "kl": 0.5, "nll": 1.0, "nll_change": 0.1}
    rows = [
        {"sample": i, "probe": "needle", "press": "p", "budget": "1/4", "held": 100, "masks": 9, "dense": 100, **score}
        for i in range(2)
    ]
    other = [{**rows[0], "budget": "1/8"}]
    cell = peers("accuracy").peer_cell([*rows, *other], "p", "1/4", 1000)
    assert cell["recipe"] == "kvpress p" and cell["bytes"] == {"ratio": 1.09, "most": 1.09}
    assert cell["unseen"]["needle"]["kl"]["values"] == [0.5, 0.5]


def test_tables_come_from_the_figures(peers):
    tables = peers("tables")
    found = 0
    page = {name: (FOLDER.parents[1] / "docs" / f"{name}.md").read_text() for name in ("benchmarks", "evaluation")}
    for where, name, draw in (
        ("evaluation", tables.ANSWERS, tables.answers),
        ("benchmarks", tables.DECODING, tables.decoding),
        ("benchmarks", tables.ATTENTION, tables.decoding),
    ):
        if not (RESULTS / name).exists():
            continue
        found += 1
        drawn = draw(json.loads((RESULTS / name).read_text()))
        missing = [line for line in drawn.splitlines()[2:] if line not in page[where]]
        assert not missing, f"docs/{where}.md lacks lines of {name}: run.py tables prints them"
    assert found
