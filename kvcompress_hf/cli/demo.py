"""`kvcompress demo`: facts hidden in a long text, asked for with the stock cache and with compressed ones."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress_hf.units import format_bytes

from .table import columns

if TYPE_CHECKING:
    from .measure import Summary


def add_commands(commands: Any) -> None:
    """Add the subcommand to the parser's subparsers action."""
    demo = commands.add_parser("demo", help="compare caches on facts hidden in a long text, with the tiny model")
    demo.add_argument("--model", default="tiny", help="tiny, eval, a folder or a hub id (default: %(default)s)")
    demo.add_argument("--text", type=Path, help="a long text (default: haystack.txt beside the model)")
    demo.add_argument("--questions", type=int, default=16, help="how many (default: %(default)s)")
    demo.add_argument("--prompt-tokens", type=int, default=2200, help="length of a prompt (default: %(default)s)")
    demo.add_argument("--new-tokens", type=int, default=64, help="tokens made per question (default: %(default)s)")
    demo.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: the model's)")
    demo.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="fixes passages and facts (default: %(default)s)")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")
    demo.add_argument("--debug", action="store_true", help="show the traceback of an error")
    demo.set_defaults(run=run_demo)


def find_text(model: str, text: Path | None) -> Path:
    """The long text: the given one, or `haystack.txt` beside the model.

    Raises:
        FileNotFoundError: where there is none.
    """
    path = text or Path(model) / "haystack.txt"
    if not path.is_file():
        raise FileNotFoundError(f"no long text at {path}: give one with --text")
    return path


def run_demo(args: argparse.Namespace) -> int:
    """Run the comparison, print the table and write the heatmap and the figures."""
    from tqdm import tqdm

    from . import measure
    from .facts import make_questions
    from .generate import load
    from .models import find_model

    methods = [
        measure.Method("stock (DynamicCache)", stock=True),
        measure.Method("lossless", "lossless"),
        measure.Method("k8v4", "k8v4"),
        measure.Method("kv-compress, 1/4", "kv-compress", {"budget": 1 / 4}),
        measure.Method("kv-compress, 1/8", "kv-compress", {"budget": 1 / 8}),
        measure.Method("kv-compress on k8v4, 1/4", "kv-compress", {"budget": 1 / 4, "tiers": "k8v4"}),
        measure.Method("kv-compress on k8v4, 1/8", "kv-compress", {"budget": 1 / 8, "tiers": "k8v4"}),
        measure.Method("auto, 1/4", "auto", {"budget": 1 / 4}),
        measure.Method("auto, 1/8", "auto", {"budget": 1 / 8}),
    ]
    name = find_model(args.model)
    text = find_text(name, args.text)
    model, tokenizer = load(name, dtype=args.dtype, device=args.device)
    questions = make_questions(
        tokenizer,
        text.read_text(encoding="utf-8", errors="replace"),
        count=args.questions,
        prompt_tokens=args.prompt_tokens,
        seed=args.seed,
    )
    prompts = [tokenizer(q.prompt, return_tensors="pt").input_ids.to(args.device) for q in questions]
    lengths = [p.shape[1] for p in prompts]
    print(
        f"{Path(name).name}: {model.num_parameters() / 1e6:.1f} M parameters, {model.dtype}, on {args.device}; "
        f"{len(questions)} questions, prompts of {min(lengths):,} to {max(lengths):,} tokens of {text.name}, "
        f"{args.new_tokens} new tokens each\n",
        flush=True,
    )

    began = time.perf_counter()
    summaries: list[Summary] = []
    with tqdm(total=len(methods) * len(questions), unit="question", disable=None, file=sys.stderr) as bar:
        for method in methods:
            bar.set_description(method.title)
            summary = measure.Summary(method)
            with measure.using(model, method):
                measure.run(model, prompts[0][:, :64], new_tokens=4)  # the first calls are slower: not counted
                for i, (question, ids) in enumerate(zip(questions, prompts, strict=True)):
                    done = measure.run(model, ids, new_tokens=args.new_tokens)
                    summary.runs.append(done)
                    summary.right += question.is_right(tokenizer.decode(done.tokens, skip_special_tokens=True))
                    stock = summaries[0].runs[i] if summaries else done
                    summary.same.append(measure.same_prefix(stock.tokens, done.tokens))
                    bar.update()
            summaries.append(summary)

    figures = {
        "model": Path(name).name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": text.name,
        "prompt_tokens": lengths,
        "new_tokens": args.new_tokens,
        "seconds": round(time.perf_counter() - began, 1),
        "methods": [summary.to_dict() for summary in summaries],
    }
    print(draw_table(figures["methods"]))
    print(
        "\nBytes are those allocated at the end of a question, mean over the questions; metadata = scales, offsets and"
        "\nslot fields, slack = unused room in pages and free pages, ratio = bytes / the same tokens in a stock cache."
        "\nSame tokens = share before the first token that differs from the stock cache's."
    )
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\nFigures: {args.output / 'demo.json'}")
    for method, summary in zip(methods, figures["methods"], strict=True):
        if "budget" in method.overrides:
            draw_heatmap(summary, args.output / f"slots_{slug(method.title)}.png")
    return 0


def slug(title: str) -> str:
    """A title as a part of a file name: `slug("kv-compress, 1/8") == "kv-compress-1-8"`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def draw_table(methods: list[dict[str, Any]]) -> str:
    """The table of the demo, one line per method.

    Args:
        methods: `Summary.to_dict()` of each.
    """
    header = ["cache", "right", "same tokens", "bytes", "payload", "metadata", "tables", "slack", "ratio"]
    header += ["prefill tok/s", "decode tok/s", "peak cache", "peak process"]
    rows = []
    for m in methods:
        parts = m["bytes"]
        process = m["peak_process_bytes"]
        rows.append(
            [
                m["title"],
                f"{m['right']}/{m['questions']}",
                f"{m['same_tokens']:.0%}",
                format_bytes(parts["total"]),
                format_bytes(parts["payload"] + parts["tail"]),
                format_bytes(parts["metadata"] + parts["fields"]),
                format_bytes(parts["tables"]),
                format_bytes(parts["slack"] + parts["free"]),
                f"{m['ratio']:.1%}",
                f"{m['prefill_tokens_per_second']:,.0f}",
                f"{m['decode_tokens_per_second']:,.0f}",
                format_bytes(m["peak_cache_bytes"]),
                "-" if process is None else "+" + format_bytes(process),
            ]
        )
    return columns(rows, header, right=True)


def draw_heatmap(method: dict[str, Any], path: Path) -> None:
    """Write a PNG of the slots a method keeps per layer and KV head, mean over the questions.

    Where matplotlib is missing it says so and goes on.
    """
    import torch

    import kvcompress_hf as kvc

    try:
        figure = kvc.plot_slots([torch.tensor([heads]) for heads in method["slots_kept"]])
    except ImportError as error:
        print(f"Heatmap not drawn: {error}")
        return
    figure.axes[0].set_title(f"{method['title']}: slots kept", fontsize=9)
    figure.savefig(path, dpi=150)
    print(f"Heatmap: {path}")
