"""`kvcompress eval`: recipes and budgets compared by answers, by output error and by measured bytes."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .models import MODEL_HELP
from .table import columns

if TYPE_CHECKING:
    from kvcompress_hf import Recipe

    from .suites import Sample
    from .suites_run import Outputs

SUITES = ("quick", "output-error")
MODES = ("unseen", "seen")
RECIPES = (
    "lossless,k8v4,k4v4,k4v2,auto,auto-kvzip,kv-compress,kv-compress@k4v4,leankv,snapkv,kvzip,h2o,roco,pyramidkv,"
    "ada-snapkv,tova,scissorhands,expected-attention,streaming,keydiff"
)
BUDGETS = "1/2,1/4,1/8,1/16,1/32,1/64"
_PROSE = "prose"
_LEGEND = "measured bytes as a share of the dense cache, ! where more than the budget"


def add_commands(commands: Any) -> None:
    """Add the subcommand to the parser's subparsers action."""
    ev = commands.add_parser("eval", help="compare recipes and budgets by answers, output error and measured bytes")
    ev.add_argument("--suite", choices=SUITES, default="quick", help="what to measure (default: %(default)s)")
    ev.add_argument("--model", default="tiny", help=f"{MODEL_HELP} (default: %(default)s)")
    ev.add_argument("--text", type=Path, help="a long text (default: haystack.txt beside the model)")
    ev.add_argument(
        "--recipes", default=RECIPES, help="presets, with changes as in kv-compress@k4v4 or auto@page_bytes=4096"
    )
    ev.add_argument("--budgets", default=BUDGETS, help="for the recipes that evict (default: %(default)s)")
    ev.add_argument("--modes", default=",".join(MODES), help="question unseen or seen by the compression")
    ev.add_argument("--samples", type=int, default=4, help="contexts per task (default: %(default)s)")
    ev.add_argument("--context", type=int, default=1000, help="tokens of a context (default: %(default)s)")
    ev.add_argument("--seed", type=int, default=0, help="fixes contexts and questions (default: %(default)s)")
    ev.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: the model's)")
    ev.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    ev.add_argument(
        "--json", type=Path, default=Path("kvcompress_eval.json"), help="file for all figures (default: %(default)s)"
    )
    ev.add_argument("--plot", type=Path, help="PNG for the curves (default: the name of --json with .png)")
    ev.add_argument("--add", action="store_true", help="keep what --json holds; measure only what is missing there")
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


def find_text(model: str, text: Path | None) -> Path:
    """The long text: the given one, or `haystack.txt` beside the model.

    Raises:
        FileNotFoundError: where there is none.
    """
    path = text or Path(model) / "haystack.txt"
    if not path.is_file():
        raise FileNotFoundError(f"no long text at {path}: give one with --text")
    return path


def run_eval(args: argparse.Namespace) -> int:
    """Run a suite, print its table, and write the figures and the curves that were asked for."""
    from .generate import load
    from .models import find_model
    from .suites import make_samples

    cells = make_cells(args.recipes, args.budgets)
    modes = read_modes(args.modes)
    name = find_model(args.model)
    text = find_text(name, args.text)
    model, tokenizer = load(name, dtype=args.dtype, device=args.device)
    samples = make_samples(
        tokenizer,
        text.read_text(encoding="utf-8", errors="replace"),
        count=args.samples,
        length=args.context,
        seed=args.seed,
    )
    setting = {
        "model": Path(name).name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": text.name,
        "context_tokens": args.context,
        "contexts_per_task": args.samples,
        "modes": modes,
        "seed": args.seed,
    }
    before: dict[str, Any] = {"seconds": 0.0, "cells": []}
    if args.add and args.json.exists():
        before = read_before(args.json, setting)
    known = {(cell["recipe"], cell["budget"]) for cell in before["cells"]}
    cells = [cell for cell in cells if (cell.name, cell.budget) not in known]
    print(
        f"{Path(name).name}: {model.num_parameters() / 1e6:.1f} M parameters, {model.dtype}, on {args.device}; "
        f"{len(samples)} contexts of {args.context:,} tokens of {text.name}, {len(cells)} recipes and budgets\n",
        flush=True,
    )
    began = time.perf_counter()
    baseline, results = run_suite(model, samples, cells, modes, seed=args.seed)
    figures = {
        **setting,
        "seconds": round(before["seconds"] + time.perf_counter() - began, 1),
        **surroundings(args.device),
        "full": baseline,
        "cells": before["cells"] + results,
    }
    draw = draw_errors if args.suite == "output-error" else draw_answers
    for mode in modes:
        print(draw(figures, mode) + "\n")
    print(f"{figures['seconds']:.0f} s")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"Figures: {args.json}")
    if args.plot or importlib.util.find_spec("matplotlib"):
        draw_curves(figures, modes, args.suite, args.plot or args.json.with_suffix(".png"))
    else:
        print("No curves: they need matplotlib, install kvcompress_hf[plot]")
    return 0


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


def run_suite(
    model: Any, samples: Sequence[Sample], cells: Sequence[Cell], modes: Sequence[str], *, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measures every cell on every sample.

    Args:
        model: the model, not patched.
        samples: contexts and questions.
        cells: recipes and budgets.
        modes: `"unseen"` compresses the context before any question is known, each question on its own fork; `"seen"`
            compresses context and question together, but for the question's last token, from which the answer starts.
        seed: fixes what recipes leave to chance.

    Returns:
        The figures of the full cache, and those of each cell with one entry per mode.
    """
    import torch
    from tqdm import tqdm

    import kvcompress_hf as kvc

    from . import suites_run as run

    found: dict[tuple[int, str], list[dict[str, Any]]] = {(i, mode): [] for i in range(len(cells)) for mode in modes}
    full_rows = []
    total = len(samples) * len(cells) * len(modes)
    with torch.inference_mode(), tqdm(total=total, unit="cell", disable=None, file=sys.stderr) as bar:
        for index, sample in enumerate(samples):
            label = {"task": sample.task, "sample": index}
            full = [run.reference(model, sample.context, question) for question in sample.questions]
            for question, outputs in zip(sample.questions, full, strict=True):
                full_rows.append({**label, **run.answer_scores(outputs, outputs, question.answer)})
            with kvc.patched(model, "lossless"):
                for mode in modes:
                    for i, rows in enumerate(_measure(model, sample, cells, mode, full, seed)):
                        found[i, mode] += [{**label, **row} for row in rows]
                        bar.update()
    baseline = _answers(full_rows, full_rows)
    results = []
    for i, cell in enumerate(cells):
        entry: dict[str, Any] = {"recipe": cell.name, "budget": cell.budget}
        for mode in modes:
            entry[mode] = {**_answers(found[i, mode], full_rows), **_errors(found[i, mode])}
        results.append({**entry, "definition": cell.recipe.to_dict()})
    return baseline, results


def _measure(
    model: Any,
    sample: Sample,
    cells: Sequence[Cell],
    mode: str,
    full: Sequence[Outputs],
    seed: int,
) -> Iterator[list[dict[str, Any]]]:
    """For each cell, one row of figures per question of a sample; see `run_suite`."""
    from . import suites_run as run

    unseen = mode == "unseen"
    # Prose has no question that compression could see, so that it is measured once.
    questions = sample.questions if unseen or sample.task != _PROSE else []
    ids = [sample.context] if unseen else [sample.context + question.ids[:-1] for question in questions]
    prompts = [run.Prompt(model, prompt) for prompt in ids]
    for cell in cells:
        caches = [prompt.fill(cell.recipe, seed) for prompt in prompts]
        ratios = [run.ratio_while_decoding(model, cache) for cache in caches]
        rows = []
        for j, (question, whole) in enumerate(zip(questions, full, strict=False)):
            cache = caches[0].fork() if unseen else caches[j]
            given = question.ids if unseen else question.ids[-1:]
            outputs = run.answer_on(model, cache, given, question.answer)
            figures = run.answer_scores(outputs, whole, question.answer) | run.output_errors(outputs, whole)
            rows.append({**figures, "ratio": ratios[0 if unseen else j]})
        yield rows


def _answers(rows: list[dict[str, Any]], full: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums up answers: over the retrieval tasks together, per task, and prose by itself."""
    asked = [row for row in rows if row["task"] != _PROSE]
    result: dict[str, Any] = {**_accuracy(asked), "tasks": {}}
    for task in dict.fromkeys(row["task"] for row in asked):
        result["tasks"][task] = _accuracy([row for row in asked if row["task"] == task])
    prose = [row for row in rows if row["task"] == _PROSE]
    if prose:
        losses = {row["sample"]: row["nll"] for row in full if row["task"] == _PROSE}
        changes = [{**row, "nll_change": row["nll"] - losses[row["sample"]]} for row in prose]
        result["prose"] = {
            "perplexity": math.exp(_mean([row["nll"] for row in prose])),
            **_spread("nll_change", changes),
            **_spread("kl", prose),
        }
    return result


def _errors(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums up measured bytes (mean and largest share) and output errors: of logits, and of each layer's attention."""
    layers = zip(*(row["layers"] for row in rows), strict=True)
    ratios = [row["ratio"] for row in rows]
    return {
        **_spread("logits", rows),
        **_spread("attention", rows),
        "layers": [_mean(list(layer)) for layer in layers],
        "ratio": _mean(ratios),
        "ratio_most": max(ratios),
    }


def _accuracy(rows: list[dict[str, Any]]) -> dict[str, Any]:
    right = sum(row["exact"] for row in rows)
    low, high = wilson(right, len(rows))
    return {
        "right": right,
        "questions": len(rows),
        "accuracy": right / max(1, len(rows)),
        "wilson95": [low, high],
        "tokens_right": _mean([row["tokens"] for row in rows]),
        "tokens_as_full": _mean([row["same"] for row in rows]),
        **_spread("kl", rows),
    }


def _spread(name: str, rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Mean, and standard error over contexts (questions about one context are not independent), `None` for one."""
    contexts: dict[int, list[float]] = {}
    for row in rows:
        contexts.setdefault(row["sample"], []).append(row[name])
    means = [_mean(values) for values in contexts.values()]
    center, n = _mean(means), len(means)
    error = math.sqrt(sum((value - center) ** 2 for value in means) / (n - 1) / n) if n > 1 else None
    return {name: center, f"{name}_se": error}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def wilson(right: int, questions: int) -> tuple[float, float]:
    """The 95 % interval of a proportion by Wilson's score method; all of [0, 1] for no questions."""
    if not questions:
        return 0.0, 1.0
    z, p = 1.959964, right / questions
    center = (p + z * z / (2 * questions)) / (1 + z * z / questions)
    half = z / (1 + z * z / questions) * math.sqrt(p * (1 - p) / questions + z * z / (4 * questions**2))
    return max(0.0, center - half), min(1.0, center + half)


def in_order(cells: Sequence[dict[str, Any]], mode: str) -> list[dict[str, Any]]:
    """Cells by budget as asked for, largest first, those without one ahead; then by measured bytes."""
    from . import parse_budget

    def size(cell: dict[str, Any]) -> tuple[float, float]:
        budget = parse_budget(cell["budget"]) if cell["budget"] else math.inf
        return -float(budget) if not isinstance(budget, str) else 0.0, -cell[mode]["ratio"]

    return sorted(cells, key=size)


def draw_answers(figures: dict[str, Any], mode: str) -> str:
    """The table of the quick suite for one mode."""
    full = figures["full"]
    tasks = list(full["tasks"])
    header = ["recipe", "budget", "bytes", "exact", "95 % interval", "tokens", "as full", "KL per token", "attention"]
    header += ["logits", *tasks]
    prose = mode == "unseen"
    header += ["prose ΔNLL"] if prose else []
    low, high = full["wilson95"]
    rows = [["full cache", "", "100.0%", f"{full['accuracy']:.0%}", f"{low:.0%} - {high:.0%}"]]
    rows[0] += [f"{full['tokens_right']:.0%}", "100%", "0", "0", "0"]
    rows[0] += [f"{full['tasks'][task]['right']}/{full['tasks'][task]['questions']}" for task in tasks]
    rows[0] += [f"ppl {full['prose']['perplexity']:.1f}"] if prose else []
    for cell in in_order(figures["cells"], mode):
        got = cell[mode]
        low, high = got["wilson95"]
        row = [cell["recipe"], cell["budget"], measured_bytes(cell, mode), f"{got['accuracy']:.0%}"]
        row += [f"{low:.0%} - {high:.0%}", f"{got['tokens_right']:.0%}", f"{got['tokens_as_full']:.0%}"]
        row += [plus_minus(got["kl"], got["kl_se"]), f"{got['attention']:.3f}", f"{got['logits']:.3f}"]
        row += [str(got["tasks"][task]["right"]) for task in tasks]
        row += [plus_minus(got["prose"]["nll_change"], got["prose"]["nll_change_se"])] if prose else []
        rows.append(row)
    return f"Question {mode}: {_LEGEND}\n" + columns(rows, header, right=True)


def draw_errors(figures: dict[str, Any], mode: str) -> str:
    """The table of the output-error suite for one mode."""
    cells = in_order(figures["cells"], mode)
    layers = len(cells[0][mode]["layers"])
    header = ["recipe", "budget", "bytes", "logits", *(f"layer {i}" for i in range(layers))]
    rows = []
    for cell in cells:
        got = cell[mode]
        row = [cell["recipe"], cell["budget"], measured_bytes(cell, mode), plus_minus(got["logits"], got["logits_se"])]
        rows.append(row + [f"{error:.3f}" for error in got["layers"]])
    title = f"Question {mode}: relative errors of logits and of each layer's attention output; {_LEGEND}"
    return title + "\n" + columns(rows, header, right=True)


def measured_bytes(cell: dict[str, Any], mode: str) -> str:
    """Measured bytes as a share of the dense cache, with a `!` where a context took more than a fraction budget."""
    from . import parse_budget

    budget = parse_budget(cell["budget"]) if cell["budget"] else None
    over = isinstance(budget, float) and cell[mode]["ratio_most"] > budget
    return f"{cell[mode]['ratio']:.1%}" + ("!" if over else "")


def plus_minus(value: float, error: float | None) -> str:
    """A mean and its standard error, with as many digits as the mean deserves."""
    digits = 3 if abs(value) >= 0.01 else 5
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def draw_curves(figures: dict[str, Any], modes: Sequence[str], suite: str, path: Path) -> None:
    """Write a PNG: each measure against measured bytes, one line per recipe, one column per mode.

    Raises:
        ImportError: where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise ImportError("the curves need matplotlib: install kvcompress_hf[plot]") from error

    labels = {
        "accuracy": "exact answers",
        "kl": "KL(full || compressed), nats",
        "attention": "relative error of attention outputs",
        "logits": "relative error of logits",
    }
    measures = ["attention", "logits"] if suite == "output-error" else ["accuracy", "kl", "attention"]
    figure = Figure(figsize=(6 * len(modes) + 2, 4 * len(measures)), layout="constrained")
    panels = figure.subplots(len(measures), len(modes), squeeze=False, sharex=True, sharey="row")
    names = list(dict.fromkeys(cell["recipe"] for cell in figures["cells"]))
    for row, measure in zip(panels, measures, strict=True):
        for axes, mode in zip(row, modes, strict=True):
            for i, name in enumerate(names):
                points = [cell[mode] for cell in figures["cells"] if cell["recipe"] == name]
                points = sorted((point["ratio"], point[measure]) for point in points)
                style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
                axes.plot(*zip(*points, strict=True), marker="osD^v"[i % 5], markersize=4, label=name, **style)
            if measure == "accuracy":
                axes.axhline(figures["full"]["accuracy"], color="black", linewidth=0.8, label="full cache")
            else:
                axes.set_yscale("log")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"1/{1 / x:.0f}" if x < 1 else f"{x:g}"))
            axes.set(title=f"question {mode}", xlabel="measured bytes / dense bytes", ylabel=labels[measure])
            axes.grid(alpha=0.3)
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", fontsize=8)
    figure.suptitle(f"{figures['model']}, {figures['context_tokens']} tokens", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    print(f"Curves: {path}")
