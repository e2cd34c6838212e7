"""Train the tiny Llama on novels and generated retrieval tasks, on the CPU, for a fixed number of minutes.

The schedule runs on the clock (a length per share of the time, then a linear decay of the learning rate), so
a machine of another speed sees another number of tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import INSTRUCTIONS, digits, make_key, random_fact
from transformers import AutoTokenizer, LlamaForCausalLM

BOS = 1
ANSWER = 5.0  # loss weight of answer tokens


class Sample:
    """Token ids with a loss weight each."""

    def __init__(self) -> None:
        self.ids: list[int] = [BOS]
        self.weights: list[float] = [0.0]

    def add(self, ids: list[int], weight: float) -> None:
        self.ids.extend(ids)
        self.weights.extend([weight] * len(ids))


class Mixture:
    """Draws training samples: plain novels, repeated segments, key-value lines, needle questions."""

    def __init__(self, work: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.np_rng = np.random.default_rng(seed)
        self.tok = AutoTokenizer.from_pretrained(work / "tokenizer")
        with np.load(work / "train.npz") as z:
            self.docs = [z[k] for k in z.files]
        sizes = np.array([len(d) for d in self.docs], dtype=float)
        self.doc_p = sizes / sizes.sum()
        self.words: list[str] = json.loads((work / "words.json").read_text())["train"]
        self.dot = self.encode(".")[0]

    def encode(self, text: str) -> list[int]:
        return self.tok(text, add_special_tokens=False).input_ids

    def novel(self, n: int) -> np.ndarray:
        doc = self.docs[self.np_rng.choice(len(self.docs), p=self.doc_p)]
        start = self.np_rng.integers(0, len(doc) - n)
        return doc[start : start + n].astype(np.int64)

    def plain(self, length: int) -> Sample:
        s = Sample()
        s.add(self.novel(length).tolist(), 1.0)
        return s

    def repeated(self, length: int) -> Sample:
        """A segment of a novel, sometimes shuffled, that comes again later."""
        s = Sample()
        n = self.rng.randint(16, length // 3)
        segment = self.novel(n)
        if self.rng.random() < 0.4:
            segment = self.np_rng.permutation(segment)
        s.add(segment.tolist(), 0.3)
        s.add(self.novel(max(1, self.rng.randint(0, length - 2 * n - 2))).tolist(), 1.0)
        s.add(self.encode("\n"), 1.0)
        s.add(segment[:2].tolist(), 0.0)
        s.add(segment[2:].tolist(), 2.0)
        if len(s.ids) <= length:
            s.add(self.novel(length + 1 - len(s.ids)).tolist(), 1.0)
        return s

    def key_value(self, length: int) -> Sample:
        """Lines of keys with numbers, then the same lines in another order."""
        s = Sample()
        form = self.rng.choice(["line {k}: REGISTER_CONTENT is <", "{k} = <", "{k}: <"])
        before, after = form.split("{k}")
        n_digits = self.rng.choice([3, 5, 5])
        limit = length * self.rng.uniform(0.5, 0.75)

        def line(key: str, value: str, weight: float) -> None:
            if before:
                s.add(self.encode(before.rstrip(" ")), 0.3)
                s.add(self.encode(" " + key), 0.0)
            else:
                s.add(self.encode(key), 0.0)
            s.add(self.encode(after), 0.3)
            s.add(self.encode(value), weight)
            s.add(self.encode(">\n"), 0.3)

        used: dict[str, str] = {}
        while len(s.ids) < limit:
            key = make_key(self.rng, self.words)
            if key not in used:
                used[key] = digits(self.rng, n_digits)
                line(key, used[key], 0.0)
        keys = list(used)
        self.rng.shuffle(keys)
        for key in keys:
            line(key, used[key], ANSWER)
            if len(s.ids) > length:
                break
        return s

    def needles(self, length: int) -> Sample:
        """One to three facts inside a stretch of a novel, each asked at the end."""
        facts = {}
        n_facts = self.rng.choice([1, 1, 1, 2, 2, 3])
        while len(facts) < n_facts:
            fact = random_fact(self.rng, self.words)
            facts.setdefault(fact.key, fact)
        asked = [(self.encode("\n" + f.question), self.encode(f.answer)) for f in facts.values()]
        pieces = [[(self.encode(text), weight) for text, weight in f.needle] for f in facts.values()]
        s = Sample()
        s.add(self.encode(self.rng.choice(INSTRUCTIONS)), 0.3)
        need = sum(len(ids) for piece in pieces for ids, _ in piece)
        need += sum(len(q) + len(a) + 2 for q, a in asked)
        fill = length - len(s.ids) - need
        if fill < 16:
            return self.plain(length)
        hay = self.novel(fill)
        ends = np.flatnonzero(hay == self.dot) + 1
        spots = ends if len(ends) > 3 else np.arange(fill)
        at = np.sort(self.np_rng.choice(spots, size=len(pieces)))
        last = 0
        for pos, piece in zip(at.tolist(), pieces, strict=True):
            s.add(hay[last:pos].tolist(), 1.0)
            last = pos
            for ids, weight in piece:
                s.add(ids, weight)
        s.add(hay[last:].tolist(), 1.0)
        self.rng.shuffle(asked)
        for question, answer in asked:
            s.add(question, 0.3)
            s.add(answer, ANSWER)
            s.add(self.encode("."), 0.5)
        return s

    def batch(self, length: int, rows: int, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
        x = np.zeros((rows, length + 1), np.int64)
        w = np.zeros((rows, length + 1), np.float32)
        for i in range(rows):
            r = self.rng.random()
            if r < args.plain:
                s = self.plain(length)
            elif r < args.plain + args.repeated:
                s = self.repeated(length)
            elif r < args.plain + args.repeated + args.key_value:
                s = self.key_value(length)
            else:
                s = self.needles(length)
            n = min(length + 1, len(s.ids))
            x[i, :n], w[i, :n] = s.ids[:n], s.weights[:n]
        return torch.from_numpy(x), torch.from_numpy(w)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, work: Path, length: int) -> tuple[float, dict[str, float]]:
    """Perplexity on the held-out novels; share of answer tokens right on fresh generated samples."""
    model.eval()
    total, count = 0.0, 0
    with np.load(work / "held.npz") as z:
        docs = [z[k] for k in z.files]
    for doc in docs:
        x = torch.from_numpy(doc[5000 : 5000 + length + 1].astype(np.int64))[None]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x[:, :-1], use_cache=False).logits
        total += F.cross_entropy(logits[0].float(), x[0, 1:], reduction="sum").item()
        count += length
    mix = Mixture(work, seed=99)
    shares = {}
    for name, draw in (("kv", mix.key_value), ("needles", mix.needles)):
        right = asked = 0
        for _ in range(8):
            s = draw(length)
            x, w = torch.tensor(s.ids[: length + 1])[None], np.array(s.weights[: length + 1])
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x[:, :-1], use_cache=False).logits
            mask = w[1:] == ANSWER
            right += int((logits[0].argmax(-1).numpy() == x[0, 1:].numpy())[mask].sum())
            asked += int(mask.sum())
        shares[name] = round(right / max(asked, 1), 3)
    model.train()
    return round(math.exp(total / count), 2), shares


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--work", type=Path, required=True, help="folder written by prepare.py")
    ap.add_argument("--init", type=Path, required=True, help="model folder written by init.py")
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--minutes", type=float, default=68)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--seed", type=int, default=0)
    schedule = "256:.13,512:.25,1024:.35,2048:.15,2560:.12"
    ap.add_argument("--schedule", default=schedule, help="length:share of the time, comma-separated")
    ap.add_argument("--tokens-per-step", type=int, default=5120)
    ap.add_argument("--plain", type=float, default=0.35, help="share of samples that are novel text only")
    ap.add_argument("--repeated", type=float, default=0.05)
    ap.add_argument("--key-value", type=float, default=0.12, help="the rest: needle questions")
    ap.add_argument("--lr", type=float, default=3e-3, help="AdamW: embedding and norms")
    ap.add_argument("--muon-lr", type=float, default=2e-2, help="Muon: all other matrices")
    ap.add_argument("--warmup", type=float, default=0.02, help="share of the time")
    ap.add_argument("--decay", type=float, default=0.6, help="share of the time, at the end")
    args = ap.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    mix = Mixture(args.work, args.seed)
    model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32, attn_implementation="sdpa")
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    muon = torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="original")
    adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    pairs = [part.split(":") for part in args.schedule.split(",")]
    lengths, ends = [int(p[0]) for p in pairs], np.cumsum([float(p[1]) for p in pairs])

    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "log.txt").open("a")

    def say(text: str) -> None:
        print(text, flush=True)
        log.write(text + "\n")
        log.flush()

    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f} M parameters, {vars(args)}")
    start = last_save = time.time()
    tokens = step = 0
    next_eval = 0.0
    mean_text = mean_answer = float("nan")
    model.train()
    while (minutes := (time.time() - start) / 60) < args.minutes:
        done = minutes / args.minutes
        length = lengths[min(int(np.searchsorted(ends, done, side="right")), len(lengths) - 1)]
        scale = min(1.0, done / args.warmup)
        if done > 1 - args.decay:
            scale *= max(0.02, (1 - done) / args.decay)
        for opt, lr in ((muon, args.muon_lr), (adam, args.lr)):
            for group in opt.param_groups:
                group["lr"] = lr * scale
        x, w = mix.batch(length, max(1, args.tokens_per_step // length), args)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(x[:, :-1], use_cache=False).last_hidden_state
            w = w[:, 1:].reshape(-1)
            keep = w > 0
            logits = model.lm_head(hidden.reshape(-1, hidden.shape[-1])[keep])
        y, w = x[:, 1:].reshape(-1)[keep], w[keep]
        losses = F.cross_entropy(logits.float(), y, reduction="none")
        ((losses * w).sum() / w.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in (muon, adam):
            opt.step()
            opt.zero_grad()
        tokens += x.shape[0] * length
        step += 1
        text_loss = losses[w == 1].mean().item()
        mean_text = text_loss if math.isnan(mean_text) else 0.97 * mean_text + 0.03 * text_loss
        if (w == ANSWER).any():
            answer_loss = losses[w == ANSWER].mean().item()
            mean_answer = answer_loss if math.isnan(mean_answer) else 0.97 * mean_answer + 0.03 * answer_loss
        if step % 25 == 0:
            say(
                f"step {step} {minutes:.1f} min, length {length}, {tokens / 1e6:.2f} M tokens, "
                f"{tokens / (time.time() - start):.0f}/s, text {mean_text:.3f}, answers {mean_answer:.3f}, "
                f"lr {scale:.2f}"
            )
        if minutes > next_eval:
            found = evaluate(model, args.work, length)
            say(f"   held-out perplexity, answer tokens right at {length}: {found}")
            next_eval = minutes + 5
        if time.time() - last_save > 240:
            model.save_pretrained(args.out / "checkpoint")
            last_save = time.time()
    model.save_pretrained(args.out / "final")
    mix.tok.save_pretrained(args.out / "final")
    say(f"end: {step} steps, {tokens} tokens, {(time.time() - start) / 60:.1f} min")


if __name__ == "__main__":
    main()
