"""What compression while decoding costs: long texts decoded token by token under a fixed cap of bytes.

    python benchmarks/decoding.py [--recipes think,r-kv,...] [--cap 512] [--tokens 4096] [--json FILE]

Every recipe gets the bytes that `--cap` tokens take in a dense cache, tail and all else included, and reads the same
tokens, one after the other, as if it had written them itself: after a prompt of `--prompt` tokens each is given as the
model's next input, whatever the model would have said (teacher forcing). Two kinds of text:

- `prose`: the beginnings of novels (`examples/texts/evaluation`); scored is every token behind the cap, in nats.
- `state`: a log of who has which thing. Now and then a thing changes hands, and most lines say once more who has what;
  scored is whether the model would have named the right thing there, and the nats of it.

Tokens pass through the model up to 16 at a time, as drafts that are all accepted; what the recipe sees and does is
that of decoding one by one. With `--chunks` they are chunks of a prompt, a tail long each, which is quicker; for
recipes that only look when a plan is due (`think`, `triattention`, `r-kv`) it differs from decoding by rounding
alone. Recipes: a preset's name, or one with changes as `kvcompress eval` takes them. The full cache's figures are of
one pass of the stock model over the whole text. Intervals: 95 %, paired with the full cache and with `--against`,
which comes first; 10,000 resamplings of blocks of 256 tokens (prose) and of logs (state).
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kvcompress_hf as kvc
from kvcompress_hf.cli.evaluate import make_cells, surroundings
from kvcompress_hf.cli.figures import to_text
from kvcompress_hf.cli.generate import load
from kvcompress_hf.cli.linears import linears_in_float32
from kvcompress_hf.cli.models import find_model
from kvcompress_hf.cli.texts import find_texts, pieces_of
from kvcompress_hf.compat import as_argument

BLOCK = 256  # tokens that are resampled together
DRAFT = 16  # tokens that pass through the model at once
NAMES = tuple("Anna Ben Clara David Emma Frank Grace Henry Irene Jack Kate Leo Maria Nora Oscar Paul".split())  # noqa: SIM905
THINGS = tuple("lamp book key coin rope map bell cup knife ring hat stone box flag clock drum".split())  # noqa: SIM905


def prose(tokenizer: Any, name: str, split: str, count: int, tokens: int) -> Tensor:
    """The first tokens of novels, `int64` `[count, tokens]`; where there are too few, later parts of them."""
    texts = find_texts(name, split)
    rows = []
    for index in range(count):
        text = texts[index % len(texts)]
        ids = tokenizer("".join(pieces_of(text.text)), add_special_tokens=False).input_ids
        start = index // len(texts) * tokens
        if start + tokens > len(ids):
            raise SystemExit(f"{text.name} has {len(ids)} tokens; {count} contexts of {tokens} are too many")
        rows.append(ids[start : start + tokens])
    return torch.tensor(rows)


def state_logs(tokenizer: Any, count: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logs of who has what, `int64` `[count, tokens]`, and where a thing is named again, `bool` of the same shape."""
    rows, asked = [], []
    for index in range(count):
        chance = random.Random(seed * 1000 + index)
        ids = tokenizer("A log of who has which thing.\n", add_special_tokens=False).input_ids
        marks = [False] * len(ids)
        has: dict[str, str] = {}
        while len(ids) < tokens:
            again = len(has) >= 8 and chance.random() < 0.85
            who = chance.choice(list(has) if again else NAMES)
            what = has[who] if again else chance.choice([thing for thing in THINGS if thing != has.get(who)])
            begin = f"Check: {who} still has the" if again else f"Now {who} gets the"
            has[who] = what
            for part, asks in ((begin, False), (f" {what}", again), (".\n", False)):
                new = tokenizer(part, add_special_tokens=False).input_ids
                ids += new
                marks += [asks] + [False] * (len(new) - 1)
        rows.append(ids[:tokens])
        asked.append(marks[:tokens])
    return torch.tensor(rows), torch.tensor(asked)


@torch.no_grad()
def full_pass(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of every token but the first, and whether each would have been said, `[contexts, tokens - 1]`."""
    losses, right = [], []
    for row in ids:
        logits = model(row[None], use_cache=False).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, row[1:], reduction="none"))
        right.append(logits.argmax(-1) == row[1:])
    return torch.stack(losses), torch.stack(right)


@torch.no_grad()
def decode(model: Any, recipe: kvc.Recipe, ids: Tensor, prompt: int, chunks: bool) -> dict[str, Any]:
    """As [`full_pass`], token by token under a recipe; and the bytes held, at the end and at most, per sequence."""
    batch, tokens = ids.shape
    losses, right = torch.zeros(batch, tokens - 1), torch.zeros(batch, tokens - 1, dtype=torch.bool)
    sizes: list[int] = []
    began = time.perf_counter()
    with kvc.patched(model, recipe):
        cache = kvc.prefill(model, ids[:, :prompt], recipe)
        if not chunks:
            cache.activate_past_recording()
        at = prompt
        while at < tokens - 1:
            # Tokens that are all accepted are those of decoding one by one; a draft ends where the tail is full.
            full = at + recipe.when.every - (at - prompt) % recipe.when.every
            until = min(full if chunks else at + DRAFT, full, tokens - 1)
            logits = model(ids[:, at:until], use_cache=True, **as_argument(model, cache)).logits.float()
            if not chunks:
                cache.crop(0)
            following = ids[:, at + 1 : until + 1]
            losses[:, at:until] = F.cross_entropy(logits.transpose(1, 2), following, reduction="none").cpu()
            right[:, at:until] = (logits.argmax(-1) == following).cpu()
            at = until
            if not sizes or at - prompt >= len(sizes) * 64:
                sizes.append(cache.memory().total // batch)
    statistics = cache.run_report.statistics
    return {
        "losses": losses,
        "right": right,
        "bytes_at_most": max(sizes),
        "bytes_at_end": sizes[-1],
        "slots_at_end": float(torch.stack([s.float().mean() for s in cache.slots()]).mean()),
        "plans": statistics.plans,
        "seconds": round(time.perf_counter() - began, 1),
        "seconds_planning": round(statistics.seconds_planning, 1),
    }


def refuse_statistics(name: str, recipe: kvc.Recipe) -> None:
    """Stops where decoded tokens are not observed as those of a chunk are."""
    observer = recipe.observer
    if observer is None or observer.sum_field or observer.square_field or observer.observes_steps or observer.fields:
        raise SystemExit(
            f"--chunks: {name} observes decoded tokens otherwise than those of a chunk; leave --chunks out"
        )


def interval(differences: Tensor, seed: int = 0) -> list[float]:
    """Mean of paired differences, and its 95 % interval by resampling."""
    g = torch.Generator().manual_seed(seed)
    n = len(differences)
    means = torch.stack([differences[torch.randint(n, (n,), generator=g)].mean() for _ in range(10_000)])
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return [round(float(differences.mean()), 5), round(low, 5), round(high, 5)]


def blocks(losses: Tensor, first: int) -> Tensor:
    """Means over blocks of tokens behind the cap, `[contexts * blocks]`."""
    kept = losses[:, first:]
    return kept[:, : kept.shape[1] // BLOCK * BLOCK].unflatten(1, (-1, BLOCK)).mean(-1).flatten()


def per_log(values: Tensor, marks: Tensor, first: int) -> Tensor:
    """Means over the marked tokens behind the cap, `[contexts]`."""
    counted = marks[:, 1:].clone()
    counted[:, :first] = False
    return (values.float() * counted).sum(1) / counted.sum(1).clamp(min=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--recipes", default="think,auto,triattention,r-kv,h2o")
    parser.add_argument("--against", default="think")
    parser.add_argument("--cap", type=int, default=512, help="tokens whose dense bytes a recipe may hold")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--prose", type=int, default=4, help="novels")
    parser.add_argument("--logs", type=int, default=4, help="logs of the state task")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunks", action="store_true", help="read chunks of as many tokens as a tail holds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    name = find_model(arguments.model)
    model, tokenizer = load(name, dtype=arguments.dtype, device=arguments.device)
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    budget = f"{arguments.cap * per_token}B"
    ids = prose(tokenizer, name, arguments.split, arguments.prose, arguments.tokens)
    logs, marks = state_logs(tokenizer, arguments.logs, arguments.tokens, seed=0 if arguments.split == "dev" else 1)
    both = torch.cat([ids, logs]).to(model.device)
    heading = {"command": " ".join(["python", *sys.argv]), "commit": commit(), **surroundings(arguments.device)}
    results: dict[str, Any] = {}
    with linears_in_float32(model):
        losses, right = full_pass(model, both)
        runs: dict[str, Any] = {"full": {"losses": losses.cpu(), "right": right.cpu()}}
        for cell in [None, *make_cells(arguments.recipes, budget)]:
            name = "full" if cell is None else cell.name
            if cell is not None and arguments.chunks:
                refuse_statistics(name, cell.recipe)
            if cell is not None:
                runs[name] = decode(model, cell.recipe, both, arguments.prompt, arguments.chunks)
            results[name] = report(runs, name, arguments, marks)
            print(name, json.dumps({k: v for k, v in results[name].items() if k != "prose_blocks"}), flush=True)
            if arguments.json:  # what is there is kept if a later recipe is stopped
                settings = {key: value for key, value in vars(arguments).items() if key != "json"}
                figures = {**heading, "settings": settings, "budget": budget, "results": results}
                arguments.json.write_text(to_text(figures))


def commit() -> str:
    """The commit of this checkout, with a `+` where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return head + "+" * bool(changed)


def report(runs: dict[str, Any], name: str, arguments: argparse.Namespace, marks: Tensor) -> dict[str, Any]:
    """The figures of one recipe."""
    run, count, cap = runs[name], arguments.prose, arguments.cap
    found: dict[str, Any] = {
        "prose_nll": round(float(blocks(run["losses"][:count], cap).mean()), 5),
        "state_right": round(float(per_log(run["right"][count:], marks, cap).mean()), 5),
        "state_nll": round(float(per_log(run["losses"][count:], marks, cap).mean()), 5),
    }
    for other in {"full", arguments.against} & runs.keys() - {name}:
        them = runs[other]
        found[f"prose_nll_over_{other}"] = interval(
            blocks(run["losses"][:count], cap) - blocks(them["losses"][:count], cap)
        )
        found[f"state_right_over_{other}"] = interval(
            per_log(run["right"][count:], marks, cap) - per_log(them["right"][count:], marks, cap)
        )
    found["prose_blocks"] = [round(x, 4) for x in blocks(run["losses"][:count], cap).tolist()]
    return found | {key: value for key, value in run.items() if not isinstance(value, Tensor)}


if __name__ == "__main__":
    main()
