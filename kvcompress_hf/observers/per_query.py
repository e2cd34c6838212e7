"""Observers that judge every query by itself, which sums over queries cannot tell (Scissorhands, EasyKV's RoCo)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from kvcompress_hf.observers.attention_seen import attention_seen
from kvcompress_hf.observers.base import Chunk, Observer
from kvcompress_hf.observers.running import RunningScores
from kvcompress_hf.paging.slots import Slots
from kvcompress_hf.validation import check_choice, require_int

Judge = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


def add_each_query(chunk: Chunk, observing: int, fields: tuple[str, ...], judge: Judge) -> dict[str, torch.Tensor]:
    """Adds what a function makes of every single query's probabilities to slot fields; one pass over the keys each.

    Args:
        chunk (`Chunk`): The new tokens.
        observing (`int`): Number of queries at the end of the chunk that look.
        fields (`tuple[str, ...]`): Names of the fields.
        judge (`Callable`): From one query's probabilities `[batch, kv_heads, group, slots]` and which slots it could
            see, `bool` `[batch, kv_heads, slots]`, to what is added to each field, `[batch, kv_heads, slots]` each.

    Returns:
        `dict[str, torch.Tensor]`: The fields of the new tokens, float32 `[batch, kv_heads, tokens]`.
    """
    new = chunk.new
    totals: tuple[torch.Tensor, ...] = ()
    for last in range(new.tokens - observing, new.tokens):
        # A chunk that ends with this query: later keys are not there yet, so its one observing query is the right one.
        until = slice(0, last + 1)
        query, key, value = (x[:, :, until] for x in (new.query, new.key, new.value))
        valid = None if new.valid is None else new.valid[:, until].contiguous()
        part = replace(new, query=query, key=key, value=value, valid=valid)
        seen = attention_seen(replace(chunk, new=part), 1, 1)
        batch, kv_heads, slots = seen.shape
        visible = seen.filled
        if new.logits.window is not None:
            visible = visible & (seen.positions > new.position + last - new.logits.window)
        if valid is not None:
            visible = visible & valid[:, last, None, None]
        p = torch.where(visible[:, :, None], seen.scores.view(batch, kv_heads, -1, slots), 0.0)
        made = tuple(torch.where(visible, values, 0.0) for values in judge(p, visible))
        if totals:
            made = tuple(now + F.pad(old, (0, slots - old.shape[-1])) for now, old in zip(made, totals, strict=True))
        totals = made
    return {name: seen.write(total, name, add=True) for name, total in zip(fields, totals, strict=True)}


@dataclass(frozen=True)
class PersistenceScores(Observer):
    """Observer: how often a slot got less than the uniform attention 1/n (Scissorhands, arXiv 2305.17118, algorithm 2).

    A query that sees `n` slots counts against those to which it gives less than `1/n`; with grouped queries every query
    head has a vote. The paper counts over the last `window` queries before each compression; here the last `window`
    queries of every chunk of a prompt and each decode step add to one running count per slot, because queries of the
    past are not kept.

    Args:
        window (`int`): Queries at the end of a prompt or chunk that are counted, the paper's history window.
        count (`str`): `"below"`: slots with the most queries below 1/n go first (the paper); `"above"`: slots with the
            fewest queries above 1/n go first (EasyKV's first version, which favours old slots).
    """

    kind = "persistence"

    window: int = 400
    count: str = "below"

    def __post_init__(self) -> None:
        require_int("PersistenceScores", "window", self.window, 1)
        check_choice(self, "count", ("below", "above"))

    @property
    def fields(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: The count."""
        return ("count",)

    @property
    def observes_steps(self) -> bool:
        """`bool`: True: a sum of probabilities does not tell how many were above 1/n."""
        return True

    def observe(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """Counts each of the last queries; see [`Observer.observe`]."""

        def judge(p: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, ...]:
            ratio = p * visible.sum(-1)[:, :, None, None]
            # What equals 1/n up to rounding is neither below nor above.
            votes = (ratio > 1 + 1e-6).float() if self.count == "above" else -(ratio < 1 - 1e-6).float()
            return (votes.sum(2),)

        return add_each_query(chunk, min(self.window, chunk.new.tokens), self.fields, judge)

    def importance(self, slots: Slots) -> torch.Tensor:
        """The count, negative for `"below"`; see [`Observer.importance`]."""
        return slots.fields["count"]


@dataclass(frozen=True)
class GroupMeanScores(RunningScores):
    """Observer: as [`RunningScores`], but the query heads of a group are averaged before squaring, as EasyKV does it.

    The deviation then is that of the group's mean: heads that disagree look settled. With one query head per KV head
    both are the same. Kept to reproduce EasyKV's choices; every query is a pass of its own, so it is slow.
    """

    kind = "group-mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score == "last":
            raise ValueError("GroupMeanScores(score='last') is RunningScores(score='last'); use that.")

    @property
    def sum_field(self) -> str | None:
        """`None`: steps are observed one by one."""
        return None

    @property
    def square_field(self) -> str | None:
        """`None`: steps are observed one by one."""
        return None

    @property
    def observes_steps(self) -> bool:
        """`bool`: True: the decode kernel squares before it adds up the heads."""
        return True

    def observe(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """Adds mean, and squared mean, over the group; see [`Observer.observe`]."""

        def of_group(p: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, ...]:
            mean = p.mean(2)
            return (mean, mean.square())[: len(self.fields)]

        return add_each_query(chunk, chunk.new.tokens, self.fields, of_group)

    def _count(self, slots: Slots) -> torch.Tensor:
        return super()._count(slots) / slots.group[:, None]
