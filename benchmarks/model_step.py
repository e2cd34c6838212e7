"""Whole-model decode steps: compressed caches against `DynamicCache`, interleaved in one run.

    python benchmarks/model_step.py [--context 4096] [--batch 1] [--steps 48] [--threads 2] [--json FILE]

Every cache is filled with the same prompt; then each in turn decodes one token, so that whatever else the machine
does hits all of them alike. Printed: median and least milliseconds per step, tokens/s, the ratio of medians to
`DynamicCache` (above 1 is faster), and measured cache bytes.
"""

import argparse
import copy
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

import kvcompress_hf as kvc

TINY = Path(__file__).parents[1] / "examples" / "models" / "kvlm-tiny"


def machine() -> dict[str, str]:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "processor": names[0] if names else platform.processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


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


@torch.no_grad()
def measure(model, recipes: list[str], context: int, batch: int, steps: int) -> dict[str, dict[str, float]]:
    """Times decode steps of each cache in turn; the first quarter warms up and is not counted."""
    vocabulary = model.config.vocab_size
    ids = torch.randint(4, vocabulary, (batch, context), generator=torch.Generator().manual_seed(1))
    patched = kvc.patch(copy.deepcopy(model))
    runs = {"DynamicCache": (model, DynamicCache(config=model.config))}
    for recipe in recipes:
        runs[recipe] = (patched, kvc.CompressedPagedCache(model.config, recipe, prompt_tokens=context))
    for runner, cache in runs.values():
        for part in ids.split(1024, dim=1):
            runner(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    times: dict[str, list[float]] = {name: [] for name in runs}
    token = ids[:, :1]
    for _ in tqdm(range(steps), desc="decoding", leave=False):
        for name, (runner, cache) in runs.items():
            started = time.perf_counter()
            runner(token, past_key_values=cache, use_cache=True)
            times[name].append(time.perf_counter() - started)
    result = {}
    base = statistics.median(times["DynamicCache"][steps // 4 :])
    for name, (_, cache) in runs.items():
        counted = times[name][steps // 4 :]
        median = statistics.median(counted)
        if isinstance(cache, DynamicCache):
            size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        else:
            size = cache.memory().total
        result[name] = {
            "median_ms": 1e3 * median,
            "min_ms": 1e3 * min(counted),
            "mean_ms": 1e3 * statistics.fmean(counted),
            "tokens_per_s": batch / median,
            "speedup": base / median,
            "bytes": size,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, nargs="+", default=[4096])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--recipes", nargs="+", default=["lossless", "k8v4", "k4v2", "kv-compress"])
    parser.add_argument("--models", nargs="+", default=["tiny", "4x1024"], help="'tiny' or LAYERSxHIDDEN")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    results = []
    for name in arguments.models:
        if name == "tiny":
            model = AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype).eval()
        else:
            layers, hidden = (int(part) for part in name.split("x"))
            model = random_llama(layers, hidden, dtype)
        for context in arguments.context:
            for batch in arguments.batch:
                figures = measure(model, arguments.recipes, context, batch, arguments.steps)
                results.append({"model": name, "context": context, "batch": batch, "figures": figures})
                print(f"\n{name}, {context} tokens, batch {batch}, {arguments.dtype}, {arguments.threads} threads")
                print(f"{'cache':<14}{'ms/step':>9}{'min':>8}{'tokens/s':>10}{'speed':>8}{'MiB':>9}")
                for cache, f in figures.items():
                    print(
                        f"{cache:<14}{f['median_ms']:9.2f}{f['min_ms']:8.2f}{f['tokens_per_s']:10.1f}"
                        f"{f['speedup']:7.2f}x{f['bytes'] / 2**20:9.2f}"
                    )
    if arguments.json:
        header = machine() | {
            "threads": arguments.threads,
            "transformers": transformers.__version__,
            "date": datetime.date.today().isoformat(),
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": header, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
