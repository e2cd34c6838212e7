"""Items of a benchmark run in child processes: one line of JSON each as it ends, and a crash or a hang costs one item.

After an illegal access every further call on a GPU fails, for as long as the process lives. So items run in a child;
where it dies or makes no progress, what it was at is noted as failed, and another child goes on behind it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

Item = Callable[[], dict]


class Log:
    """Results in a file, a line of JSON each: `begin` when an item starts, `item` with what it found or `failed`.

    Args:
        path (`Path`): The file; lines that are there already count as done.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **row: object) -> None:
        """Appends a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(row, default=str) + "\n")

    def rows(self) -> list[dict]:
        """The lines so far; one that was cut off in the middle is left out."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def done(self) -> set[str]:
        """Names of the items that have ended, well or not."""
        return {row["item"] for row in self.rows() if "item" in row}

    def begun(self) -> str | None:
        """The item that began last, if it has not ended."""
        names = [row["begin"] for row in self.rows() if "begin" in row]
        return names[-1] if names and names[-1] not in self.done() else None


def run_items(items: dict[str, Item], log: Log, fatal: Callable[[Exception], bool]) -> int:
    """The child: runs what is not done yet.

    Args:
        items (`dict[str, Item]`): By name, in order.
        log (`Log`): Where results go.
        fatal (`Callable`): Whether nothing more can be done in this process after an error.

    Returns:
        `int`: 0, or 3 where another child has to go on.
    """
    done = log.done()
    for name, item in items.items():
        if name in done:
            continue
        log.add(begin=name)
        start = time.perf_counter()
        try:
            row = item()
        except Exception as error:
            log.add(item=name, failed=f"{type(error).__name__}: {error}"[:600], trace=traceback.format_exc()[-900:])
            if fatal(error):
                return 3
        else:
            log.add(item=name, seconds=round(time.perf_counter() - start, 2), **row)
    return 0


def supervise(command: Sequence[str], log: Log, *, limit: float, stall: float) -> None:
    """The parent: starts children until one has come to the end.

    Args:
        command (`Sequence[str]`): Starts a child.
        log (`Log`): Where it writes.
        limit (`float`): Seconds for all of them.
        stall (`float`): Seconds without a new line after which a child is taken to hang.
    """
    end = time.monotonic() + limit
    while time.monotonic() < end:
        with log.path.with_suffix(".log").open("a") as output:
            child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        why = _watch(child, log, end, stall)
        stuck = log.begun()
        if stuck is not None:
            log.add(item=stuck, failed=why or f"the process ended with status {child.returncode}")
        elif child.returncode != 3:
            if child.returncode:
                log.add(item="the command", failed=f"it ended with status {child.returncode} before the first item")
            return


def _watch(child: subprocess.Popen, log: Log, end: float, stall: float) -> str | None:
    """Waits for a child; returns why it was killed, if it was."""
    size, changed = -1, time.monotonic()
    while child.poll() is None:
        time.sleep(0.1)
        now = time.monotonic()
        grown = log.path.stat().st_size if log.path.exists() else 0
        if grown != size:
            size, changed = grown, now
        why = "out of time" if now > end else f"nothing for {stall:.0f} s" if now - changed > stall else None
        if why:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return why
    return None
