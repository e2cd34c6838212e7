"""What is trained and how: the sizes of the model, the mixture, the schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """A model and its training. Lengths and sizes are in tokens unless said otherwise.

    Args:
        layers, hidden, mlp, heads, kv_heads, head_dim: of the Llama.
        context: longest sequence, and `max_position_embeddings`.
        rope_theta: base of the rotary embedding.
        tokens_per_step: of one optimiser step; every length of `phases` divides it.
        phases: (length, tokens seen so far up to which sequences have that length), short ones first.
        task_shares: (share of tokens that are generated tasks, the text between their facts included; tokens seen so
            far up to which it holds).
        prose_share: share of tokens that are novels; the rest is code with its documentation.
        lr: AdamW's, on the plateau.
        weight_decay: of the matrices; embeddings and norms have none.
        muon: the layers' matrices are trained by Muon in place of AdamW, at the same size of steps.
        warmup_steps: linear, at the beginning and after moments were lost.
        log_every, measure_every: steps between lines of the log, and between measurements on held-out data.
        note: what the model card says about models of this recipe.
    """

    layers: int = 12
    hidden: int = 512
    mlp: int = 1024
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    context: int = 4096
    rope_theta: float = 50_000.0
    tokens_per_step: int = 65_536
    phases: tuple[tuple[int, float], ...] = ((512, 60e6), (1024, 140e6), (2048, 260e6), (4096, float("inf")))
    task_shares: tuple[tuple[float, float], ...] = ((0.25, float("inf")),)
    prose_share: float = 0.12
    lr: float = 1.2e-3
    weight_decay: float = 0.1
    muon: bool = True
    warmup_steps: int = 300
    log_every: int = 50
    measure_every: int = 500
    note: str = ""

    def length(self, step: int) -> int:
        """Length of the sequences of a step, counted from 0."""
        seen = step * self.tokens_per_step
        return next(length for length, until in self.phases if seen < until)

    def task_share(self, step: int) -> float:
        """Share of tasks in a step, counted from 0."""
        seen = step * self.tokens_per_step
        return next(share for share, until in self.task_shares if seen < until)

    def first_step(self, length: int) -> int:
        """The first step whose sequences have that length."""
        before = [0.0, *(until for _, until in self.phases)]
        return math.ceil(before[[length for length, _ in self.phases].index(length)] / self.tokens_per_step)


RECIPES = {
    "eval": Recipe(),
    # What two CPU cores can do in three or four hours: a seventh of the size, short sequences and many tasks first.
    "cpu": Recipe(
        layers=6,
        hidden=256,
        mlp=512,
        heads=4,
        kv_heads=2,
        tokens_per_step=8192,
        phases=((256, 7e6), (512, 9e6), (1024, 11.8e6), (2048, 20e6), (4096, float("inf"))),
        task_shares=((0.5, 14.25e6), (0.15, float("inf"))),
        prose_share=0.15,
        lr=3e-3,
        warmup_steps=100,
        measure_every=250,
        note=(
            "This is what two CPU cores could train in three and a half hours, not what the recipe for a GPU "
            "(32.5 M parameters, 500 M tokens and more, a quarter of them tasks) is meant to give. It finds what "
            "it was trained to find, by heads that came to do so; it knows little language, follows no "
            "instruction, and has only 12 KV heads. What holds on it has yet to be seen on a larger model."
        ),
    ),
    # For tests and for trying things out: seconds on one CPU core.
    "toy": Recipe(
        layers=2,
        hidden=64,
        mlp=128,
        heads=4,
        kv_heads=2,
        head_dim=16,
        context=512,
        rope_theta=10_000.0,
        tokens_per_step=1024,
        phases=((256, 3 * 1024), (512, float("inf"))),
        muon=False,
        warmup_steps=3,
        log_every=1,
        measure_every=4,
    ),
}
