"""`kvcompress support`. What it does is in `support.py`, which is imported only when it runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Add the subcommand to the parser's subparsers action."""
    parser = commands.add_parser("support", help="try every model family of transformers and say which work")
    parser.add_argument("family", nargs="*", help="model types, such as llama gemma2; all when left out (minutes)")
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file")
    parser.add_argument("--json", type=Path, help="write the findings to this JSON file")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run_support)


def run_support(args: argparse.Namespace) -> int:
    """Examine families, print a line for each, and write the table."""
    from tqdm import tqdm

    from .support import DIFFERS, examine, to_markdown
    from .tiny_models import families

    known = families()
    for family in args.family:
        if family not in known:
            raise ValueError(f"{family!r} is no model type with a text-writing class; one of {', '.join(known)}.")
    started = time.perf_counter()
    findings = []
    for family in tqdm(args.family or list(known), unit="family", disable=not sys.stderr.isatty()):
        findings.append(examine(family))
        if args.family:
            finding = findings[-1]
            detail = f"{finding.adapter}: {', '.join(finding.equal)}" if finding.equal else finding.note
            print(f"{finding.family}  {finding.status}  {detail}")
    if args.output:
        args.output.write_text(to_markdown(findings))
    if args.json:
        args.json.write_text(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    counts = Counter(finding.status for finding in findings)
    print(", ".join(f"{count} {status}" for status, count in counts.items()), end="")
    print(f" ({time.perf_counter() - started:.0f} s)")
    return 1 if counts[DIFFERS] else 0
