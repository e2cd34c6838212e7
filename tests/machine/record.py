"""What every recorded run says of itself: versions, machine, date."""

import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path


def heading(what, **more):
    """The first part of a record."""
    root = Path(__file__).parents[2]
    given = list(sys.argv[1:])
    if "--output" in given:
        at = given.index("--output")
        del given[at : at + 2]  # where it was written to says nothing
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root)
    return {
        "what": what,
        "command": "python " + " ".join([os.path.relpath(sys.argv[0], root), *given]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit.stdout.strip() or None,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("kvcompress-hf", "torch", "transformers", "hypothesis")},
        },
        "processor": _processor(),
        **more,
    }


def _processor():
    """The CPU's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def until(minutes, started):
    """A function that says whether to stop: after so many minutes (`None`: never), or when interrupted or terminated.

    The first signal only stops the run, so that what was done is recorded.
    """
    told = []

    def tell(number, frame):
        told.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, tell)
    return lambda: bool(told) or (minutes is not None and time.time() - started > minutes * 60)


def write(path, record):
    """Compact JSON with one line per top-level entry, so that two records can be compared."""
    lines = [f"  {json.dumps(name)}: {_rows(value)}" for name, value in record.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if path:
        Path(path).write_text(text)
    else:
        print(text)


def _rows(value):
    """A list of objects one to a line, anything else on one."""
    if not isinstance(value, list) or not any(isinstance(each, dict) for each in value):
        return json.dumps(value)
    return "[\n    " + ",\n    ".join(json.dumps(each) for each in value) + "\n  ]"


def runs_in(path):
    """The runs that a file holds, each with its commit and seed; none where there is no file yet."""
    if not path or not Path(path).exists():
        return []
    return json.loads(Path(path).read_text())["runs"]
