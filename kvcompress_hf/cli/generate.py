"""`kvcompress generate`: continue a prompt with any supported model under a compressed cache, and measure it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kvcompress_hf.units import format_bytes

from .models import MODEL_HELP
from .table import columns


def add_commands(commands: Any) -> None:
    """Add the subcommand to the parser's subparsers action."""
    from . import parse_budget

    gen = commands.add_parser("generate", help="continue a prompt with a compressed cache")
    gen.add_argument("--model", required=True, help=MODEL_HELP)
    prompt = gen.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to continue")
    prompt.add_argument("--prompt-file", type=Path, help="a file with the text; - reads standard input")
    gen.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    gen.add_argument(
        "--recipe", help="a preset (see `kvcompress presets`) or a recipe in JSON (default: the library's)"
    )
    gen.add_argument("--budget", type=parse_budget, help="1/8 (of the dense bytes), 512 (tokens per head) or 512MiB")
    gen.add_argument("--compare", action="store_true", help="run the stock cache as well and compare")
    gen.add_argument("--max-new-tokens", type=int, default=128, help="(default: %(default)s)")
    gen.add_argument("--chunk", type=int, help="prefill the prompt in chunks of this many tokens")
    gen.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: the model's)")
    gen.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    gen.add_argument("--debug", action="store_true", help="show the traceback of an error")
    gen.set_defaults(run=run_generate)


def load(name: str, *, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Load a model and its tokenizer for inference.

    Args:
        name: a folder or a hub id.
        dtype: `"auto"` for the checkpoint's own, or the name of a torch dtype.
        device: a torch device.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        ValueError: for a dtype or device that torch does not know.
        OSError: where there is no such model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvcompress_hf.compat import logging

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype {dtype!r} is not one of auto, float32, bfloat16, float16")
    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is no device of torch; write cpu, cuda or cuda:1, say") from None
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(device).eval(), tokenizer


def recipe_of_json(text: str) -> Any:
    """What `patch` takes, from JSON: a recipe, or the parts of a preset to change where there is a key `preset`.

    Args:
        text: a JSON object.

    Returns:
        A `Recipe` or a dict.

    Raises:
        ValueError: if it is no recipe.
    """
    import kvcompress_hf as kvc

    try:
        values = json.loads(text)
    except ValueError:
        values = {}  # what is wrong with it is said below
    return values if "preset" in values else kvc.Recipe.from_json(text)


def run_generate(args: argparse.Namespace) -> int:
    """Print the continuation, then what the cache took."""

    from . import measure
    from .models import find_model

    if args.prompt_file is not None:
        text = sys.stdin.read() if str(args.prompt_file) == "-" else args.prompt_file.read_text(encoding="utf-8")
    else:
        text = args.prompt
    if not text.strip():
        raise ValueError("the prompt is empty")
    overrides = {} if args.budget is None else {"budget": args.budget}
    model, tokenizer = load(find_model(args.model), dtype=args.dtype, device=args.device)
    if args.chat:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        encoded = tokenizer(text, return_tensors="pt")
    ids = encoded["input_ids"].to(args.device)

    recipe = args.recipe
    if recipe is not None and recipe.lstrip().startswith("{"):
        recipe = recipe_of_json(recipe)
    title = (args.recipe or "default") + (f", {args.budget}" if args.budget is not None else "")
    methods = [measure.Method("stock (DynamicCache)", stock=True)] if args.compare else []
    methods.append(measure.Method(title, recipe, overrides))
    done = []
    for method in methods:
        with measure.using(model, method):
            done.append(measure.run(model, ids, new_tokens=args.max_new_tokens, chunk=args.chunk, stop_at_eos=True))
        if args.compare:
            print(f"--- {method.title}")
        print(tokenizer.decode(done[-1].tokens, skip_special_tokens=True))

    rows = []
    for method, run in zip(methods, done, strict=True):
        rows.append(
            [
                method.title,
                f"{measure.same_prefix(done[0].tokens, run.tokens):.0%}" if args.compare else "-",
                format_bytes(run.memory["total"]),
                f"{run.memory['total'] / run.memory['dense']:.1%}",
                format_bytes(run.peak_cache),
                f"{run.prompt_tokens / run.prefill_seconds:,.0f}",
                f"{run.decode_steps / run.decode_seconds:,.1f}" if run.decode_seconds else "-",
            ]
        )
    header = ["cache", "same tokens", "bytes", "ratio", "peak cache", "prefill tok/s", "decode tok/s"]
    print(f"\n{ids.shape[1]:,} prompt tokens, {len(done[-1].tokens):,} new", file=sys.stderr)
    print(columns(rows, header, right=True), file=sys.stderr)
    return 0
