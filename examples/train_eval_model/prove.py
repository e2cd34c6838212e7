"""Measure whether a model uses its context, on text and keys it was not trained on; write figures.json and the card.

Loss late and early in the context, and of the same tokens with all of the context and with the last part of it; answers
to multi-key needles; what both lose without each attention head.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from card import write_card
from corpus import SPECIAL, Corpus
from facts import magic_number
from recipe import RECIPES
from tasks import ANSWER, Maker, Row, question
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kvcompress_hf.compat import as_argument

KEYS = 8
BAND = 64  # positions on either side of the one that a loss is given for
INTRO = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion."""
    z, p = 1.959964, right / n
    mid = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, mid - half), min(1.0, mid + half)


@torch.inference_mode()
def token_losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Cross entropy per token, float32 `[rows, length - 1]`, of ids `[rows, length]`."""
    logits = model(ids[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def windows(stream: np.ndarray, length: int, count: int) -> torch.Tensor:
    """int64 `[rows, length]`: at most so many windows spread over a stream, each after the token that begins a text."""
    size = length - 1
    fitting = len(stream) // size
    if not fitting:
        raise SystemExit(f"{len(stream)} held-out tokens are fewer than one window of {size}")
    starts = np.linspace(0, len(stream) - size, min(count, fitting)).astype(int)
    rows = np.stack([stream[start : start + size] for start in starts]).astype(np.int64)
    return torch.from_numpy(np.pad(rows, ((0, 0), (1, 0)), constant_values=SPECIAL["<s>"]))


def mean_error(values: torch.Tensor) -> list[float]:
    """Mean and standard error over the first dimension."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return [round(values.mean().item(), 4), round(error, 4)]


def context_losses(model: PreTrainedModel, stream: np.ndarray, count: int) -> dict[str, Any]:
    """Loss by position over windows of the whole context; means with standard errors over windows."""
    context = model.config.max_position_embeddings
    near, far = context // 16, context - context // 42
    band = min(BAND, near // 2)
    rows = windows(stream, context, count).to(model.device)
    losses = torch.cat([token_losses(model, part) for part in rows.split(4)]).cpu()
    # losses[:, i] is that of the token at position i + 1, given those before it.
    early, late = (losses[:, at - band - 1 : at + band - 1].mean(1) for at in (near, far))
    # The late tokens once more, with no more context than the early ones have.
    begin = far - band - near
    short = torch.cat([rows[:, :1], rows[:, begin + 1 : far + band]], 1)
    cut = torch.cat([token_losses(model, part) for part in short.split(16)]).cpu()[:, -2 * band :].mean(1)
    edges = [0, *(2**i for i in range(6, 20) if 2**i < context), context]
    return {
        "windows": len(rows),
        "near": near,
        "far": far,
        "loss_near": mean_error(early),
        "loss_far": mean_error(late),
        "difference": mean_error(late - early),
        "loss_far_with_short_context": mean_error(cut),
        "gain_from_context": mean_error(cut - late),
        "by_position": {f"{a}-{b}": round(losses[:, a:b].mean().item(), 4) for a, b in pairwise(edges)},
    }


@dataclass
class Needles:
    """A context with facts in it, and questions with answers.

    Args:
        context: int64 `[1, tokens]`.
        asked: int64 `[questions, tokens]`, padded at the end.
        answers: bool like `asked`: the tokens that are scored.
    """

    context: torch.Tensor
    asked: torch.Tensor
    answers: torch.Tensor


def make_needles(maker: Maker, length: int, keys: int, rng: random.Random) -> Needles:
    """Magic numbers of 7 digits under keys of two words, hidden in prose; all of them are asked.

    Args:
        maker: of the held-out split: its text, and words that no key was made of in training.
        length: tokens of the longest context with question and answer.
        keys: how many numbers.
        rng: decides everything.
    """
    names: set[str] = set()
    while len(names) < keys:
        names.add("-".join(rng.sample(maker.words, 2)))
    facts = [magic_number(rng, name) for name in sorted(names)]
    rng.shuffle(facts)
    asked = [maker.encode(question(fact)) for fact in facts]
    longest = max(len(ids) for ids, _ in asked)
    row = Row(length)
    maker.hide(row, rng, length - 1 - longest, [fact.needle for fact in facts], intro=INTRO)
    padded = [ids + [SPECIAL["<pad>"]] * (longest - len(ids)) for ids, _ in asked]
    scored = [[w == ANSWER for w in weights] + [False] * (longest - len(weights)) for _, weights in asked]
    return Needles(torch.tensor([row.ids]), torch.tensor(padded), torch.tensor(scored))


@torch.inference_mode()
def ask(model: PreTrainedModel, needles: Needles) -> tuple[list[bool], list[float]]:
    """For each question whether greedy decoding would give the whole answer, and the answer's loss per token."""
    cache = DynamicCache(config=model.config)
    named = as_argument(model, cache)  # the argument has another name since transformers 5.24
    model(needles.context.to(model.device), **named, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(len(needles.asked))
    logits = model(needles.asked.to(model.device), **named, use_cache=True).logits[:, :-1].float().cpu()
    wanted, scored = needles.asked[:, 1:], needles.answers[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
    exact = ((logits.argmax(-1) == wanted) | ~scored).all(1)
    return exact.tolist(), ((losses * scored).sum(1) / scored.sum(1)).tolist()


def ask_all(model: PreTrainedModel, all_needles: list[Needles]) -> dict[str, Any]:
    """Right answers over several contexts, with Wilson's 95 % interval."""
    exact: list[bool] = []
    losses: list[float] = []
    for needles in all_needles:
        right, loss = ask(model, needles)
        exact += right
        losses += loss
    low, high = wilson(sum(exact), len(exact))
    accuracy = {"right": sum(exact), "questions": len(exact), "accuracy": sum(exact) / len(exact)}
    return {**accuracy, "wilson95": [round(low, 4), round(high, 4)], "loss": round(float(np.mean(losses)), 4)}


@contextmanager
def without_head(model: PreTrainedModel, layer: int, head: int) -> Iterator[None]:
    """The model with the output of one query head replaced by zero."""
    attention = model.model.layers[layer].self_attn
    size = attention.head_dim

    def clear(_module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        outputs = args[0].clone()
        outputs[..., head * size : (head + 1) * size] = 0
        return (outputs,)

    hook = attention.o_proj.register_forward_pre_hook(clear)
    try:
        yield
    finally:
        hook.remove()


def ablate(model: PreTrainedModel, maker: Maker, length: int, contexts: int) -> dict[str, Any]:
    """Each head removed on its own: right answers, and the rise of the losses of answers and of prose."""
    all_needles = [make_needles(maker, length, KEYS, random.Random(f"ablation {i}")) for i in range(contexts)]
    prose = windows(maker.text["prose"], length, 4).to(model.device)

    def measure() -> tuple[dict[str, Any], float]:
        return ask_all(model, all_needles), token_losses(model, prose).mean().item()

    full, full_prose = measure()
    heads = []
    for layer in range(model.config.num_hidden_layers):
        for head in range(model.config.num_attention_heads):
            with without_head(model, layer, head):
                found, prose_loss = measure()
            rise = {"answers": round(found["loss"] - full["loss"], 4), "prose": round(prose_loss - full_prose, 4)}
            heads.append({"layer": layer, "head": head, "right": found["right"], "rise": rise})
    heads.sort(key=lambda entry: -entry["rise"]["answers"])
    return {"length": length, "full": full, "heads": heads}


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, required=True, help="folder written by export.py")
    ap.add_argument("--data", type=Path, required=True, help="folder written by prepare.py")
    ap.add_argument("--windows", type=int, default=96, help="of held-out text, each kind (default: %(default)s)")
    ap.add_argument(
        "--contexts", type=int, default=16, help=f"per length, {KEYS} questions each (default: %(default)s)"
    )
    ap.add_argument("--ablation-contexts", type=int, default=6, help="per head (default: %(default)s)")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = ap.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(args.device).eval()
    recipe = RECIPES[json.loads((args.model / "training" / "run.json").read_text())["recipe"]]
    maker = Maker(Corpus(args.data), "heldout", recipe)
    context = model.config.max_position_embeddings
    figures: dict[str, Any] = {"context": context, "keys": KEYS, "device": args.device}
    figures["losses"] = {kind: context_losses(model, maker.text[kind], args.windows) for kind in ("prose", "code")}
    figures["needles"] = {}
    for length in (context // 2, context):
        found = [
            make_needles(maker, length, KEYS, random.Random(f"needles {length} {i}")) for i in range(args.contexts)
        ]
        figures["needles"][str(length)] = ask_all(model, found)
    half, whole = (figures["needles"][str(length)]["accuracy"] for length in (context // 2, context))
    figures["reached"] = {
        f"loss at {figures['losses'][kind]['far']} below loss at {figures['losses'][kind]['near']}, {kind}": (
            figures["losses"][kind]["difference"][0] + 2 * figures["losses"][kind]["difference"][1] < 0
        )
        for kind in ("prose", "code")
    } | {f"90 % of {KEYS} keys at {context // 2}": half >= 0.9, f"80 % of {KEYS} keys at {context}": whole >= 0.8}
    figures["ablation"] = ablate(model, maker, context // 2, args.ablation_contexts)
    (args.model / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    write_card(args.model)
    for kind, found in figures["losses"].items():
        print(f"{kind}: loss {found['loss_near']} at {found['near']}, {found['loss_far']} at {found['far']}")
    for length, found in figures["needles"].items():
        print(f"{KEYS} keys at {length}: {found['right']}/{found['questions']}, 95 % {found['wilson95']}")
    for what, reached in figures["reached"].items():
        print(f"{'reached' if reached else 'NOT reached'}: {what}")


if __name__ == "__main__":
    main()
