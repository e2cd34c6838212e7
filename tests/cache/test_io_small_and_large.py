"""Numbers in a file that ask for memory or time the file does not answer for, measured in a process of their own."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kvcompress_hf.bounded_json import parse_json

FUZZ = Path(__file__).parents[1] / "fuzz"
LIMITS = {"most_bytes": 1000, "most_values": 100, "most_depth": 8}


@pytest.mark.parametrize(
    "text", ['{"a": [1, {"b": null}]}', '"[[[[[[[[[[[["', '["\\\\\\"[[[[[[[[[", "]"]', "[[[[[[[[]]]]]]]]", "0"]
)
def test_json_within_its_limits(text):
    assert parse_json(text, **LIMITS) == parse_json(text.encode(), **LIMITS) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 9 + "]" * 9, "nested more than 8"),
        ('{"a":' * 9 + "0" + "}" * 9, "nested more than 8"),
        ("[[]", "do not match"),
        ('["' + "\\" * 3 + '", [[[[[[[[[]]]]]]]]]]', "nested more than 8"),
        ("[" + "0," * 99 + "0, 0]", "values, more than 100"),
        ("[" + "[]," * 60 + "[]]", "values, more than 100"),
        ('"' + "x" * 1000 + '"', "1,002 bytes long"),
        ('{"a": 1, "a": 2}', "twice"),
        ("9" * 20, "64 bits"),
        ("-" + "9" * 900, "64 bits"),
        ("", "Expecting value"),
    ],
)
def test_json_beyond_them(text, message):
    for form in (text, text.encode()):
        with pytest.raises(ValueError, match=message):
            parse_json(form, **LIMITS)


@pytest.mark.parametrize("data", ["[1]".encode("utf-16"), b"\xff[]", "[1]".encode("utf-32")])
def test_json_in_other_encodings_is_not_json(data):
    with pytest.raises(ValueError, match="decode|not match|Expecting"):
        parse_json(data, **LIMITS)


# What the attacks of the issue take: header and body are made inside the child, which prints what loading cost.
ATTACKS = {
    "20 million empty lists": "raw(b'[' + b'[],' * 20_000_000 + b'[]]')",
    "600,000 empty tensors": 'raw(b\'{\' + b\',\'.join(b\'"%d":{"dtype":"I32","shape":[0],"data_offsets":[0,0]}\' % i'
    " for i in range(600_000)) + b'}')",
    "a million brackets": "raw(b'[' * 1_000_000)",
    "a million objects inside each other": "raw(b'{\"a\":' * 200_000 + b'0' + b'}' * 200_000)",
    "as many values as a header may hold": "raw(b'[' + b'[],' * 690_000 + b'[]]')",
    "a number of a million digits": "raw(b'{\"a\":' + b'9' * 1_000_000 + b'}')",
    "a long text of characters of four bytes": "raw(b'{\"a\":\"' + '\\U0001f600'.encode() * 500_000 + b'\"}')",
    "40 MB of page numbers": "large('store.0.table.0')",
    "40 MB of lengths": "large('store.0.lengths')",
    "40 MB of weights": "large('model.weights')",
    "40 MB of padding": "large('padding')",
    "40 MB of checksums": "large('checksums')",
    "rows of the most recipes": "recipes(50_000)",
    "100,000 sequences that share their pages": "shared(100_000)",
    "tables of 25 MB, of sequences that share their pages": "shared(90_000, 2000, 'lossless')",
}


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    """Seconds of processor time, bytes beyond the file and the outcome of each attack."""
    code = f"""
        import json, sys, tempfile
        sys.path.insert(0, {str(FUZZ)!r})
        from files import Child
        from mutations import Parts, SIZES, raw
        child = Child(sys.argv[1], None)

        def parts():
            return Parts(child.files["k8v4"])

        def large(name):
            changed = parts()
            entry = changed.header[name]
            size, rest = SIZES[entry["dtype"]], 1
            for each in entry["shape"][:-1]:
                rest *= each
            last = 40_000_000 // (rest * size)
            changed.replace(name, bytes(rest * last * size), entry["shape"][:-1] + [last])
            return changed.together()

        def recipes(count):
            changed = parts()
            changed.state["recipes"] = [{{"name": str(i)}} for i in range(count // 2)]
            return changed.together()

        def shared(batch, count=90, recipe="k8v4"):  # an honest file, in which tables are nearly everything
            cache = child.kvc.CompressedPagedCache(child.model.config, recipe)
            cache.belongs_to(child.model)
            child.feed(cache, child.tokens(1, count))
            cache.batch_repeat_interleave(batch)
            cache.save(child.path)
            return child.path.read_bytes()

        for name, make in json.loads(sys.argv[2]).items():
            data = eval(make)
            outcome, cost = child.load(data)
            print(json.dumps([name, outcome, cost["seconds"], cost["extra"], len(data)]), flush=True)
    """
    folder = tmp_path_factory.mktemp("attacks")
    (folder / "good").touch()
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder), json.dumps(ATTACKS)]
    # Large blocks go back to the system at once, so that the peak of one load does not hide in what is free.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_costs_no_more_than_its_file(costs, name):
    outcome, seconds, extra, size = costs[name]
    assert "25 MB" not in name or size > 25 * 10**6
    assert outcome == ("loaded" if "share" in name else "refused")
    assert seconds < 1 and extra < 64 * 2**20
