"""The `kvcompress` command: `demo`, `generate`, `eval`, `models`, `presets`, `doctor`, `support`.

It looks at the library from outside: only the public names of `kvcompress_hf` are used, plus the backend's name for
`doctor`. Nothing in the library imports it. Torch and transformers are imported by the commands that need them, when
they run, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kvcompress_hf.errors import CacheMemoryError


def parse_budget(text: str) -> float | int | str:
    """Read a budget as the library's recipes understand it.

    Args:
        text: `"1/8"` or `"0.125"` (a fraction of the dense bytes), `"512"` (tokens per KV head on average), or
            `"512MiB"` (bytes).

    Returns:
        A float, an int, or the string unchanged.

    Raises:
        argparse.ArgumentTypeError: for an empty text or a fraction with a zero denominator.
    """
    text = text.strip()
    if not text:
        raise argparse.ArgumentTypeError("a budget is a fraction (1/8, 0.125), tokens (512) or bytes (512MiB)")
    try:
        if "/" in text:
            over, under = text.split("/", 1)
            return float(over) / float(under)
        return float(text) if "." in text else int(text)
    except ZeroDivisionError:
        raise argparse.ArgumentTypeError(f"{text!r} divides by zero") from None
    except ValueError:
        return text  # a number with a unit; the library checks it


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of the command, with every subcommand."""
    from . import demo, evaluate, generate, info, models, support_command

    parser = argparse.ArgumentParser(
        prog="kvcompress", description="A compressed, paged, per-head KV cache for Hugging Face transformers."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (demo, generate, evaluate, models, info, support_command):
        module.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; `None` takes them from the command line.

    Returns:
        The exit status: 0, or 1 where a mistake of the user was reported.
    """
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, NotImplementedError, OSError, CacheMemoryError) as error:
        # What the library and transformers raise for a user's mistake; the message already names the fix.
        if args.debug:
            raise
        print(f"kvcompress {args.command}: {error}", file=sys.stderr)
        return 1
