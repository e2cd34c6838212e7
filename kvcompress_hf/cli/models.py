"""The models of this repository, by their short names."""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODELS", "find_model"]

FOLDER = Path("examples") / "models"
#: Short names that `--model` takes, and the folders they stand for.
MODELS = {"tiny": "kvlm-tiny", "eval": "kvlm-eval"}


def find_model(name: str = "tiny") -> str:
    """What `--model` stands for.

    Args:
        name: one of `MODELS`, seen from the working directory or from this file's checkout; anything else, or a name
            for which there is a model's folder here, is a folder or hub id already.

    Returns:
        A folder, or the name as it was given.

    Raises:
        FileNotFoundError: for one of `MODELS` where there is no checkout, as in an install from a wheel.
    """
    if name not in MODELS or (Path(name) / "config.json").is_file():
        return name
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / FOLDER / MODELS[name] / "config.json").is_file():
            return str(root / FOLDER / MODELS[name])
    raise FileNotFoundError(
        f"no {FOLDER / MODELS[name]} here: run this inside a clone of the repository, or give a folder with --model"
    )
