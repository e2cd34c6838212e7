"""Every Python example in README and docs runs, in the order of the page, on the tiny model; so do the examples."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STARTERS = ("long_document.py", "split_between_processes.py")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Those that start processes are run, smaller, by tests/cache/test_io_examples.py.
EXAMPLES = sorted({*(ROOT / "examples").glob("*.py")} - {ROOT / "examples" / name for name in STARTERS})
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
#: What a page may take for granted after the quickstart.
PRELUDE = """
import kvcompress_hf as kvc
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("examples/models/kvlm-tiny")
model = AutoModelForCausalLM.from_pretrained("examples/models/kvlm-tiny")
inputs = tokenizer("It was a dark and stormy night.", return_tensors="pt")
"""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_the_page_runs(page, monkeypatch, tmp_path):
    blocks = BLOCK.findall(page.read_text())
    monkeypatch.chdir(ROOT)
    names: dict = {"__name__": "docs"}
    exec(PRELUDE, names)
    for i, block in enumerate(blocks):
        code = compile(block, f"{page.name}, block {i + 1}", "exec")
        exec(code, names)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_run(example, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")


def test_pages_promise_nothing_open():
    for page in PAGES:
        assert "TODO" not in page.read_text(), f"{page.name} still has an open place"


ROOMS = [*ROOT.glob("*/README.md"), *(ROOT / "kvcompress_hf").glob("*/README.md")]
OUR_ROOMS = ("kernels", "patches", "kvcompress_hf", "runtime", "observers", "plans", "paging", "io", "cli")


def test_every_room_says_what_belongs_there():
    assert {page.parent.name for page in ROOMS} >= set(OUR_ROOMS)
    for page in ROOMS:
        for name in re.findall(r"`(\w+\.py)`", page.read_text()):
            places = [page.parent / name, ROOT / "kvcompress_hf" / name]
            assert any(place.exists() for place in places), f"{page} names {name}, which is not there"


def test_links_lead_somewhere():
    for page in [*PAGES, *ROOMS, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
