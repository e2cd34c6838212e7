"""What packing and planning add to decoding: mean against median step, and the largest step.

    python benchmarks/events.py [--recipes auto,auto@evicted=mean,...] [--batches 1,4,16] [--json FILE]

A batch of novels' beginnings is read with each recipe and goes on token by token, the text given as if the model had
written it. Most steps only decode; now and then one packs the tail, and one also plans. So the median is what a step
takes by itself, and what the mean has beyond it is the share of events. Recipes take turns, step by step. Times are of
the processor (all threads), as others may use the machine; wall time stands beside it. The first steps are not counted:
they make what later steps find made.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from decoding import prose
from machine import machine

import kvcompress_hf as kvc
from kvcompress_hf.cli.generate import load
from kvcompress_hf.cli.models import find_model
from kvcompress_hf.compat import as_argument

RECIPES = "auto,kv-compress,h2o,roco,k8v4"
TARGET, LARGEST = 0.05, 2.0


def recipe_of(text: str) -> kvc.Recipe:
    """A preset, with changes behind it that are strings: `NAME[@PART=VALUE...]`."""
    preset, *changes = text.split("@")
    return kvc.get_preset(preset).with_overrides(**dict(change.split("=", 1) for change in changes))


def figures(times: list[float]) -> dict[str, float]:
    """Median and mean of the steps, the share that the mean has beyond the median, and the largest over the median."""
    median, mean = statistics.median(times), statistics.mean(times)
    return {
        "median_ms": round(1e3 * median, 2),
        "mean_ms": round(1e3 * mean, 2),
        "events": round(mean / median - 1, 4),
        "largest": round(max(times) / median, 2),
    }


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor, recipes: dict[str, kvc.Recipe], prompt: int, first: int) -> dict[str, Any]:
    """Decodes with every recipe in turn.

    Args:
        model: A patched model.
        ids: `int64` `[batch, tokens]`.
        recipes: By name.
        prompt: Tokens that are read as a prompt.
        first: Steps that are not counted.
    """
    caches = {name: kvc.prefill(model, ids[:, :prompt], recipe) for name, recipe in recipes.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in recipes}
    before: dict[str, tuple[int, int]] = {}
    for step, token in enumerate(ids[:, prompt:].split(1, dim=1)):
        for name, cache in caches.items():
            done = cache.run_report.statistics
            if step == first:
                before[name] = done.packings, done.plans
            wall, processor = time.perf_counter(), time.process_time()
            model(token, use_cache=True, **as_argument(model, cache))
            if step >= first:
                taken[name].append((time.process_time() - processor, time.perf_counter() - wall))
    result = {}
    for name, cache in caches.items():
        done = cache.run_report.statistics
        result[name] = {
            "processor": figures([each for each, _ in taken[name]]),
            "wall": figures([each for _, each in taken[name]]),
            "steps": len(taken[name]),
            "packings": done.packings - before[name][0],
            "plans": done.plans - before[name][1],
            "steps_ms": [round(1e3 * each, 1) for each, _ in taken[name]],
        }
    return result


def main() -> None:
    """Prints a line per batch and recipe, and writes them to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--recipes", default=RECIPES, help="presets, with changes as in auto@evicted=mean")
    parser.add_argument("--budget", type=float, help="in place of what the presets have")
    parser.add_argument("--batches", default="1,4,16", help="sequences, comma-separated")
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--first", type=int, default=32, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=96, help="steps that are")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = find_model(args.model)
    model, tokenizer = load(name, dtype="bfloat16", device="cpu")
    kvc.patch(model, "k8v4", check=False)
    recipes = {each: recipe_of(each) for each in args.recipes.split(",")}
    if args.budget is not None:
        recipes = {each: r.with_overrides(budget=args.budget) if r.budget else r for each, r in recipes.items()}
    batches = [int(batch) for batch in args.batches.split(",")]
    ids = prose(tokenizer, name, "dev", max(batches), args.prompt + args.first + args.steps)
    results: dict[str, Any] = {}
    for batch in batches:
        found = results[f"batch {batch}"] = measure(model, ids[:batch], recipes, args.prompt, args.first)
        for recipe, one in found.items():
            times = one["processor"]
            print(
                f"batch {batch:>2}  {recipe:<12} {times['median_ms']:7.1f} ms a step, events {times['events']:+6.1%} "
                f"(wall {one['wall']['events']:+6.1%}; target {TARGET:.0%}), largest {times['largest']:.1f} times the "
                f"median (target {LARGEST:g}); {one['packings']} packings and {one['plans']} plans in {one['steps']} "
                "steps",
                flush=True,
            )
        if args.json:  # what is there is kept if a later batch is stopped
            settings = {key: value for key, value in vars(args).items() if key != "json"}
            result = {"command": "python benchmarks/events.py", "settings": settings, "machine": machine()}
            args.json.write_text(json.dumps({**result, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
