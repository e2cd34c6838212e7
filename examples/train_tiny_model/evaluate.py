"""Measure a model on held-out novels: greedy exact answers by task and length, perplexity, head ablation.

Keys, digits and novels are unseen in training; the wording of facts and questions is the training wording.
Prints a table with 95 % Wilson intervals and writes everything to figures.json in the model folder.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    HELD_OUT,
    INSTRUCTIONS,
    Fact,
    clean,
    key_words,
    magic_number,
    make_key,
    passkey,
    random_fact,
    read_novels,
)
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

INSTRUCTION = {"passkey": INSTRUCTIONS[0], "magic": INSTRUCTIONS[1]}


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion."""
    p = right / n
    mid = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, mid - half), min(1.0, mid + half)


def two_words(rng: random.Random, words: list[str]) -> str:
    return f"{rng.choice(words)}-{rng.choice(words)}"


def draw_passkey(rng: random.Random, words: list[str]) -> list[Fact]:
    return [passkey(rng)]


def draw_magic(rng: random.Random, words: list[str]) -> list[Fact]:
    return [magic_number(rng, two_words(rng, words))]


def draw_magic_short(rng: random.Random, words: list[str]) -> list[Fact]:
    return [magic_number(rng, two_words(rng, words), short=True)]


def draw_pass_and_magic(rng: random.Random, words: list[str]) -> list[Fact]:
    facts = [passkey(rng), magic_number(rng, two_words(rng, words))]
    rng.shuffle(facts)
    return facts


def draw_two_magic(rng: random.Random, words: list[str]) -> list[Fact]:
    return [magic_number(rng, two_words(rng, words)) for _ in range(2)]


def draw_three_kinds(rng: random.Random, words: list[str]) -> list[Fact]:
    """A pass key, a magic number and a fact of another kind; any of the first two is asked."""
    facts = [passkey(rng), magic_number(rng, make_key(rng, words))]
    rng.shuffle(facts)
    while (third := random_fact(rng, words)).kind in ("passkey", "magic"):
        pass
    return [*facts, third]


# the first fact drawn is the one asked
TASKS: dict[str, Callable[[random.Random, list[str]], list[Fact]]] = {
    "pass key": draw_passkey,
    "one magic number": draw_magic,
    "one magic number, short question": draw_magic_short,
    "pass key + magic number, one asked": draw_pass_and_magic,
    "pass key + magic number + other, one asked": draw_three_kinds,
    "two magic numbers, one asked": draw_two_magic,
}


class Prompts:
    def __init__(self, tok: PreTrainedTokenizerBase, data: Path, seed: int) -> None:
        self.tok = tok
        self.rng = random.Random(seed)
        novels = read_novels(data)
        self.words = key_words([t for n, t in novels.items() if n not in HELD_OUT])[1]
        self.sentences = []
        for name in HELD_OUT:
            flat = re.sub(r"\s+", " ", novels[name])
            found = [s for s in re.split(r"(?<=[.!?])\s+", flat) if 20 < len(s) < 400]
            self.sentences.append([(s, self.size(" " + s)) for s in found])

    def size(self, text: str) -> int:
        return len(self.tok(text, add_special_tokens=False).input_ids)

    def make(self, task: str, length: int) -> tuple[str, str]:
        """A prompt of at most ``length`` tokens (at most one sentence less), and its answer."""
        facts = TASKS[task](self.rng, self.words)
        asked = facts[0]
        head = INSTRUCTION.get(asked.kind, "") if len(facts) == 1 else ""
        tail = "\n" + asked.question + " "
        left = length - 1 - self.size(head) - self.size(tail) - sum(self.size(f.sentence) for f in facts)
        novel = self.rng.choice(self.sentences)
        i = self.rng.randrange(len(novel) - 300)
        hay: list[str] = []
        while novel[i][1] <= left:
            hay.append(novel[i][0])
            left -= novel[i][1]
            i += 1
        for fact in facts:
            hay.insert(self.rng.randint(0, len(hay)), fact.sentence.strip())
        return head + " ".join(hay) + tail, asked.answer.strip()


@torch.no_grad()
def answer(model: LlamaForCausalLM, ids: torch.Tensor, n: int) -> list[int]:
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        pad_token_id=model.config.pad_token_id,
    )
    return out[0, ids.shape[1] :].tolist()


def retrieval(
    model: LlamaForCausalLM, tok: PreTrainedTokenizerBase, data: Path, args: argparse.Namespace
) -> list[dict]:
    prompts = Prompts(tok, data, args.seed)
    rows = []
    for task in TASKS:
        for length in args.lengths:
            right = cut_right = tokens = 0
            for _ in range(args.samples):
                prompt, expected = prompts.make(task, length)
                ids = tok(prompt, return_tensors="pt").input_ids
                want = tok(expected, add_special_tokens=False).input_ids
                tokens += ids.shape[1]
                right += answer(model, ids, len(want)) == want
                cut = torch.cat([ids[:, :4], ids[:, -(length // 4) :]], 1)
                cut_right += answer(model, cut, len(want)) == want
            low, high = wilson(right, args.samples)
            mean_tokens = round(tokens / args.samples)
            rows.append(
                {
                    "task": task,
                    "length": length,
                    "mean_prompt_tokens": mean_tokens,
                    "right": right,
                    "n": args.samples,
                    "accuracy": round(right / args.samples, 4),
                    "wilson95": [round(low, 4), round(high, 4)],
                    "right_with_first_4_and_last_quarter": cut_right,
                }
            )
            print(
                f"{task:44s} {length:5d} ({mean_tokens} tokens): {right}/{args.samples} "
                f"[{low:.2f}, {high:.2f}], cut to first 4 + last quarter: {cut_right}",
                flush=True,
            )
    return rows


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tok: PreTrainedTokenizerBase, data: Path, window: int, per_novel: int) -> dict:
    """Perplexity of held-out text by position in the window, and bits per character overall."""
    edges = [0, 256, 512, 1024, 2048, window]
    sums, counts, chars = [0.0] * 5, [0] * 5, 0
    for name in HELD_OUT:
        text = clean((data / name).read_text(encoding="utf-8", errors="replace"))
        ids = torch.tensor(tok(text, add_special_tokens=False).input_ids)
        for i in range(per_novel):
            start = 5000 + i * (len(ids) - 5000 - window) // per_novel
            x = torch.cat([torch.tensor([tok.bos_token_id]), ids[start : start + window]])[None]
            losses = F.cross_entropy(model(x[:, :-1]).logits[0].float(), x[0, 1:], reduction="none")
            chars += len(tok.decode(x[0, 1:]))
            for j in range(5):
                part = losses[edges[j] : edges[j + 1]]
                sums[j] += part.sum().item()
                counts[j] += part.numel()
    total = sum(sums) / sum(counts)
    result = {
        "window": window,
        "tokens": sum(counts),
        "loss": round(total, 4),
        "perplexity": round(math.exp(total), 2),
        "bits_per_character": round(sum(sums) / math.log(2) / chars, 4),
        "perplexity_by_position": {
            f"{edges[j]}-{edges[j + 1]}": round(math.exp(sums[j] / counts[j]), 2) for j in range(5)
        },
    }
    print(json.dumps(result))
    return result


@torch.no_grad()
def ablation(model: LlamaForCausalLM, tok: PreTrainedTokenizerBase, data: Path, args: argparse.Namespace) -> dict:
    """Right answers with one attention head's output set to zero, for every head, at 512 tokens."""
    prompts = Prompts(tok, data, args.seed + 1)
    tests = []
    for i in range(args.ablation_samples):
        prompt, expected = prompts.make("pass key" if i % 2 else "one magic number", 512)
        ids = tok(prompt, return_tensors="pt").input_ids
        tests.append((ids, torch.tensor(tok(expected, add_special_tokens=False).input_ids)))

    def score() -> int:
        right = 0
        for ids, want in tests:  # one pass: greedy decoding is exact when every argmax is right
            logits = model(torch.cat([ids, want[None, :-1]], 1), logits_to_keep=len(want)).logits
            right += bool((logits[0].argmax(-1) == want).all())
        return right

    dim = model.config.head_dim
    result = {"n": len(tests), "length": 512, "none": score(), "right_without_head": {}}
    for i, layer in enumerate(model.model.layers):
        weight = layer.self_attn.o_proj.weight
        for head in range(model.config.num_attention_heads):
            kept = weight[:, head * dim : (head + 1) * dim].clone()
            weight[:, head * dim : (head + 1) * dim] = 0
            result["right_without_head"][f"{i}.{head}"] = score()
            weight[:, head * dim : (head + 1) * dim] = kept
    print(json.dumps(result))
    return result


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--model", type=Path, required=True)
    ap.add_argument("--data", type=Path, required=True, help="folder with the novels (*.txt)")
    ap.add_argument("--out", type=Path, help="default: figures.json in the model folder")
    ap.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 2300])
    ap.add_argument("--samples", type=int, default=40)
    ap.add_argument("--ablation-samples", type=int, default=20)
    ap.add_argument("--seed", type=int, default=7)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    tok = AutoTokenizer.from_pretrained(args.model)
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    figures = {
        "dtype": args.dtype,
        "seed": args.seed,
        "held_out": list(HELD_OUT),
        "perplexity": perplexity(model, tok, args.data, 2560, 4),
        "ablation": ablation(model, tok, args.data, args),
        "retrieval": retrieval(model, tok, args.data, args),
    }
    out = args.out or args.model / "figures.json"
    out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
