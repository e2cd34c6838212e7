"""An environment of its own for every peer, from the versions that its file in requirements/ pins.

They lie in build/peers, which git ignores, with whatever else a peer needs: converted models, logs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "peers"
#: Standing for the Python that runs this file, which has this package installed.
OURS = "ours"


class PeerError(RuntimeError):
    """A peer that cannot be installed, or refuses what it is asked."""


def requirements_of(peer: str) -> Path:
    """The file that pins a peer's packages."""
    return HERE / "requirements" / f"{peer}.txt"


def python_of(peer: str) -> Path:
    """The Python of a peer's environment, which is made first where it is not there or its file has changed.

    Args:
        peer: a file in requirements/, or `OURS`.

    Raises:
        PeerError: where pip cannot install what is pinned.
    """
    if peer == OURS:
        return Path(sys.executable)
    folder, wanted = BUILD / peer, requirements_of(peer).read_text()
    python, done = folder / ("Scripts" if os.name == "nt" else "bin") / "python", folder / "requirements.txt"
    if done.exists() and done.read_text() == wanted:
        return python
    print(f"{peer}: installing into {folder}, once", file=sys.stderr, flush=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    log = BUILD / f"{peer}_install.log"
    with log.open("w") as out:
        command = [str(python), "-m", "pip", "install", "--no-deps", "--requirement", str(requirements_of(peer))]
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode
    if code:
        raise PeerError(f"pip could not install {requirements_of(peer).name}; its last lines:\n{tail(log)}")
    done.write_text(wanted)
    return python


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
