"""Text to train on: novels, Python's standard library, and installed packages under permissive licences."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

# Kept out of training as a whole, so that no file of theirs has a twin in it.
HELD_OUT_PACKAGES = ("networkx", "jinja2", "psutil")

_SPDX = {"MIT", "MIT-0", "MIT-CMU", "HPND", "BSD", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "Apache-2.0", "ISC", "Zlib"}
_SPDX |= {"PSF-2.0", "Python-2.0", "BSL-1.0", "CC0-1.0", "CNRI-Python", "Unlicense", "LLVM-exception"}
_CLASSIFIED = ("MIT", "BSD", "Apache Software", "ISC", "Python Software Foundation", "zlib/libpng")
_NAMED = re.compile(
    r"(the )?(new |modified |simplified |[23]-clause )?(mit|bsd|apache|isc|psf|zlib)\b[\w .,/-]{0,30}", re.I
)
_RESTRICTED = re.compile(r"gpl|mozilla|mpl|proprietary|commercial|eupl|sspl|all rights reserved", re.I)

_CODE = {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh"}
_DOCS = {".md", ".rst", ".txt"}
# Copies of other projects, which have licences of their own, and licence texts.
_SKIPPED = re.compile(
    r"^(_?vendor(ed)?|_?third_?party|extern(al|als)?|licen[cs]es?|notice.*|copying.*|site-packages|__pycache__)$"
)


@dataclass(frozen=True)
class Source:
    """Texts of one origin.

    Args:
        name: of the package or the novel, with its version where it has one.
        kind: `"prose"` or `"code"`.
        licence: as its metadata words it.
        held_out: never trained on.
        texts: one per file.
    """

    name: str
    kind: str
    licence: str
    held_out: bool
    texts: list[str]


def permissive_licence(metadata: importlib.metadata.PackageMetadata) -> str | None:
    """A package's licence in its own words if everything they name is permissive, else `None`.

    An SPDX expression decides where there is one, then the classifiers, then the free text.
    """
    expression = metadata.get("License-Expression")
    if expression:
        parts = [part for part in re.split(r"[\s()]+(?:AND|OR|WITH)?[\s()]*", expression) if part]
        return expression if all(part in _SPDX for part in parts) else None
    classifiers = [c for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    named = [c.split("::")[-1].strip() for c in classifiers]
    text = " ".join((metadata.get("License") or "").split())
    if _RESTRICTED.search(" ".join(named)) or (len(text) < 200 and _RESTRICTED.search(text)):
        return None
    if named:
        return ", ".join(named) if all(name.startswith(_CLASSIFIED) for name in named) else None
    return text if _NAMED.fullmatch(text) else None


def package_sources(folders: list[Path], seen: set[str]) -> Iterator[Source]:
    """The packages installed in some `site-packages` folders, by name; each package and each text once.

    Args:
        folders: earlier ones win where a package is in several.
        seen: hashes of the texts that came already; grows.
    """
    found = {}
    for folder in folders:
        for package in importlib.metadata.distributions(path=[str(folder)]):
            found.setdefault(package.metadata["Name"].lower().replace("_", "-"), package)
    for name, package in sorted(found.items()):
        licence = permissive_licence(package.metadata)
        files = sorted(file for file in package.files or [] if ".." not in file.parts)
        if licence is None or not files:
            continue
        texts = list(_read(((file, Path(str(package.locate_file(file)))) for file in files), seen))
        if texts:
            yield Source(f"{name} {package.version}", "code", licence, name in HELD_OUT_PACKAGES, texts)


def library_source(folder: Path, version: str, seen: set[str]) -> Source:
    """Python's standard library, its tests and embedded documentation included.

    Args:
        folder: as `sysconfig.get_path("stdlib")` gives it.
        version: of that Python.
        seen: hashes of the texts that came already; grows.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts = list(_read(((path.relative_to(folder), path) for path in files), seen))
    return Source(f"Python {version}", "code", "PSF-2.0", False, texts)


def _read(files: Iterator[tuple[PurePath, Path]], seen: set[str]) -> Iterator[str]:
    for name, path in files:
        metadata = name.name == "METADATA"  # the package's description, often its README
        if not metadata and (
            path.suffix not in _CODE | _DOCS or any(_SKIPPED.match(part.split(".")[0].lower()) for part in name.parts)
        ):
            continue
        if not path.is_file() or not 400 < path.stat().st_size < 400_000:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest in seen or not readable(text):
            continue
        seen.add(digest)
        yield f"# {name.as_posix()}\n{text.strip()}\n"


def readable(text: str) -> bool:
    """Whether a file looks written by people: not generated, a table of numbers, minified or in another script."""
    lines = text.count("\n") + 1
    plain = sum(map(str.isascii, text))
    digits = sum(map(str.isdigit, text))
    return (
        "@generated" not in text[:500]
        and "\ufffd" not in text
        and plain > 0.95 * len(text)
        and digits < 0.15 * len(text)
        and 8 < len(text) / lines < 110
    )
