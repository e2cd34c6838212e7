"""Programs that run in the environments of peers, and are asked by lines of JSON. Needs nothing but Python."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import BUILD, HERE, PeerError, python_of, tail


def serve(handlers: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers requests until there are no more; what a library prints goes to the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = handlers[request.pop("do")](**request)
        except Exception as error:  # of any library: it is the answer
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)


def time_steps(step: Callable[[], Any], seconds: float, most: int) -> dict[str, list[float]]:
    """Decodes for some seconds, at least twice and at most so many times.

    Returns:
        Seconds of every step, by the clock on the wall and of this process's threads together.
    """
    wall, processor = list[float](), list[float]()
    end = time.perf_counter() + seconds
    while len(wall) < 2 or (len(wall) < most and time.perf_counter() < end):
        began, spent = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - began)
        processor.append(time.process_time() - spent)
    return {"wall": wall, "processor": processor}


class Worker:
    """A program of this folder at work in a peer's environment.

    Args:
        name: of its log.
        peer: whose environment.
        script: the program, which gets `setting` as its argument.
        setting: what it shall be.
        threads: for the libraries that read the number from the surroundings.
    """

    def __init__(self, name: str, peer: str, script: str, setting: dict[str, Any], threads: int) -> None:
        python = python_of(peer)
        BUILD.mkdir(parents=True, exist_ok=True)
        self.name, self._log = name, BUILD / f"{name.replace(' ', '_').replace('/', '_')}.log"
        surroundings = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), str(HERE / script), json.dumps({**setting, "threads": threads})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=surroundings,
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """What the program answers.

        Raises:
            PeerError: where it refuses, or has died.
        """
        assert self._process.stdin and self._process.stdout
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise PeerError(f"{self.name} ended with {code}; the last lines of its log:\n{tail(self._log)}")
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply

    def close(self) -> None:
        """Lets the program end."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has died
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def setting() -> dict[str, Any]:
    """What this program was started with."""
    return json.loads(sys.argv[1])


def versions_of(*packages: str) -> dict[str, str]:
    """Versions of packages in this environment, and of Python."""
    from importlib.metadata import version

    return {"python": sys.version.split()[0]} | {name: version(name) for name in packages}


def folder(name: str) -> Path:
    """A folder for what a peer makes of the model."""
    path = BUILD / "models" / name
    path.mkdir(parents=True, exist_ok=True)
    return path
