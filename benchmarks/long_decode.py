"""A long decode at a fixed byte budget: bytes and tokens/s stay flat for every recipe that plans while decoding.

    python benchmarks/long_decode.py [--tokens 4096] [--prompt 512] [--budget 256KiB] [--threads 2] [--json FILE]

Each recipe decodes on a random Llama. Noted are the bytes that the cache has allocated after every plan, and tokens/s
every 256 tokens. Printed per recipe: bytes after the first and the last plan, the most they moved in pages per row,
tokens/s of the first and the last quarter, and milliseconds per token spent observing and planning. `lossless` runs
for comparison: its bytes grow.
"""

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument

MARK = 256  # tokens between notes


def decoding_presets() -> list[str]:
    """Presets that plan while decoding."""
    recipes = {name: kvc.get_preset(name) for name in kvc.presets()}
    return [name for name, recipe in recipes.items() if recipe.plan is not None and recipe.when.decode]


@torch.no_grad()
def run(model: LlamaForCausalLM, recipe: kvc.Recipe, prompt: int, tokens: int) -> dict[str, object]:
    """Decodes and notes bytes and times."""
    ids = torch.randint(4, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(1))
    sizes, rates = [], []
    with kvc.patched(model, recipe):
        cache = kvc.prefill(model, ids[:, :-1], recipe, chunk_size=256)
        logits = model(ids[:, -1:], **as_argument(model, cache), use_cache=True).logits
        statistics = cache.run_report.statistics
        observing = statistics.seconds_planning
        started, plans = time.perf_counter(), statistics.plans
        for step in tqdm(range(1, tokens + 1), desc=recipe.name, leave=False):
            logits = model(logits[:, -1:].argmax(-1), **as_argument(model, cache), use_cache=True).logits
            if statistics.plans > plans or (recipe.plan is None and step % MARK == 0):
                plans = statistics.plans
                sizes.append(cache.memory().total)
            if step % MARK == 0:
                now = time.perf_counter()
                rates.append(MARK / (now - started))
                started = now
    quarter = max(1, len(rates) // 4)
    store = cache.inspect().stores[0]
    rows = store.lengths.shape[1]
    return {
        "bytes_first": sizes[0],
        "bytes_last": sizes[-1],
        "moved_pages_per_row": (max(sizes) - min(sizes)) / store.layout.page_bytes / rows,
        "tokens_per_s_first": sum(rates[:quarter]) / quarter,
        "tokens_per_s_last": sum(rates[-quarter:]) / quarter,
        "planning_ms_per_token": 1e3 * (statistics.seconds_planning - observing) / tokens,
        "bytes": sizes[:: max(1, len(sizes) // 16)],
        "tokens_per_s": rates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--budget", default="256KiB", help="bytes per sequence")
    parser.add_argument("--recipes", nargs="+", default=[*decoding_presets(), "lossless"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.tokens < MARK:
        parser.error(f"--tokens must be at least {MARK}")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1 << 20,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype)).eval()
    results = {}
    print(
        f"{'recipe':<20}{'KiB first':>10}{'last':>8}{'pages/row':>11}{'tok/s first':>13}{'last':>8}{'plan ms/tok':>13}"
    )
    for name in arguments.recipes:
        recipe = kvc.get_preset(name)
        if recipe.plan is not None:
            recipe = recipe.with_overrides(budget=arguments.budget)
        results[name] = r = run(model, recipe, arguments.prompt, arguments.tokens)
        print(
            f"{name:<20}{r['bytes_first'] / 1024:10.0f}{r['bytes_last'] / 1024:8.0f}{r['moved_pages_per_row']:11.2f}"
            f"{r['tokens_per_s_first']:13.0f}{r['tokens_per_s_last']:8.0f}{r['planning_ms_per_token']:13.2f}",
            flush=True,
        )
    if arguments.json:
        machine = {
            "processor": platform.processor(),
            "threads": arguments.threads,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "date": datetime.date.today().isoformat(),
        }
        settings = {name: getattr(arguments, name) for name in ("tokens", "prompt", "budget", "layers", "dtype")}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine, "settings": settings, "results": results}, indent=2))


if __name__ == "__main__":
    main()
