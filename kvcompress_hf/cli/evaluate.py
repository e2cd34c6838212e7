"""`kvcompress eval`: recipes and budgets compared by answers, by what else the model says, and by measured bytes."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .models import MODEL_HELP
from .texts import SPLITS

if TYPE_CHECKING:
    from kvcompress_hf import Recipe

    from .chat import Form
    from .suites import Amounts, Sample
    from .texts import Text

#: What each suite measures, and how many tokens of prose and of a long generation.
SUITES = {
    "quick": (("needle", "multi-key", "copy", "prose"), 64),
    "full": (("needle", "multi-key", "copy", "prose", "summary", "generation", "conversation"), 256),
    "output-error": (("prose",), 64),
}
MODES = ("unseen", "seen")
FORMS = ("auto", "chat", "plain")
RECIPES = "lossless,k8v4,k4v4,k4v2,auto,kv-compress@k4v4,snapkv,keydiff"
BUDGETS = "1/4,1/8,1/16"


def add_commands(commands: Any) -> None:
    """Add the subcommand to the parser's subparsers action."""
    ev = commands.add_parser("eval", help="compare recipes and budgets by accuracy and measured bytes")
    ev.add_argument("--suite", choices=list(SUITES), default="quick", help="what to measure (default: %(default)s)")
    ev.add_argument("--probes", help=f"of {','.join(SUITES['full'][0])} (default: the suite's)")
    ev.add_argument("--tokens", type=int, help="of prose and of a long generation (default: 64, 256 in the full suite)")
    ev.add_argument("--model", default="tiny", help=f"{MODEL_HELP} (default: %(default)s)")
    ev.add_argument("--form", choices=FORMS, default="auto", help="chat template or plain text (default: by the model)")
    ev.add_argument("--split", choices=SPLITS, default=SPLITS[0], help="authors to read (default: %(default)s)")
    ev.add_argument("--text", type=Path, help="a long text, or a folder of them (default: the split's)")
    ev.add_argument(
        "--recipes", default=RECIPES, help="presets, with changes as in kv-compress@k4v4 or auto@page_bytes=4096"
    )
    ev.add_argument("--budgets", default=BUDGETS, help="for the recipes that evict (default: %(default)s)")
    ev.add_argument("--against", default="auto", help="recipe that others are compared with (default: %(default)s)")
    ev.add_argument("--modes", default=",".join(MODES), help="question unseen or seen by the compression")
    ev.add_argument("--contexts", type=int, default=4, help="how many, of each length (default: %(default)s)")
    ev.add_argument(
        "--context", default="1000", help="tokens of a context, as in 1000,2000,4000 (default: %(default)s)"
    )
    ev.add_argument("--seed", type=int, default=0, help="fixes contexts and questions (default: %(default)s)")
    ev.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: the model's)")
    ev.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    ev.add_argument(
        "--output", type=Path, default=Path("kvcompress_eval.json"), help="file for all figures (default: %(default)s)"
    )
    ev.add_argument("--plot", type=Path, help="PNG for the curves (default: the name of --output with .png)")
    ev.add_argument("--add", action="store_true", help="keep what --output holds; measure only what is missing there")
    ev.add_argument("--debug", action="store_true", help="show the traceback of an error")
    ev.set_defaults(run=run_eval)


@dataclass(frozen=True)
class Cell:
    """One recipe at one budget.

    Args:
        name: the recipe as it was asked for.
        budget: the budget as it was asked for; empty for recipes without one.
        recipe: what caches are made with.
    """

    name: str
    budget: str
    recipe: Recipe


def make_cells(recipes: str, budgets: str) -> list[Cell]:
    """Every recipe at every budget; recipes that do not evict once.

    Args:
        recipes: `NAME[@CHANGE...]`, separated by commas. A change is a tier, tiers joined by `+`, or `PART=VALUE`
            with the value in JSON.
        budgets: as `parse_budget` takes them, separated by commas.

    Raises:
        ValueError: for a recipe or a budget that is not allowed.
    """
    from kvcompress_hf.presets import resolve_recipe

    from . import parse_budget

    cells = []
    for name in filter(None, (part.strip() for part in recipes.split(","))):
        preset, *changes = name.split("@")
        overrides = dict(_change(change) for change in changes)
        recipe = resolve_recipe(preset, **overrides)
        if not recipe.evicts:
            cells.append(Cell(name, "", recipe))
            continue
        for budget in filter(None, (part.strip() for part in budgets.split(","))):
            cells.append(Cell(name, budget, recipe.with_overrides(budget=parse_budget(budget))))
    if not cells:
        raise ValueError("no recipe to evaluate: give --recipes, and --budgets for those that evict")
    return cells


def _change(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        return "tiers", tuple(text.split("+"))
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def run_eval(args: argparse.Namespace) -> int:
    """Run a suite, print its tables, and write the figures and the curves that were asked for."""
    from .eval_run import Run
    from .figures import compare, to_text
    from .generate import load
    from .linears import linears_in_float32
    from .models import find_model
    from .suites import ASKED
    from .texts import find_texts

    cells = make_cells(args.recipes, args.budgets)
    modes = read_modes(args.modes)
    probes, amounts = read_probes(args)
    if modes == ["seen"] and not set(ASKED) & set(probes):
        raise ValueError(f"--modes seen is for questions: measure {' or '.join(ASKED)} too, or unseen")
    lengths = read_lengths(args.context)
    name = find_model(args.model)
    texts = find_texts(name, args.split, args.text)
    model, tokenizer = load(name, dtype=args.dtype, device=args.device)
    form = choose_form(tokenizer, args.form)
    figures: dict[str, Any] = {
        "model": Path(name).name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "form": "chat" if form.chat else "plain",
        "split": "given" if args.text else args.split,
        "texts": [text.name for text in texts],
        "contexts": args.contexts,
        "probes": probes,
        "tokens": amounts.tokens,
        "modes": modes,
        "seed": args.seed,
        "seconds": 0.0,
    }
    before: dict[str, Any] = {"seconds": 0.0, "full": {}, "cells": []}
    if args.add and args.output.exists():
        before = read_before(args.output, {name: value for name, value in figures.items() if name != "seconds"})
    known = {(cell["recipe"], cell["budget"], cell["context"]) for cell in before["cells"]}
    todo = {n: [cell for cell in cells if (cell.name, cell.budget, n) not in known] for n in lengths}
    print(
        f"{figures['model']}: {model.num_parameters() / 1e6:.1f} M parameters, {model.dtype}, on {args.device}, "
        f"{figures['form']} form; {args.contexts} contexts of {args.context} tokens from {len(texts)} texts "
        f"({figures['split']}); {len(cells)} recipes and budgets\n",
        flush=True,
    )
    began = time.perf_counter()
    run = Run(model, probes, modes, args.seed, args.suite == "output-error")
    with linears_in_float32(model) as quicker:
        figures |= {"linears_in_float32": quicker, **surroundings(args.device)}
        figures |= {"full": before["full"], "cells": before["cells"]}  # last in the file: they are long
        for n, missing in todo.items():
            if missing:
                samples = make_contexts(tokenizer, texts, form, args, n, amounts)
                figures["full"][str(n)], results = run.measure(samples, missing, n)
                figures["cells"] += results
            figures["seconds"] = round(before["seconds"] + time.perf_counter() - began, 1)
            compare(figures["cells"], args.against, modes)
            write(args.output, to_text(figures))  # what is there is kept if the next length fails
    print_tables(figures, lengths, args)
    print(f"Figures: {args.output}")
    draw_picture(figures, lengths, args)
    return 0


def write(path: Path, text: str) -> None:
    """Writes a file, in a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def make_contexts(
    tokenizer: Any, texts: Sequence[Text], form: Form, args: argparse.Namespace, length: int, amounts: Amounts
) -> list[Sample]:
    """The contexts of one length."""
    from .suites import make_samples

    return make_samples(tokenizer, texts, form, count=args.contexts, length=length, amounts=amounts, seed=args.seed)


def print_tables(figures: dict[str, Any], lengths: Sequence[int], args: argparse.Namespace) -> None:
    """Everything that was found, length by length."""
    from .eval_tables import draw_differences, draw_errors, draw_tables

    for length in lengths:
        if args.suite == "output-error":
            print(draw_errors(figures, length) + "\n")
            continue
        print(draw_tables(figures, length) + "\n")
        print((draw_differences(figures, length) or f"No differences: nothing to compare {args.against} with") + "\n")
    print(f"{figures['seconds']:.0f} s")


def draw_picture(figures: dict[str, Any], lengths: Sequence[int], args: argparse.Namespace) -> None:
    """The curves, where matplotlib is there or they were asked for."""
    from .eval_tables import draw_curves

    if args.plot or importlib.util.find_spec("matplotlib"):
        path = args.plot or args.output.with_suffix(".png")
        draw_curves(figures, lengths, path)
        print(f"Curves: {path}")
    else:
        print("No curves: they need matplotlib, install kvcompress_hf[plot]")


def choose_form(tokenizer: Any, form: str) -> Form:
    """The form of documents and questions: by default the tokenizer's chat template, where it has one."""
    from .chat import chat_form, plain_form

    chat = form == "chat" or (form == "auto" and tokenizer.chat_template)
    return chat_form(tokenizer) if chat else plain_form()


def read_probes(args: argparse.Namespace) -> tuple[list[str], Amounts]:
    """The probes asked for, in the order of the full suite, and how much of each is scored.

    Raises:
        ValueError: for an unknown probe, none, or no tokens.
    """
    from .suites import PROBES, Amounts

    probes, tokens = SUITES[args.suite]
    asked = set(probes) if args.probes is None else {part.strip() for part in args.probes.split(",") if part.strip()}
    if not asked or asked - set(PROBES):
        raise ValueError(f"--probes {args.probes!r} names other than {', '.join(PROBES)}")
    if args.suite == "output-error" and asked != {"prose"}:
        raise ValueError("--suite output-error looks at prose alone: leave --probes out")
    tokens = tokens if args.tokens is None else args.tokens
    if tokens < 8:
        raise ValueError(f"--tokens {tokens} are too few: give at least 8")
    most = Amounts()
    amounts = Amounts(tokens, summary=min(tokens, most.summary), turn=min(tokens, most.turn))
    return [probe for probe in PROBES if probe in asked], amounts


def read_lengths(text: str) -> list[int]:
    """Lengths of contexts, each once.

    Raises:
        ValueError: for anything but whole numbers.
    """
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"--context {text!r}: give numbers of tokens, as in 1000,2000,4000") from None


def read_before(path: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run has measured, to add to.

    Args:
        path: its JSON file.
        setting: what must have been the same.

    Raises:
        ValueError: where it was another model, text or the like.
    """
    before = json.loads(path.read_text())
    for name, value in setting.items():
        if before.get(name) != value:
            raise ValueError(
                f"--add: {path} was measured with {name}={before.get(name)!r}, and this run is with {value!r}; give "
                "the same, or another --json"
            )
    return before


def read_modes(text: str) -> list[str]:
    """The modes asked for, in the order of `MODES`.

    Raises:
        ValueError: for an unknown mode, or none.
    """
    asked = {part.strip() for part in text.split(",") if part.strip()}
    if not asked or asked - set(MODES):
        raise ValueError(f"--modes {text!r} names other than {' and '.join(MODES)}")
    return [mode for mode in MODES if mode in asked]


def surroundings(device: str) -> dict[str, Any]:
    """What a figure depends on besides its arguments: machine, versions, date."""
    import torch

    from .info import processor, version_of

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": processor(),
            "architecture": platform.machine(),
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        },
        "versions": {"python": platform.python_version()}
        | {name: version_of(name) for name in ("kvcompress-hf", "torch", "transformers")},
    }
