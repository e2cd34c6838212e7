"""What reading a prompt in chunks costs in accuracy, and what it saves at the peak.

    python benchmarks/chunks.py [--tokens 4000] [--chunk 1000] [--budgets 1/8 1/32] [--json FILE]

One context of each dev author is read at once and in chunks, and by a lossless cache; then KL(lossless ‖ compressed) is
measured on the 96 tokens that follow (`prose`) and on three passages of the context that begin again, 12 tokens given
and 32 scored (`copy`). 4,000 tokens in chunks of 1,000 are what 16,384 in the default chunks of 4,096 are. Intervals:
95 %, bootstrap over contexts.
"""

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import machine
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompress_hf as kvc
from kvcompress_hf.cli.fetch import REAL_MODELS, fetch
from kvcompress_hf.cli.figures import Ratio
from kvcompress_hf.cli.texts import find_texts, pieces_of
from kvcompress_hf.compat import as_argument

FOLLOWING, CUE, SCORED = 96, 12, 32


def probabilities(model, cache, ids):
    """Log-probabilities of what comes after each token, `[tokens, vocabulary]`; the cache stays as it is."""
    fork = cache.fork()
    return model(ids, **as_argument(model, fork), use_cache=True).logits[0].float().log_softmax(-1)


def probes(context, following, seed):
    """Tokens to be read behind a context, and from which on what is said after them counts."""
    third, random_place = context.shape[1] // 3, random.Random(seed)
    starts = [random_place.randrange(i * third, (i + 1) * third - CUE - SCORED) for i in range(3)]
    return {
        "prose": [(following, 0)],
        "copy": [(context[:, start : start + CUE + SCORED], CUE - 1) for start in starts],
    }


def divergence(expected, got, first):
    """KL per token, summed over tokens, and their number."""
    expected, got = expected[first:-1], got[first:-1]
    return float(F.kl_div(got, expected, log_target=True, reduction="sum")), len(got)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--chunk", type=int, default=1000)
    parser.add_argument("--recipe", default="auto")
    parser.add_argument("--budgets", nargs="+", default=["1/8", "1/32"])
    parser.add_argument("--contexts", type=int, default=8, help="at most one of each author")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = fetch(REAL_MODELS["smollm2"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = kvc.patch(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), "lossless")
    cells = [(budget, chunk) for budget in args.budgets for chunk in (args.tokens, args.chunk)]
    found = {cell: {"prose": [], "copy": [], "peak": []} for cell in cells}
    texts = find_texts("smollm2", "dev")[: args.contexts]
    with tqdm(total=len(texts) * (1 + len(cells)), disable=None, unit="reading") as bar:
        for number, text in enumerate(texts):
            ids = tokenizer("".join(pieces_of(text.text)), return_tensors="pt", add_special_tokens=False).input_ids
            context, following = ids[:, : args.tokens], ids[:, args.tokens : args.tokens + FOLLOWING + 1]
            asked = probes(context, following, number)
            full = kvc.prefill(model, context, "lossless", chunk_size=args.tokens)
            expected = {name: [probabilities(model, full, part) for part, _ in parts] for name, parts in asked.items()}
            del full
            bar.update()
            for budget, chunk in cells:
                cache = kvc.prefill(model, context, args.recipe, budget=_fraction(budget), chunk_size=chunk)
                for name, parts in asked.items():
                    sums = [
                        divergence(wanted, probabilities(model, cache, part), first)
                        for wanted, (part, first) in zip(expected[name], parts, strict=True)
                    ]
                    found[budget, chunk][name].append((sum(s for s, _ in sums), sum(n for _, n in sums)))
                found[budget, chunk]["peak"].append(cache.run_report.statistics.peak_bytes)
                bar.update()
    results = []
    for (budget, chunk), of in found.items():
        row = {"budget": budget, "chunk": chunk, "peak_bytes": max(of["peak"])}
        for name in ("prose", "copy"):
            ratio = Ratio([kl for kl, _ in of[name]], [count for _, count in of[name]])
            row[name] = ratio.to_dict()
        results.append(row)
    print(f"\n{args.recipe}, {len(texts)} contexts of {args.tokens} tokens, SmolLM2 in bfloat16")
    for row in results:
        kl = "   ".join(f"{name} {_short(row[name])}" for name in ("prose", "copy"))
        print(f"{row['budget']:>5} in chunks of {row['chunk']:>5}: {kl}   peak {row['peak_bytes'] / 2**20:.1f} MiB")
    if args.json:
        setting = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"machine": machine(), "arguments": setting, "results": results}) + "\n")


def _short(figure) -> str:
    return f"{figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]"


def _fraction(text: str) -> float:
    above, _, below = text.partition("/")
    return float(above) / float(below or 1)


if __name__ == "__main__":
    main()
