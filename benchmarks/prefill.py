"""Reading a prompt: caches of ours against the stock cache, in one run.

    python benchmarks/prefill.py --model smollm2 --contexts 2048,8192 --threads 2 --json prefill.json
    python benchmarks/prefill.py --model 4x1024 --contexts 4096 --padded

`native:off` is `lossless` with the model's own attention, as where our kernel is not faster; `--padded` reads a batch
of two prompts of which one is shorter. Forms take turns; ratios compare medians, and minima, with those of stock.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from machine import machine
from model_step import random_llama
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache

import kvcompress_hf as kvc
from kvcompress_hf.cli.fetch import REAL_MODELS, fetch
from kvcompress_hf.compat import as_argument
from kvcompress_hf.kernels import CpuBackend

STOCK, OFF = "stock", "native:off"
RECIPES = ["lossless", "k8v4", "auto", "snapkv", "h2o", "roco"]


@contextlib.contextmanager
def models_own_attention():
    """As long as it lasts, the first tokens go through the model's attention."""
    chosen = CpuBackend.reads_prompts
    CpuBackend.reads_prompts = lambda self, dtype, tokens: False
    try:
        yield
    finally:
        CpuBackend.reads_prompts = chosen


@torch.no_grad()
def measure(model, context: int, forms: list[str], rounds: int, padded: bool, bar: tqdm) -> dict[str, dict[str, float]]:
    """Times one forward pass over `context` tokens with each cache, `rounds` times in turn after one to warm up."""
    batch = 2 if padded else 1
    ids = torch.randint(4, model.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1:, : context // 4] = 0
    patched = kvc.patch(copy.deepcopy(model), check=False)
    times: dict[str, list[float]] = {name: [] for name in (STOCK, *forms)}
    for _ in range(rounds + 1):
        for name in times:
            if name == STOCK:
                runner, cache = model, DynamicCache(config=model.config)
            else:
                runner = patched
                recipe = "lossless" if name == OFF else name
                cache = kvc.CompressedPagedCache(model.config, recipe, prompt_tokens=context)
            given = {"attention_mask": mask} if padded else {}
            with models_own_attention() if name == OFF else contextlib.nullcontext():
                started = time.perf_counter()
                runner(ids, **as_argument(model, cache), **given, use_cache=True, logits_to_keep=1)
                times[name].append(time.perf_counter() - started)
            bar.update()
    figures = {name: {"median_s": statistics.median(t[1:]), "min_s": min(t[1:])} for name, t in times.items()}
    stock = figures[STOCK]
    for figure in figures.values():
        figure["median_ratio"] = figure["median_s"] / stock["median_s"]
        figure["min_ratio"] = figure["min_s"] / stock["min_s"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="4096,8192", help="prompt tokens, comma-separated")
    parser.add_argument("--model", default="4x1024", help="'smollm2' (fetched) or LAYERSxHIDDEN")
    parser.add_argument("--recipes", nargs="+", default=[OFF, *RECIPES])
    parser.add_argument("--padded", action="store_true", help="two prompts, one of them padded")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    if args.model == "smollm2":
        model = AutoModelForCausalLM.from_pretrained(fetch(REAL_MODELS[args.model]), dtype=dtype).eval()
    else:
        model = random_llama(*(int(part) for part in args.model.split("x")), dtype)
    results = []
    contexts = [int(each) for each in args.contexts.split(",")]
    total = len(contexts) * (args.rounds + 1) * (len(args.recipes) + 1)
    with tqdm(total=total, disable=None, unit="pass") as bar:
        for context in contexts:
            figures = measure(model, context, args.recipes, args.rounds, args.padded, bar)
            results.append({"context": context, "figures": figures})
    for result in results:
        print(f"\n{args.model}, {result['context']} tokens, {args.dtype}, {args.threads} thread(s)")
        print(f"{'cache':<12}{'median s':>10}{'min s':>9}{'x stock':>9}{'of minima':>11}")
        for name, f in result["figures"].items():
            print(f"{name:<12}{f['median_s']:10.3f}{f['min_s']:9.3f}{f['median_ratio']:9.3f}{f['min_ratio']:11.3f}")
    if args.json:
        setting = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine(), "arguments": setting, "results": results}) + "\n")


if __name__ == "__main__":
    main()
