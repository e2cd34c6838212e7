"""Runs tests on another transformers than the environment's: installed beside it, put before it on the path.

    python .ci/transformers.py VERSION [-- arguments of pytest]

VERSION is a version, `lowest` (of the range in pyproject.toml) or `newest` (that the package index has in that range).
The same environment serves all: only transformers, and what it asks of its own libraries, differ.
"""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def wanted(version: str) -> str:
    """The requirement for pip."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = next(r for r in map(Requirement, project["dependencies"]) if r.name == "transformers")
    if version == "newest":
        return str(ours)
    if version == "lowest":
        floor = next(s.version for s in ours.specifier if s.operator == ">=")
        version = floor if floor.count(".") == 2 else f"{floor}.0"
    return f"transformers=={version}"


def pip_install(folder: Path, requirement: str) -> None:
    """Installs one distribution into a folder, without what it requires."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(folder)]
    subprocess.run([*command, requirement], check=True)


def install(version: str) -> tuple[Path, str]:
    """Installs transformers into a folder, and those of its libraries that do not fit it.

    Returns:
        The folder and the version found there.
    """
    folder = ROOT / "build" / f"transformers-{version}"
    pip_install(folder, wanted(version))
    [found] = [d for d in importlib.metadata.distributions(path=[str(folder)]) if d.metadata["Name"] == "transformers"]
    for requirement in map(Requirement, found.requires or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if canonicalize_name(requirement.name) == "torch":
            continue
        try:
            fits = requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            fits = False
        if not fits:
            pip_install(folder, f"{requirement.name}{requirement.specifier}")
    return folder, found.version


def main(arguments: list[str]) -> int:
    """Installs and tests.

    Returns:
        The exit status of pytest; 0 without running it where the version is the environment's own.
    """
    version, _, *pytest = arguments
    folder, found = install(version)
    if found == importlib.metadata.version("transformers"):
        print(f"transformers {found} ({version}) is what the whole suite runs on.")
        return 0
    print(f"== transformers {found} ({version})", flush=True)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
    return subprocess.run([*command, *pytest], cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
