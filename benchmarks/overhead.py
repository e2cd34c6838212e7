"""What observing, planning and packing cost, as a share of prefill and of decoding.

    python benchmarks/overhead.py [--context 8192] [--steps 64] [--models 4x1024 smollm2] [--threads 2] [--json FILE]

Every recipe fills a cache with the same prompt and then decodes. The share is the time that the cache itself reports
for observing, packing and planning over the wall time of the prefill, or of the decode steps; what attention over the
pages costs, and what a decode kernel adds for running scores, is not in it but shows in ms per step. Events fall every
`when.every` tokens, so `--steps` should be a multiple of 32.

Recipes take turns over `--repeats` rounds, so that whatever else the machine does hits all alike; medians are printed.

Besides recipes there are `stock`, the model with `DynamicCache`, which all are then compared with by processor time (on
a busy machine the fairest with one thread: it leaves out what others take), and `auto:torch`, `auto` with its second
look in plain torch instead of its kernel.
"""

import argparse
import contextlib
import datetime
import json
import math
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

import kvcompress_hf as kvc
from kvcompress_hf.cli.fetch import REAL_MODELS, fetch
from kvcompress_hf.compat import as_argument
from kvcompress_hf.kernels import Backend, CpuBackend
from kvcompress_hf.runtime.records import RunStatistics

TINY = Path(__file__).parents[1] / "examples" / "models" / "kvlm-tiny"
RECIPES = ["lossless", "k8v4", "auto", "kv-compress", "snapkv", "leankv", "h2o", "tova", "roco", "streaming", "keydiff"]


def random_llama(layers: int, hidden: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A random Llama: head_dim 128, groups of 4 query heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        head_dim=128,
        max_position_embeddings=1 << 20,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@contextlib.contextmanager
def second_look_in_torch():
    """As long as it lasts, caches on the CPU have their second look in torch, as backends without a kernel do."""
    kernel = CpuBackend.non_causal_scores
    CpuBackend.non_causal_scores = Backend.non_causal_scores
    try:
        yield
    finally:
        CpuBackend.non_causal_scores = kernel


def measure(model, recipe: str, ids: torch.Tensor, chunk: int, steps: int) -> dict[str, float]:
    """One prefill and `steps` decode steps under a recipe, in seconds."""
    name, _, form = recipe.partition(":")
    with second_look_in_torch() if form == "torch" else contextlib.nullcontext(), torch.inference_mode():
        return timed(model, name, ids, chunk, steps)


def timed(model, recipe: str, ids: torch.Tensor, chunk: int, steps: int) -> dict[str, float]:
    """As [`measure`]; the stock cache observes, packs and plans nothing."""
    if recipe == "stock":
        cache, spent = DynamicCache(config=model.config), RunStatistics()
    else:
        cache = kvc.CompressedPagedCache(model.config, recipe, prompt_tokens=ids.shape[1])
        spent = cache.run_report.statistics
    started, started_cpu = time.perf_counter(), time.process_time()
    for part in ids.split(chunk, dim=1):
        model(part, **as_argument(model, cache), use_cache=True, logits_to_keep=1)
    prefill, prefill_cpu = time.perf_counter() - started, time.process_time() - started_cpu
    packing, planning = spent.seconds_packing, spent.seconds_planning
    started = time.perf_counter()
    for _ in range(steps):
        model(ids[:, :1], **as_argument(model, cache), use_cache=True)
    decode = time.perf_counter() - started
    return {
        "prefill": prefill,
        "prefill_cpu": prefill_cpu,
        "prefill_packing": packing,
        "prefill_planning": planning,
        "decode": decode,
        "decode_packing": spent.seconds_packing - packing,
        "decode_planning": spent.seconds_planning - planning,
        "ratio": 1.0 if recipe == "stock" else cache.memory().ratio,
    }


def summarise(rounds: list[dict[str, float]], steps: int) -> dict[str, float]:
    """Medians over rounds, and the shares."""
    middle = {name: statistics.median(done[name] for done in rounds) for name in rounds[0]}
    share = {
        phase: statistics.median((d[f"{phase}_packing"] + d[f"{phase}_planning"]) / d[phase] for d in rounds)
        for phase in ("prefill", "decode")
    }
    return {
        **middle,
        "prefill_share": share["prefill"],
        "prefill_planning_share": statistics.median(d["prefill_planning"] / d["prefill"] for d in rounds),
        "decode_share": share["decode"],
        "decode_ms_per_step": 1e3 * middle["decode"] / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--chunk", type=int, help="tokens per forward pass of the prefill (default: all at once)")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument(
        "--models", nargs="+", default=["4x1024", "tiny"], help="'tiny', 'smollm2' (fetched) or LAYERSxHIDDEN"
    )
    parser.add_argument("--tiny", type=Path, default=TINY, help="folder of the tiny model")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    results = []
    for name in arguments.models:
        if name == "tiny":
            model = AutoModelForCausalLM.from_pretrained(arguments.tiny, dtype=dtype).eval()
        elif name == "smollm2":
            model = AutoModelForCausalLM.from_pretrained(fetch(REAL_MODELS[name]), dtype=dtype).eval()
        else:
            model = random_llama(*(int(part) for part in name.split("x")), dtype)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(4, model.config.vocab_size, (1, arguments.context), generator=generator)
        chunk = arguments.chunk or arguments.context
        rounds: dict[str, list[dict[str, float]]] = {recipe: [] for recipe in arguments.recipes}
        with kvc.patched(model, "lossless"), tqdm(total=arguments.repeats * len(rounds), disable=None) as bar:
            measure(model, "lossless", ids[:, :256], 256, 4)  # the first calls are slower: not counted
            for _ in range(arguments.repeats):
                for recipe in rounds:
                    bar.set_description(f"{name} {recipe}")
                    rounds[recipe].append(measure(model, recipe, ids, chunk, arguments.steps))
                    bar.update()
        print(
            f"\n{name}: {arguments.context} tokens in chunks of {chunk}, {arguments.steps} steps, {arguments.dtype}, "
            f"{arguments.threads} threads, median of {arguments.repeats}"
        )
        stock = statistics.median(done["prefill_cpu"] for done in rounds.get("stock", [{"prefill_cpu": math.nan}]))
        titles = ("prefill s", "x stock", "pack", "plan", "share", "plan", "ms/step", "share", "bytes")
        print(f"{'recipe':<14}" + "".join(f"{title:>10}" for title in titles))
        for recipe, done in rounds.items():
            got = summarise(done, arguments.steps)
            if "stock" in rounds:
                got["prefill_cpu_over_stock"] = got["prefill_cpu"] / stock
            results.append({"model": name, "recipe": recipe, **got})
            seconds = (f"{got[which]:10.3f}" for which in ("prefill_packing", "prefill_planning"))
            print(
                f"{recipe:<14}{got['prefill']:10.3f}{got['prefill_cpu'] / stock:10.3f}{''.join(seconds)}"
                f"{got['prefill_share']:10.1%}{got['prefill_planning_share']:10.1%}{got['decode_ms_per_step']:10.2f}"
                f"{got['decode_share']:10.1%}{got['ratio']:10.1%}",
                flush=True,
            )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        machine = {"architecture": platform.machine(), "threads": arguments.threads, "torch": torch.__version__}
        setting = {name: getattr(arguments, name) for name in ("context", "chunk", "steps", "repeats", "dtype")}
        figures = {
            "date": datetime.date.today().isoformat(),
            "machine": {**machine, "transformers": transformers.__version__},
            **setting,
            "results": results,
        }
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
