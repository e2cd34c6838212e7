"""Requests per second within a fixed memory for keys and values, prefill counted.

    python benchmarks/requests.py --memory 64MiB --prompt 2000 --new 128 --threads 2 --json requests.json

Each form serves as many prompts at a time as its cache has room for in that memory, reads them as one batch in chunks,
decodes them together, and begins again. What the cache held at most is read off the cache; a form that went beyond the
memory is refused. Forms take turns; a round of a form serves one batch.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from machine import machine
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache

import kvcompress_hf as kvc
from kvcompress_hf.cli.fetch import REAL_MODELS, fetch
from kvcompress_hf.compat import as_argument
from kvcompress_hf.units import format_bytes, parse_bytes

STOCK = "stock"
#: Form: preset, parts to change, tokens of a chunk (`None` for the whole prompt).
FORMS = {
    "k8v4": ("k8v4", {}, None),
    "k4v4": ("k4v4", {}, None),
    "auto 1/8": ("auto", {"budget": 1 / 8}, 128),
    "auto 1/16": ("auto", {"budget": 1 / 16}, 128),
}


def serve(model, make, ids: torch.Tensor, new: int, chunk: int | None):
    """Reads prompts and decodes them greedily; returns the cache and the seconds of both."""
    cache = make()
    started = time.perf_counter()
    for part in ids.split(chunk or ids.shape[1], dim=1):
        logits = model(part, **as_argument(model, cache), use_cache=True, logits_to_keep=1).logits
    read = time.perf_counter()
    for _ in range(new - 1):
        token = logits[:, -1].argmax(-1, keepdim=True)
        logits = model(token, **as_argument(model, cache), use_cache=True).logits
    return cache, read - started, time.perf_counter() - read


def peak_of(cache) -> int:
    """The most bytes that a cache held."""
    if isinstance(cache, kvc.CompressedPagedCache):
        return cache.run_report.statistics.peak_bytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def room(model, make, ids: torch.Tensor, new: int, chunk: int | None, memory: int) -> int:
    """How many prompts at a time fit, from what one and two of them take at most."""
    one, two = (peak_of(serve(model, make, ids[:n], new, chunk)[0]) for n in (1, 2))
    return max(1, 1 + (memory - one) // (two - one))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="64MiB", help="for keys and values of all requests under way")
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--new", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    memory = parse_bytes(args.memory)
    model = AutoModelForCausalLM.from_pretrained(fetch(REAL_MODELS["smollm2"]), dtype=torch.bfloat16).eval()
    patched = kvc.patch(
        AutoModelForCausalLM.from_pretrained(fetch(REAL_MODELS["smollm2"]), dtype=torch.bfloat16).eval()
    )
    ids = torch.randint(4, model.config.vocab_size, (64, args.prompt), generator=torch.Generator().manual_seed(1))

    ways = {STOCK: (model, lambda: DynamicCache(config=model.config), None)}
    for name in args.forms:
        preset, changes, chunk = FORMS[name]
        recipe = kvc.get_preset(preset).with_overrides(**changes)
        ways[name] = (
            patched,
            lambda recipe=recipe: kvc.CompressedPagedCache(model.config, recipe, prompt_tokens=args.prompt),
            chunk,
        )
    with tqdm(total=len(ways) * (args.rounds + 1), disable=None, unit="batch") as bar:
        fit = {}
        for name, way in ways.items():
            fit[name] = room(*way[:2], ids, args.new, way[2], memory)
            bar.update()
        taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, (runner, make, chunk) in ways.items():
                cache, reading, decoding = serve(runner, make, ids[: fit[name]], args.new, chunk)
                taken[name].append((reading, decoding, peak_of(cache)))
                bar.update()
    results = {}
    for name, rounds in taken.items():
        each = [(reading + decoding) / fit[name] for reading, decoding, _ in rounds]
        results[name] = {
            "at_a_time": fit[name],
            "peak_bytes": max(peak for *_, peak in rounds),
            "reading_s": statistics.median(reading for reading, *_ in rounds),
            "decoding_s": statistics.median(decoding for _, decoding, _ in rounds),
            "requests_per_s": 1 / statistics.median(each),
        }
        if results[name]["peak_bytes"] > memory:
            raise SystemExit(f"{name} took {format_bytes(results[name]['peak_bytes'])}, more than {args.memory}.")
    stock = results[STOCK]["requests_per_s"]
    print(
        f"\n{args.memory} of keys and values, prompts of {args.prompt}, {args.new} new tokens, {args.threads} thread(s)"
    )
    print(
        f"{'form':<12}{'at a time':>10}{'peak':>12}{'reading s':>11}{'decoding s':>12}{'requests/s':>12}{'x stock':>9}"
    )
    for name, r in results.items():
        r["x_stock"] = r["requests_per_s"] / stock
        print(
            f"{name:<12}{r['at_a_time']:>10}{format_bytes(r['peak_bytes']):>12}{r['reading_s']:>11.2f}"
            f"{r['decoding_s']:>12.2f}{r['requests_per_s']:>12.3f}{r['x_stock']:>9.2f}"
        )
    if args.json:
        setting = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"machine": machine(), "arguments": setting, "results": results}) + "\n")


if __name__ == "__main__":
    main()
