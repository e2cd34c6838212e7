"""What the locks that keep forks in threads apart cost a decode step.

    python benchmarks/lock_cost.py [--json FILE]

A random Llama of 4 layers x 256 decodes on one thread behind 48 tokens, so there is next to nothing to multiply and to
attend to, and the share of the locks is far larger than in a model that anybody uses. Counted are the times that a lock
is taken in a step, packing included; timed are one taking and leaving of a lock, and the quickest step. Nobody waits
here: forks wait for each other only while pages change hands.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import timeit
from pathlib import Path
from typing import Any

import torch
from machine import machine
from transformers import LlamaConfig, LlamaForCausalLM

import kvcompress_hf as kvc

LAYERS, HIDDEN, PROMPT, STEPS = 4, 256, 48, 512
TARGET = 0.01


class Counting:
    """A lock that counts how often any of its kind is taken."""

    taken = 0

    def __init__(self, lock: Any) -> None:
        self._lock = lock

    def acquire(self, *args: Any, **kwargs: Any) -> bool:
        """As of the lock."""
        Counting.taken += 1
        return bool(self._lock.acquire(*args, **kwargs))

    def release(self) -> None:
        """As of the lock."""
        self._lock.release()

    def locked(self) -> bool:
        """As of the lock."""
        return bool(self._lock.locked())

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def count_locks(cache: kvc.CompressedPagedCache) -> None:
    """Puts counting locks in the place of those of a cache."""
    for arena in cache._attention.arenas:
        arena.lock, arena.section = Counting(arena.lock), Counting(arena.section)
        for key, (owner, reading) in list(arena._owners.items()):
            counting = Counting(reading)
            arena._owners[key] = owner, counting
            owner().reading = counting


@torch.no_grad()
def measure(model: LlamaForCausalLM, recipe: str) -> dict[str, float]:
    """Locks taken per step, what that takes, and its share of the step."""
    prompt, token = torch.randint(3, 256, (1, PROMPT)), torch.randint(3, 256, (1, 1))
    counted, timed = (kvc.CompressedPagedCache(model.config, recipe) for _ in range(2))
    for cache in (counted, timed):
        model(prompt, past_key_values=cache)
    count_locks(counted)
    before = Counting.taken
    for _ in range(STEPS):
        model(token, past_key_values=counted)
    taken = (Counting.taken - before) / STEPS
    quickest = 1 << 62
    for _ in range(STEPS):
        start = time.perf_counter_ns()
        model(token, past_key_values=timed)
        quickest = min(quickest, time.perf_counter_ns() - start)
    times = 500
    timer = timeit.Timer("with lock: pass", globals={"lock": threading.RLock()})
    lock_ns = min(timer.repeat(5000, times)) / times * 1e9
    return {
        "locks_per_step": taken,
        "lock_ns": lock_ns,
        "step_us": quickest / 1e3,
        "share": taken * lock_ns / quickest,
    }


def main() -> None:
    """Prints a line per recipe, and writes them to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="lossless,k8v4,kv-compress,roco", help="comma-separated")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = kvc.patch(LlamaForCausalLM(config).eval().to(torch.bfloat16), "k8v4")
    results = {recipe: measure(model, recipe) for recipe in args.recipes.split(",")}
    for recipe, found in results.items():
        print(
            f"{recipe:<14}{found['locks_per_step']:6.2f} locks of {found['lock_ns']:.0f} ns in a step of "
            f"{found['step_us']:.0f} us: {found['share']:.2%} (target: below {TARGET:.0%})"
        )
    if args.json:
        result = {"command": "python benchmarks/lock_cost.py", "machine": machine(), "results": results}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
