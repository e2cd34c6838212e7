"""Python's share of one layer's decode step, in microseconds.

    python benchmarks/python_overhead.py [--recipes k8v4,roco] [--layers 30] [--json FILE]

A cache of one short sequence (48 tokens, 2 KV heads x 64, 4 query heads each) decodes on one thread. Three levels, each
the quickest of many calls, as what other programs take is not Python's: `attend()` per layer, the plan's `run()`
inside it, and the native call inside that. `attend()` less the native call is what Python costs; a part of it comes
once per step, so it is less per layer in a model with many. `--profile` adds cProfile's list of where.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from pathlib import Path

import torch
from machine import machine

from kvcompress_hf.presets import resolve_rows
from kvcompress_hf.runtime.attention import PagedAttention
from kvcompress_hf.runtime.call import AttentionCall

KV_HEADS, GROUP, HEAD_DIM, PROMPT = 2, 4, 64, 48
TARGET_US = 15.0


@torch.no_grad()
def measure(recipe: str, layers: int, steps: int, profile: bool) -> dict[str, float]:
    """The three levels for one recipe."""
    attention = PagedAttention(resolve_rows(recipe), [None] * layers)

    def tensors(tokens: int) -> list[torch.Tensor]:
        """q, k and v as the projections leave them: transposed views."""
        heads = (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
        return [torch.randn(1, tokens, n, HEAD_DIM).bfloat16().transpose(1, 2) for n in heads]

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        """All layers, each as `CompressedPagedCache.attend` hands its call on."""
        outputs = []
        for layer in range(layers):
            logits = attention.layers[layer].logits_of(0.125, None, None, None)
            call = AttentionCall(q, k, v, logits)
            outputs.append(attention.attend(layer, call, None, lambda: q.transpose(1, 2)))
        return outputs

    step(*tensors(PROMPT))
    new = tensors(1)
    whole = run = native = 1 << 62
    for _ in range(steps):
        start = time.perf_counter_ns()
        outputs = step(*new)
        whole = min(whole, time.perf_counter_ns() - start)
        plan = attention.layers[0].store.tensors.plans.get(0)  # holds the address of outputs[0]
        if plan is None:  # this step has packed the tail
            continue
        plan._c.append = 0
        start = time.perf_counter_ns()
        plan._function(plan._isa, plan._address)
        native = min(native, time.perf_counter_ns() - start)
        start = time.perf_counter_ns()
        plan.run(new[0], None, None, PROMPT, append=False)
        run = min(run, time.perf_counter_ns() - start)
        del outputs
    us = {"attend_us": whole / layers / 1e3, "run_us": run / 1e3, "native_us": native / 1e3}
    if profile:
        profiler = cProfile.Profile()
        profiler.runcall(lambda: [step(*new) for _ in range(steps)])
        pstats.Stats(profiler).sort_stats("tottime").print_stats(14)
    return us | {"python_us": us["attend_us"] - us["native_us"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="lossless,k8v4,kv-compress,roco", help="comma-separated")
    parser.add_argument("--layers", type=int, default=30, help="of the model (default: %(default)s, as SmolLM2-135M)")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--profile", action="store_true", help="also print where Python's time goes")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: measure(name, args.layers, args.steps, args.profile) for name in args.recipes.split(",")}
    print(f"{'recipe':<14}{'attend us':>11}{'run us':>9}{'native us':>11}{'Python us':>11}   (target {TARGET_US:.0f})")
    for name, r in results.items():
        print(f"{name:<14}{r['attend_us']:11.1f}{r['run_us']:9.1f}{r['native_us']:11.1f}{r['python_us']:11.1f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine(), "layers": args.layers, "results": results}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
