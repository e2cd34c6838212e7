"""`kvcompress demo`: a document is read once, and questions that come later are answered from several caches."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress_hf.errors import ModelNotFetchedError
from kvcompress_hf.units import format_bytes

from .models import MODEL_HELP
from .table import columns

if TYPE_CHECKING:
    from .demo_run import Bench, Outcome
    from .readings import Reading

DEFAULT_MODEL = "smollm2"
_WIDTHS = (22, 7, 10, 9, 7, 12, 12)
_QUICKER = (
    "This CPU has no AVX512, so the model's linear layers are computed in float32 and rounded to 16 bits, with every\n"
    "cache: it is several times faster. Keys, values and bytes stay as they are.\n"
)
_HEADER = ("cache", "right", "same text", "bytes", "ratio", "read tok/s", "write tok/s")


def add_commands(commands: Any) -> None:
    """Add the subcommand to the parser's subparsers action."""
    demo = commands.add_parser("demo", help="read a document once, ask about it later, with the stock cache and ours")
    demo.add_argument("--model", help=f"{MODEL_HELP} (default: {DEFAULT_MODEL}, tiny where it cannot be fetched)")
    demo.add_argument("--text", type=Path, help="a document to read (default: the first chapter of a novel)")
    demo.add_argument("--ask", action="append", metavar="QUESTION", help="ask this about --text; may be repeated")
    demo.add_argument("--new-tokens", type=int, default=12, help="at most, per answer (default: %(default)s)")
    demo.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: the model's)")
    demo.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")
    demo.add_argument("--debug", action="store_true", help="show the traceback of an error")
    demo.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace) -> int:
    """Run the comparison; print the table, the answers and what heads kept; write the figures and a picture."""
    from .demo_picture import draw_heads, text_heads
    from .demo_run import Bench
    from .evaluate import surroundings
    from .generate import load
    from .linears import linears_in_float32

    name = choose_model(args.model)
    model, tokenizer = load(name, dtype=args.dtype, device=args.device)
    reading = choose_reading(tokenizer, name, args)
    print(
        f"{Path(name).name}: {model.num_parameters() / 1e6:.1f} M parameters, {model.dtype}, on {args.device}.\n"
        f"It reads {reading.title!r}, {len(reading.ids):,} tokens, once with each cache, and is then asked "
        f"{len(reading.inquiries)} questions.\n",
        flush=True,
    )
    began = time.perf_counter()
    with linears_in_float32(model) as quicker:
        if quicker:
            print(_QUICKER, flush=True)
        outcomes = run_methods(Bench(model, tokenizer, reading, args.new_tokens), reading)
    print(
        "\nright: answers that hold what the document says; same text: answers that are stock's, word for word;"
        "\nbytes: what is allocated after reading, scales, tables and free pages included; ratio: as a share of stock's"
        ".\nA model this small is often wrong: stock is the measure, not the truth. lossless promises stock's text in"
        "\nfloat32; in 16 bits its arithmetic is stock's within rounding."
    )
    print("\n" + draw_answers(reading, outcomes))
    print("\n" + draw_second(outcomes))
    kept = [outcome for outcome in outcomes if outcome.evicts]
    print("\n" + text_heads(kept))
    figures = {
        "model": Path(name).name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "linears_in_float32": quicker,
        "document": reading.title,
        "document_tokens": len(reading.ids),
        "new_tokens": args.new_tokens,
        **surroundings(args.device),
        "seconds": round(time.perf_counter() - began, 1),
        "questions": [inquiry.question for inquiry in reading.inquiries],
        "methods": [outcome.to_dict(outcomes[0]) for outcome in outcomes],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "demo.json"
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\nFigures: {path}")
    draw_heads(kept, args.output / "heads.png")
    print(f"{figures['seconds']:.0f} s in all")
    return 0


def run_methods(bench: Bench, reading: Reading) -> list[Outcome]:
    """What came of each cache; prints the table line by line."""
    from .demo_run import METHODS

    print(row(_HEADER) + "\n" + row(["-" * width for width in _WIDTHS]), flush=True)
    outcomes: list[Outcome] = []
    for method in METHODS:
        with note(f"{method.title}: reading {len(reading.ids):,} tokens, then {len(reading.inquiries)} answers ..."):
            outcomes.append(bench.run(method))
        print(draw_row(outcomes[-1], outcomes[0]), flush=True)
    return outcomes


def choose_model(name: str | None) -> str:
    """The folder or hub id to run, the repository's tiny model where the real one cannot be had."""
    from .models import find_model, tell

    if name is not None:
        return find_model(name)
    try:
        return find_model(DEFAULT_MODEL)
    except ModelNotFetchedError as error:
        tell(f"The real model cannot be had, so the tiny one it is: {error}")
        return find_model("tiny")


def choose_reading(tokenizer: Any, name: str, args: argparse.Namespace) -> Reading:
    """The document and its questions: for the repository's small models the facts that they were trained to find."""
    from .readings import document_reading, facts_reading, find_document

    haystack = Path(name) / "haystack.txt"
    if haystack.is_file() and args.text is None:
        return facts_reading(tokenizer, haystack)
    return document_reading(tokenizer, find_document(args.text), args.ask)


@contextmanager
def note(text: str) -> Iterator[None]:
    """A line on the terminal for as long as something runs; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r" + " " * len(text) + "\r", end="", file=sys.stderr, flush=True)


def row(cells: Any) -> str:
    """Cells in the columns of the demo's table, which is printed line by line as results come."""
    first, *rest = cells
    return "  ".join([first.ljust(_WIDTHS[0]), *map(str.rjust, rest, _WIDTHS[1:])]).rstrip()


def draw_row(outcome: Outcome, stock: Outcome) -> str:
    """One cache's line of the table."""
    asked = len(outcome.answers)
    same = sum(a.text == b.text for a, b in zip(outcome.answers, stock.answers, strict=True))
    return row(
        [
            outcome.title,
            f"{sum(answer.right for answer in outcome.answers)}/{asked}",
            f"{same}/{asked}",
            format_bytes(outcome.total),
            f"{outcome.total / outcome.dense:.1%}",
            f"{outcome.read_speed:,.0f}",
            f"{outcome.write_speed:,.1f}",
        ]
    )


def draw_answers(reading: Reading, outcomes: list[Outcome]) -> str:
    """Every question with the answer of each cache below it."""
    lines = []
    for i, inquiry in enumerate(reading.inquiries):
        lines.append(f"{i + 1}. {inquiry.question}" + (f" {inquiry.begin} ..." if inquiry.begin else ""))
        stock = outcomes[0].answers[i].text
        for outcome in outcomes:
            answer = outcome.answers[i]
            text = "the same" if outcome is not outcomes[0] and answer.text == stock else answer.text
            lines.append(f"   {'+' if answer.right else '-'} {outcome.title:<20} {text}")
    return "\n".join(lines)


def draw_second(outcomes: list[Outcome]) -> str:
    """How long the second answer takes: with the document read again, and from a cache that was saved to a file."""
    rows = []
    for outcome in outcomes:
        how = "reads the document again"
        if outcome.file_bytes is not None:
            how = f"loads {format_bytes(outcome.file_bytes)} in {outcome.load_seconds:.2f} s"
        sooner = f"{outcomes[0].second_seconds / outcome.second_seconds:.1f} x as soon"
        rows.append([outcome.title, how, f"{outcome.second_first:.2f} s", f"{outcome.second_seconds:.2f} s", sooner])
    return columns(rows, ["the second question, in a new session", "how", "first token", "answer", ""])
