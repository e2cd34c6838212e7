"""Hours in minutes: `python tests/soak/soak.py --output FILE`, about an hour; `--scale 0.01` is a try.

Three parts, each of which says at its end whether what it watched stayed flat:

- *decode*: 100,000 decoded tokens at a fixed budget, for each of some recipes: resident memory, bytes of the cache and
  time per step.
- *requests*: 5,000 short requests to a patched model: resident memory, and what is left of their caches.
- *parked*: forks of one long cache that go on by themselves, wait, and go: what is free or unused inside pages while
  they wait, and what the last one holds.

Times are CPU times of this process, and the tenth percentile of a block, so that other work on the machine hardly
shows.
"""

import argparse
import gc
import logging
import os
import sys
import time
import warnings
import weakref
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvcompress_hf as kvc

sys.path.insert(0, str(Path(__file__).parents[1] / "machine"))

from record import heading, write

LAYERS, HEADS, QUERIES, DIM = 2, 2, 4, 64
BLOCKS = 20  # of a long run; the first ones are not compared
MIB = 2**20

#: Recipes whose budget stays the same however long they decode.
RECIPES = {
    "kv-compress": {"budget": 256},
    "h2o": {"budget": 256},
    "roco": {"budget": 256},
    "streaming": {"budget": 256},
    "auto": {"budget": "128KiB"},
}
FLAT_RSS = 16 * MIB
FLAT_BYTES = 1.05
FLAT_TIME = 1.25


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def config():
    return LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERIES,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        max_position_embeddings=1 << 20,
        eos_token_id=None,
    )


def step(cache, tokens, generator, batch=1):
    """One forward pass over random keys, values and queries."""
    for layer in range(LAYERS):
        query = torch.randn(batch, QUERIES, tokens, DIM, generator=generator)
        new = [torch.randn(batch, HEADS, tokens, DIM, generator=generator) for _ in range(2)]

        def dense(query=query, new=new):
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(query, *new, is_causal=True, enable_gqa=True).transpose(1, 2)

        cache.attend(layer, query, *cache.update(*new, layer), None, scaling=DIM**-0.5, dense=dense)


def decode(name, steps):
    """A long decode at a fixed budget."""
    generator = torch.Generator().manual_seed(0)
    cache = kvc.CompressedPagedCache(config(), kvc.get_preset(name).with_overrides(**RECIPES[name]))
    step(cache, 512, generator)
    blocks = []
    for _ in range(BLOCKS):
        times, most = [], 0
        for number in range(max(1, steps // BLOCKS)):
            started = time.process_time()
            step(cache, 1, generator)
            times.append(time.process_time() - started)
            if number % 64 == 0:
                most = max(most, cache.memory().total)
        times.sort()
        blocks.append((resident(), most, times[len(times) // 10]))
    early, late = blocks[BLOCKS // 4 : BLOCKS // 2], blocks[-BLOCKS // 4 :]
    grown = max(rss for rss, _, _ in late) - max(rss for rss, _, _ in early)
    larger = max(most for _, most, _ in late) / max(most for _, most, _ in early)
    slower = min(time for _, _, time in late) / min(time for _, _, time in early)
    return {
        "steps": cache.get_seq_length() - 512,
        "rss MiB": [round(rss / MIB, 1) for rss, _, _ in blocks],
        "cache KiB": [round(most / 1024, 1) for _, most, _ in blocks],
        "step us": [round(each * 1e6) for _, _, each in blocks],
        "rss grown MiB": round(grown / MIB, 1),
        "bytes ratio": round(larger, 3),
        "time ratio": round(slower, 3),
        "flat": grown <= FLAT_RSS and larger <= FLAT_BYTES and slower <= FLAT_TIME,
    }


def requests(count):
    """Short requests of many lengths, recipes and batch sizes to one patched model."""
    torch.manual_seed(0)
    model = kvc.patch(LlamaForCausalLM(config()).eval(), "k8v4")
    generator = torch.Generator().manual_seed(1)
    recipes = ["k8v4", "lossless", "auto", "kv-compress", "h2o", "roco"]
    readings, alive = [], weakref.WeakSet()
    for number in range(count):
        batch, tokens = 1 + number % 3, int(torch.randint(4, 120, (), generator=generator))
        ids = torch.randint(3, 64, (batch, tokens), generator=generator)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            kvcompress={"preset": recipes[number % len(recipes)]},
            max_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
        )
        alive.add(out.past_key_values)
        del out
        if number % max(1, count // BLOCKS) == 0:
            readings.append(resident())
    left = len(alive)
    early, late = readings[len(readings) // 4 : len(readings) // 2 + 1], readings[-len(readings) // 4 :]
    grown = max(late) - max(early)
    return {
        "requests": count,
        "rss MiB": [round(rss / MIB, 1) for rss in readings],
        "rss grown MiB": round(grown / MIB, 1),
        "caches left without the garbage collector": left,
        "flat": grown <= FLAT_RSS and left == 0,
    }


def parked(rounds, tokens=2048, forks=8):
    """Forks of one cache come, decode, wait and go, round after round."""
    generator = torch.Generator().manual_seed(2)
    worst, after = 0.0, []
    parent = kvc.CompressedPagedCache(config(), kvc.get_preset("kv-compress").with_overrides(budget=256))
    step(parent, tokens, generator)
    alone = parent.memory().total
    for number in range(rounds):
        waiting = [parent.fork() for _ in range(forks)]
        for fork in waiting:
            for _ in range(40 + number % 7):
                step(fork, 1, generator)
        report = waiting[-1].memory()
        used = report.total - report.free
        worst = max(worst, report.free / used)
        del fork  # or the last one would stay
        while waiting:
            waiting.pop(number % len(waiting))
        # A parked cache takes no step by itself, so what others left is given back when they go.
        after.append(parent.memory().total)
    return {
        "rounds": rounds,
        "forks": forks,
        "bytes alone": alone,
        "most bytes when all forks have gone": max(after),
        "most free pages while parked": round(worst, 3),
        "flat": max(after) <= 1.1 * alone and worst <= 0.1,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the full length")
    parser.add_argument("--parts", nargs="*", default=["decode", "requests", "parked"])
    parser.add_argument("--output")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    started, results = time.time(), {}

    def note(name, result):
        results[name] = result
        print(f"{time.time() - started:6.0f} s  {name}: {'flat' if result['flat'] else 'NOT FLAT'}", flush=True)

    if "decode" in options.parts:
        for name in RECIPES:
            note(f"decode {name}", decode(name, max(400, int(100_000 * options.scale))))
            gc.collect()
    if "requests" in options.parts:
        note("requests", requests(max(40, int(5_000 * options.scale))))
    if "parked" in options.parts:
        note("parked", parked(max(4, int(400 * options.scale))))
    record = heading("soak", scale=options.scale, seconds=round(time.time() - started), results=results)
    write(options.output, record)
    return 0 if all(result["flat"] for result in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
