"""Train the evaluation model from random weights, in pieces bounded by the clock.

Every piece goes on where the last one stopped, from --state (everything, on the machine's own disk) or, where that is
lost, from --weights (the bf16 weights that came back; AdamW's moments start anew). The last piece gets --finish: its
learning rate falls to zero by its end. The loss curve does not depend on where it was cut into pieces.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from corpus import SPECIAL, Corpus
from recipe import RECIPES, Recipe
from tasks import ANSWER, KINDS, TEXT, Maker
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from weights import read_weights, write_weights

#: Positions between which the log averages the loss of text.
EDGES = (0, 64, 256, 1024, 2048, 4096)
SAVE_SECONDS = 150


def make_model(recipe: Recipe, vocab: int, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with transformers' own random weights, bfloat16 on the CPU."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=SPECIAL["<s>"],
        eos_token_id=SPECIAL["</s>"],
        pad_token_id=SPECIAL["<pad>"],
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def head_losses(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy per token, float32 `[rows, length]`, of hidden states `[rows, length, hidden]`."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


class Losses:
    """The loss of every token of a batch.

    The layers are called one by one: no mask is ever built, so that attention takes the causal flash kernel, and one
    compiled layer serves all of them.

    Args:
        model: its parameters are used as they are at each call.
        compiled: with torch.compile, once per length.
    """

    def __init__(self, model: LlamaForCausalLM, compiled: bool) -> None:
        self.model = model
        self.head: Callable[..., torch.Tensor] = head_losses
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # beyond it layers would silently run uncompiled
            self.head = torch.compile(head_losses, dynamic=False)
            for layer in model.model.layers:
                layer.compile(dynamic=False)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """float32 `[rows, length]` for ids `[rows, length + 1]`."""
        body = self.model.model
        hidden = body.embed_tokens(ids[:, :-1])
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotary = body.rotary_emb(hidden, position_ids=positions)
        for layer in body.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        return self.head(body.norm(hidden), self.model.lm_head.weight, ids[:, 1:])


class Trainer:
    """bf16 parameters, their float32 masters and the optimisers: AdamW, and Muon where the recipe says so.

    Args:
        model: on its device.
        recipe: sizes and schedule.
    """

    def __init__(self, model: LlamaForCausalLM, recipe: Recipe) -> None:
        self.recipe = recipe
        self.names = [name for name, _ in model.named_parameters()]
        self.params = list(model.parameters())
        self.masters = [param.detach().float().clone() for param in self.params]
        decayed = [m for n, m in zip(self.names, self.masters, strict=True) if m.ndim == 2 and "embed" not in n]
        ids = {id(master) for master in decayed}
        others = [master for master in self.masters if id(master) not in ids]
        groups = [{"params": others, "weight_decay": 0.0}]
        self.optimisers: list[torch.optim.Optimizer] = []
        if recipe.muon:
            muon = torch.optim.Muon(
                decayed, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self.optimisers.append(muon)
        else:
            groups.append({"params": decayed, "weight_decay": recipe.weight_decay})
        self.optimisers.append(torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), eps=1e-8, fused=True))
        for master in self.masters:
            master.grad = torch.zeros_like(master)

    def step(self, lr: float) -> None:
        """Apply the gradients of the parameters, and clear them."""
        torch._foreach_copy_([master.grad for master in self.masters], [param.grad for param in self.params])
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)
        for param in self.params:
            param.grad = None

    def state(self) -> dict[str, Any]:
        return {"masters": self.masters, "optimisers": [optimiser.state_dict() for optimiser in self.optimisers]}

    def load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.masters, state["masters"])
            torch._foreach_copy_(self.params, self.masters)
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


@dataclass
class Progress:
    """Where training stands; all that decides the next step besides weights and moments.

    Args:
        step: steps done.
        warm_from: step at which moments were last empty.
        decay: first step and number of steps of the decay, once planned.
        seconds: spent training, over all pieces.
        log: lines so far.
    """

    step: int = 0
    warm_from: int = 0
    decay: tuple[int, int] | None = None
    seconds: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)

    def lr(self, recipe: Recipe) -> float:
        """Of the next step: linear warm-up, plateau, linear decay to zero."""
        factor = min(1.0, (self.step - self.warm_from + 1) / recipe.warmup_steps)
        if self.decay:
            begin, steps = self.decay
            factor *= max(0.0, 1 - (self.step - begin + 1) / (steps + 1))
        return recipe.lr * factor

    @property
    def finished(self) -> bool:
        return self.decay is not None and self.step >= sum(self.decay)


class Steps(Dataset):
    """Batches by step, for loader processes."""

    def __init__(self, maker: Maker, first: int) -> None:
        self.maker, self.first = maker, first

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, weights, kinds = self.maker.batch(self.first + index)
        return torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(weights), torch.from_numpy(kinds)


class _InOrder(torch.utils.data.Sampler):
    def __iter__(self) -> Iterator[int]:
        index = 0
        while True:
            yield index
            index += 1


class Averages:
    """Sums of losses since they were last taken, kept on the device so that no step waits for them."""

    NAMES = ("loss", *KINDS, "answers", *(f"from {edge}" for edge in EDGES))

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(self.NAMES), 2, device=device, dtype=torch.float64)

    @torch.no_grad()
    def add(self, losses: torch.Tensor, weights: torch.Tensor, kinds: torch.Tensor) -> None:
        """Add a batch: losses and weights `[rows, length]`, kinds `[rows]`."""
        is_text = weights == TEXT
        novel_or_code = is_text & (kinds != KINDS.index("tasks"))[:, None]
        parts = [(losses, weights)]
        parts += [(losses, is_text & (kinds == i)[:, None]) for i in range(len(KINDS))]
        parts += [(losses, weights == ANSWER)]
        for begin, end in zip(EDGES, (*EDGES[1:], None), strict=True):
            parts.append((losses[:, begin:end], novel_or_code[:, begin:end]))
        self.sums += torch.stack([torch.stack([(loss * mask).sum(), mask.sum()]) for loss, mask in parts])

    def take(self) -> dict[str, float]:
        """The weighted loss, the mean of text by kind and by position, and of answers; afterwards all is zero."""
        found = {name: round(s / n, 5) for name, (s, n) in zip(self.NAMES, self.sums.tolist(), strict=True) if n}
        self.sums.zero_()
        return found


class HeldOut:
    """Losses on text and tasks that are never trained on, always the same ones at one length.

    Args:
        maker: of the held-out split.
        device: of the model.
    """

    def __init__(self, maker: Maker, device: torch.device) -> None:
        self.maker, self.device = maker, device
        self.batches: dict[int, list[tuple[torch.Tensor, ...]]] = {}

    def measure(self, losses: Losses, step: int) -> dict[str, dict[str, float]]:
        """By kind, at the length of a step. Gradients stay on: without them every layer would compile anew."""
        length = self.maker.recipe.length(step)
        if length not in self.batches:
            first = self.maker.recipe.first_step(length)
            made = [self.maker.batch(first, kind) for kind in KINDS]
            self.batches[length] = [tuple(torch.from_numpy(part).to(self.device) for part in batch) for batch in made]
        result = {}
        for kind, (ids, weights, kinds) in zip(KINDS, self.batches[length], strict=True):
            averages = Averages(self.device)
            averages.add(losses(ids).detach(), weights[:, 1:], kinds)
            result[kind] = averages.take()
        return result


def save(args: argparse.Namespace, progress: Progress, trainer: Trainer) -> None:
    """Write everything to --state, and weights and log to --out. An interruption leaves the earlier state whole."""
    args.state.mkdir(parents=True, exist_ok=True)
    part = args.state / "state.part"
    torch.save({"progress": asdict(progress), **trainer.state()}, part)
    os.replace(part, args.state / "state.pt")
    tensors = dict(zip(trainer.names, trainer.params, strict=True))
    facts = {"recipe": args.recipe, "step": progress.step, "tokens": progress.step * trainer.recipe.tokens_per_step}
    write_weights(args.out, tensors, {**facts, "seconds": round(progress.seconds, 1), "finished": progress.finished})
    (args.out / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in progress.log))


def resume(args: argparse.Namespace, model: LlamaForCausalLM, trainer: Trainer, device: torch.device) -> Progress:
    """Where to go on: the state, else the weights, else the beginning."""
    state = args.state / "state.pt"
    if state.is_file():
        loaded = torch.load(state, map_location=device)
        trainer.load(loaded)
        return Progress(**loaded["progress"])
    if args.weights:
        tensors, facts = read_weights(args.weights)
        if facts["recipe"] != args.recipe:
            raise SystemExit(f"{args.weights} was trained by --recipe {facts['recipe']}, not {args.recipe}")
        model.load_state_dict(tensors, strict=False)  # the output matrix is the embedding
        torch._foreach_copy_(trainer.masters, [param.detach() for param in trainer.params])
        log = [json.loads(line) for line in (args.weights / "train_log.jsonl").read_text().splitlines()]
        return Progress(facts["step"], facts["step"], None, facts["seconds"], log)
    return Progress()


class Pace:
    """Seconds per step of this piece, measured over a few steps after the first ones, which compile.

    Args:
        first: step at which the piece began.
        device: waited for at the ends of the measurement.
    """

    SKIPPED, MEASURED = 10, 30

    def __init__(self, first: int, device: torch.device) -> None:
        self.begin, self.device, self.mark = first + self.SKIPPED, device, 0.0

    def seconds(self, step: int) -> float | None:
        """The measurement, at the step at which it is complete; called after every step."""
        if step not in (self.begin, self.begin + self.MEASURED):
            return None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        begin, self.mark = self.mark, time.monotonic()
        return (self.mark - begin) / self.MEASURED if step > self.begin else None


def main(argv: list[str] | None = None) -> None:
    began = time.monotonic()
    args = parse_arguments(argv)
    deadline = began + 60 * args.minutes
    device, recipe = torch.device(args.device), RECIPES[args.recipe]
    on_gpu = device.type == "cuda"
    if on_gpu:  # rather an error than attention with all scores in memory
        torch.backends.cuda.enable_math_sdp(False)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes are enough
    corpus = Corpus(args.data)
    model = make_model(recipe, corpus.vocab).to(device)
    trainer = Trainer(model, recipe)
    progress = resume(args, model, trainer, device)
    losses = Losses(model, compiled=on_gpu if args.compile is None else args.compile)
    held_out = HeldOut(Maker(corpus, "heldout", recipe), device)
    workers = max(1, (os.cpu_count() or 2) - 3) if on_gpu else 0
    loader = DataLoader(
        Steps(Maker(corpus, "train", recipe), progress.step),
        batch_size=None,
        sampler=_InOrder(),
        num_workers=workers,
        pin_memory=on_gpu,
        prefetch_factor=8 if workers else None,
    )
    if args.finish and args.steps is not None and progress.decay is None:
        progress.decay = (progress.step, args.steps - progress.step)
    print(f"{model.num_parameters() / 1e6:.1f} M parameters on {device}, from step {progress.step}", flush=True)

    averages, pace = Averages(device), Pace(progress.step, device)
    started = last_save = mark = time.monotonic()
    before, marked_step = progress.seconds, progress.step
    reserve = 15.0 if on_gpu else 1.0  # seconds that saving takes at the end
    for batch in loader:
        out_of_time = time.monotonic() + reserve > deadline
        if progress.finished or out_of_time or (args.steps is not None and progress.step >= args.steps):
            break
        ids, weights, kinds = (part.to(device, non_blocking=True) for part in batch)
        per_token, weights = losses(ids.long()), weights[:, 1:]
        (per_token * weights).sum().div(weights.sum()).backward()
        lr = progress.lr(recipe)
        trainer.step(lr)
        averages.add(per_token.detach(), weights, kinds)
        progress.step += 1

        if args.finish and progress.decay is None and (seconds := pace.seconds(progress.step)):
            left = deadline - reserve - time.monotonic()
            # Of what is left a twentieth goes into checkpoints and measurements.
            progress.decay = (progress.step, max(1, int(0.95 * left / seconds)))
        if progress.step % recipe.log_every == 0:
            line = {"step": progress.step, "tokens": progress.step * recipe.tokens_per_step}
            line |= {"length": recipe.length(progress.step - 1), "lr": round(lr, 8), **averages.take()}
            now = time.monotonic()
            line["tokens/s"] = round((progress.step - marked_step) * recipe.tokens_per_step / (now - mark))
            if not math.isfinite(line["loss"]):
                raise SystemExit(f"the loss at step {progress.step} is {line['loss']}; {args.state} is from before")
            if progress.step % recipe.measure_every == 0:
                line["held out"] = held_out.measure(losses, progress.step - 1)
            print(json.dumps(line), flush=True)
            progress.log.append(line)
            mark, marked_step = time.monotonic(), progress.step
        progress.seconds = before + time.monotonic() - started
        if time.monotonic() - last_save > SAVE_SECONDS:
            begin = time.monotonic()
            save(args, progress, trainer)
            last_save = time.monotonic()
            reserve = 2 * (last_save - begin) + 5
            mark += last_save - begin
    save(args, progress, trainer)
    tokens = progress.step * recipe.tokens_per_step
    print(f"step {progress.step}, {tokens / 1e6:.1f} M tokens, {progress.seconds:.0f} s; finished: {progress.finished}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data", type=Path, required=True, help="folder written by prepare.py")
    ap.add_argument(
        "--state", type=Path, required=True, help="folder for all that is needed to go on (12 bytes a weight)"
    )
    ap.add_argument("--out", type=Path, required=True, help="folder for the weights in small files and the log")
    ap.add_argument("--weights", type=Path, help="an --out folder to start from where --state is empty")
    ap.add_argument(
        "--minutes", type=float, default=9.3, help="stop after so long, saving included (default: %(default)s)"
    )
    ap.add_argument("--steps", type=int, help="stop after so many steps in all")
    ap.add_argument("--finish", action="store_true", help="let the learning rate fall to zero by the end of this piece")
    ap.add_argument("--recipe", choices=sorted(RECIPES), default="eval")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="with torch.compile (default: on a GPU only)"
    )
    return ap.parse_args(argv)


if __name__ == "__main__":
    main()
