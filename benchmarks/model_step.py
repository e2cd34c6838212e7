"""Whole-model decode steps: compressed caches against `DynamicCache`, interleaved in one run, and where the time goes.

    python benchmarks/model_step.py [--models 4x1024 smollm2] [--context 4096 16384] [--batch 1 8] [--json FILE]

Every cache is filled with random keys and values, all tokens at once; then each in turn decodes one token, so that
whatever else the machine does hits all of them alike. With `--linears auto stock` every recipe comes twice: with the
linear layers of a patched model, and with torch's. All models of a run share one set of weights.

Printed: median and least milliseconds per step, tokens/s, the ratio of medians to `DynamicCache` (above 1 is faster),
and measured cache bytes. Then medians of the parts of a step: `kernel` is the native decode call (the attention
function of the stock model), `cache` the rest of what the cache does in Python (`update` of the stock cache, which
copies it), `model` everything else. With `--clock processor` it is this process's time, which on a busy machine is the
fairest (with one thread).
"""

import argparse
import copy
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from machine import machine
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvcompress_hf as kvc
from kvcompress_hf.cli.models import find_model
from kvcompress_hf.compat import as_argument
from kvcompress_hf.kernels.library import load_library

STOCK = "DynamicCache"
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class Stopwatch:
    """Adds up the seconds spent in the functions that it wraps, by a clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds = clock, 0.0

    def wrap(self, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            started = self.clock()
            result = function(*args, **kwargs)
            self.seconds += self.clock() - started
            return result

        return timed

    def lap(self) -> float:
        """The seconds since the last lap."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@contextmanager
def kernel_stopwatch(clock: Callable[[], float]) -> Iterator[Stopwatch]:
    """Times the native decode call and transformers' SDPA function."""
    watch, library, stock = Stopwatch(clock), load_library(), ALL_ATTENTION_FUNCTIONS["sdpa"]
    native = library.kvc_decode
    library.kvc_decode = watch.wrap(native)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = watch.wrap(stock)
    try:
        yield watch
    finally:
        library.kvc_decode = native
        ALL_ATTENTION_FUNCTIONS["sdpa"] = stock


def random_llama(layers: int, hidden: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A random Llama of the given size: head_dim 64 below hidden 1024, else 128, groups of 4 query heads."""
    torch.manual_seed(0)
    head_dim = 128 if hidden >= 1024 else 64
    heads = hidden // head_dim
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=head_dim,
        max_position_embeddings=1 << 20,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def fill(model, cache: DynamicCache | kvc.CompressedPagedCache, context: int, batch: int) -> None:
    """Stores random keys and values, as a prompt of `context` tokens does."""
    config = model.config
    generator = torch.Generator().manual_seed(1)
    for layer in range(config.num_hidden_layers):
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        q, k, v = (
            torch.randn(batch, context, n, config.head_dim, generator=generator).to(model.dtype).transpose(1, 2)
            for n in heads
        )
        if isinstance(cache, DynamicCache):
            cache.update(k, v, layer)
        else:
            scaling = config.head_dim**-0.5
            cache.attend(layer, q, k, v, None, scaling=scaling, dense=lambda q=q: q.transpose(1, 2))


@torch.no_grad()
def measure(
    model,
    recipes: list[str],
    linears: list[str],
    context: int,
    batch: int,
    seconds: float,
    clock: Callable[[], float],
) -> dict[str, dict[str, float]]:
    """Times decode steps of each cache in turn for about `seconds`; the first quarter warms up and is not counted."""
    runs = {STOCK: (model, DynamicCache(config=model.config))}
    for kind in linears:
        weights = {id(each): each for each in model.parameters()}  # as if copied already
        patched = kvc.patch(copy.deepcopy(model, weights), linears=kind)
        for recipe in recipes:
            name = recipe if kind == "auto" else f"{recipe}, {kind} linears"
            runs[name] = (patched, kvc.CompressedPagedCache(model.config, recipe, prompt_tokens=context))
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
    watches = {name: Stopwatch(clock) for name in runs}
    token = torch.full((batch, 1), 5)
    with kernel_stopwatch(clock) as kernel:
        for name, (_, cache) in runs.items():
            fill(model, cache, context, batch)
            entry = "update" if name == STOCK else "attend"
            setattr(cache, entry, watches[name].wrap(getattr(cache, entry)))
        end = time.perf_counter() + seconds
        with tqdm(desc="decoding", unit=" steps", leave=False) as progress:
            while time.perf_counter() < end or len(times[STOCK]) < 8:
                for name, (runner, cache) in runs.items():
                    kernel.lap()
                    watches[name].lap()
                    started = clock()
                    runner(token, **as_argument(model, cache), use_cache=True)
                    whole = clock() - started
                    times[name].append((whole, kernel.lap(), watches[name].lap()))
                progress.update()
    result = {}
    base = statistics.median(whole for whole, *_ in times[STOCK][len(times[STOCK]) // 4 :])
    for name, (_, cache) in runs.items():
        counted = times[name][len(times[name]) // 4 :]
        wholes, kernels, entries = zip(*counted, strict=True)
        if name != STOCK:  # the native call is made inside attend()
            entries = [entry - inside for entry, inside in zip(entries, kernels, strict=True)]
        median = statistics.median(wholes)
        size = (
            sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            if name == STOCK
            else cache.memory().total
        )
        rest = (a - b - c for a, b, c in zip(wholes, kernels, entries, strict=True))
        result[name] = {
            "median_ms": 1e3 * median,
            "min_ms": 1e3 * min(wholes),
            "mean_ms": 1e3 * statistics.fmean(wholes),
            "tokens_per_s": batch / median,
            "speedup": base / median,
            "bytes": size,
            "kernel_ms": 1e3 * statistics.median(kernels),
            "cache_ms": 1e3 * statistics.median(entries),
            "model_ms": 1e3 * statistics.median(rest),
            "steps": len(counted),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, nargs="+", default=[4096])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time per model, context and batch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--recipes", nargs="+", default=["lossless", "k8v4", "k4v2", "kv-compress"])
    parser.add_argument("--linears", nargs="+", default=["auto"], choices=["auto", "stock"], help="as for `patch`")
    parser.add_argument(
        "--models", nargs="+", default=["tiny", "4x1024"], help="a name of `kvcompress models`, or LAYERSxHIDDEN"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--json", type=Path, help="file to write the results to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    results = []
    for name in arguments.models:
        if re.fullmatch(r"\d+x\d+", name):
            layers, hidden = (int(part) for part in name.split("x"))
            model = random_llama(layers, hidden, dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(find_model(name), dtype=dtype).eval()
        for context in arguments.context:
            for batch in arguments.batch:
                clock = CLOCKS[arguments.clock]
                figures = measure(model, arguments.recipes, arguments.linears, context, batch, arguments.seconds, clock)
                results.append({"model": name, "context": context, "batch": batch, "figures": figures})
                print(f"\n{name}, {context} tokens, batch {batch}, {arguments.dtype}, {arguments.threads} threads")
                parts = f"{'kernel':>9}{'cache':>8}{'model':>8}"
                print(f"{'cache':<22}{'ms/step':>9}{'min':>9}{'tokens/s':>10}{'speed':>8}{'MiB':>9}{parts}")
                for cache, f in figures.items():
                    print(
                        f"{cache:<22}{f['median_ms']:9.2f}{f['min_ms']:9.2f}{f['tokens_per_s']:10.1f}"
                        f"{f['speedup']:7.2f}x{f['bytes'] / 2**20:9.2f}"
                        f"{f['kernel_ms']:9.2f}{f['cache_ms']:8.2f}{f['model_ms']:8.2f}"
                    )
    if arguments.json:
        header = machine() | {"threads": arguments.threads, "dtype": arguments.dtype, "clock": arguments.clock}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": header, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
