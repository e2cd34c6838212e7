"""Prefill of a random Llama: caches that score the prompt on the way against the stock cache, in one run.

    python benchmarks/prefill.py --contexts 4096,8192 --json prefill.json

`window` observes with the last 32 queries (SnapKV's form), `h2o` sums the attention of all queries, `roco` their
squares too. Forms take turns; ratios compare medians, and minima.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from machine import machine
from model_step import random_llama
from transformers import DynamicCache

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument

RECIPES = {"lossless": "lossless", "window": "snapkv", "h2o": "h2o", "roco": "roco"}


@torch.no_grad()
def measure(model, context: int, rounds: int) -> dict[str, dict[str, float]]:
    """Times one forward pass over `context` tokens with each cache, `rounds` times in turn after one to warm up."""
    ids = torch.randint(4, model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(1))
    patched = kvc.patch(copy.deepcopy(model))
    times: dict[str, list[float]] = {name: [] for name in ("stock", *RECIPES)}
    for _ in range(rounds + 1):
        for name in times:
            if name == "stock":
                runner, cache = model, DynamicCache(config=model.config)
            else:
                runner = patched
                cache = kvc.CompressedPagedCache(model.config, RECIPES[name], prompt_tokens=context)
            started = time.perf_counter()
            runner(ids, **as_argument(model, cache), use_cache=True, logits_to_keep=1)
            times[name].append(time.perf_counter() - started)
    figures = {name: {"median_s": statistics.median(t[1:]), "min_s": min(t[1:])} for name, t in times.items()}
    stock = figures["stock"]
    for figure in figures.values():
        figure["median_ratio"] = figure["median_s"] / stock["median_s"]
        figure["min_ratio"] = figure["min_s"] / stock["min_s"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="4096,8192", help="prompt tokens, comma-separated")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model = random_llama(args.layers, args.hidden, getattr(torch, args.dtype))
    results = []
    for context in map(int, args.contexts.split(",")):
        figures = measure(model, context, args.rounds)
        results.append({"context": context, "figures": figures})
        print(f"\n{args.layers} x {args.hidden}, {context} tokens, {args.dtype}, {args.threads} thread(s)")
        print(f"{'cache':<12}{'median s':>10}{'min s':>9}{'x stock':>9}{'of minima':>11}")
        for name, f in figures.items():
            print(f"{name:<12}{f['median_s']:10.3f}{f['min_s']:9.3f}{f['median_ratio']:9.3f}{f['min_ratio']:11.3f}")
    if args.json:
        setting = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine(), "arguments": setting, "results": results}, indent=1))


if __name__ == "__main__":
    main()
