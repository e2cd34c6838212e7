"""A small part of `make fuzz`: some hundred cache files made wrong on purpose."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")


def start(*arguments, script=FOLDER / "files.py"):
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


@linux
def test_three_hundred_mutations(tmp_path):
    done = start("--count", 300, "--seed", 20261130, "--output", tmp_path / "out.json")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "out.json").read_text())["plain"]
    assert result["mutations"] == 300 and result["violations"] == []
    seen = {outcome for outcomes in result["outcomes"].values() for outcome in outcomes}
    assert {"refused", "used"} <= seen and len(result["outcomes"]) >= 10


# The check of page tables that `load` makes, taken out: pages are counted, and nothing is refused.
UNCHECKED = """
        from kvcompress_hf.io.store_part import StorePart, live_entries

        def count(part, tier):
            table, lengths = part._tensors[f"table.{tier}"], part._tensors["lengths"][tier]
            start, stop = part._starts[tier], part._starts[tier + 1]
            named = table[live_entries(lengths, part.layout.tiers[tier].slots, table.shape[1])].long() - start
            named = named[(named >= 0) & (named < stop - start)]
            return torch.bincount(named, minlength=stop - start).int()

        StorePart._check_table = count
"""


def with_faults(folder, *faults):
    """A copy of the harness in which texts are replaced by others, each of which must be there."""
    text = (FOLDER / "files.py").read_text()
    for old, new in faults:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "files.py").write_text(text)
    # Page tables only, so that few mutations are enough.
    mutations = (FOLDER / "mutations.py").read_text()
    names = "rng.choice(parts.names()), rng.choice((1, 1, 3))"
    weights = "_WEIGHTS = (6, 4, 2, 14, 18, 4, 1, 18, 10, 6, 10, 2, 5)"
    assert names in mutations and weights in mutations
    mutations = mutations.replace(weights, "_WEIGHTS = (0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0)")
    mutations = mutations.replace(names, 'rng.choice([n for n in parts.names() if ".table." in n]), 3')
    (folder / "mutations.py").write_text(mutations)
    return folder / "files.py"


@linux
def test_the_harness_sees_wrong_page_tables(tmp_path):
    before = "        self.files = self._good_files("
    broken = with_faults(tmp_path, (before, UNCHECKED + before))
    done = start("--count", 60, "--seed", 7, "--output", tmp_path / "out.json", script=broken)
    assert done.returncode == 1, done.stderr[-2000:]
    result = json.loads((tmp_path / "out.json").read_text())["plain"]
    found = {violation["outcome"] for violation in result["violations"]}
    assert found & {"a table names a page in two places", "pages are counted otherwise than tables name them"}, found
    assert result["violations_in_all"] >= 20  # the others change entries that nothing reads, or are refused elsewhere


@linux
def test_the_harness_sees_a_process_die(tmp_path):
    last = "                print(json.dumps(line | cost), flush=True)\n"
    broken = with_faults(tmp_path, (last, last + "                if index == 10:\n                    os.abort()\n"))
    done = start("--count", 20, "--seed", 7, "--output", tmp_path / "out.json", script=broken)
    assert done.returncode == 1, done.stderr[-2000:]
    result = json.loads((tmp_path / "out.json").read_text())["plain"]
    assert [violation["index"] for violation in result["violations"]] == [10], result["violations"]
    assert "process ended with -6" in result["violations"][0]["outcome"]
    assert result["mutations"] == 21  # the one that died counts again, and the rest ran in another process
