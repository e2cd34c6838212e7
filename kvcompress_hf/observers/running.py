"""Running scores: what every query of the prompt and of decoding attends to (H2O, TOVA, RoCo)."""

from dataclasses import dataclass

import torch

from kvcompress_hf.observers.attention_seen import attention_seen, attention_seen_both
from kvcompress_hf.observers.base import Chunk, Observer, queries_that_saw
from kvcompress_hf.paging.slots import Slots
from kvcompress_hf.validation import check_choice, check_flags

_SCORES = ("mean", "sum", "last")


@dataclass(frozen=True)
class RunningScores(Observer):
    """Observer: sum, and sum of squares, of the attention a slot has received from every query since it came.

    Kept in fp32 by the kernels, never from an attention matrix; the number of queries follows from positions. With
    grouped queries the statistics run over all query heads of the group: `sum p` and `sum p**2` over heads and queries
    (EasyKV averages the heads before squaring, which hides how they differ).

    Args:
        score (`str`): `"mean"` (RoCo, arXiv 2402.06262: mean attention), `"sum"` (H2O, arXiv 2306.14048: accumulated
            attention) or `"last"` (TOVA, arXiv 2401.06104: attention of the last query).
        std (`bool`): Also keep squares, for plans that protect slots of high standard deviation (RoCo).
    """

    kind = "running"

    score: str = "mean"
    std: bool = False

    def __post_init__(self) -> None:
        check_choice(self, "score", _SCORES)
        check_flags(self, "std")
        if self.std and self.score == "last":
            raise ValueError("RunningScores(score='last', std=True): the last query alone has no spread.")

    @property
    def fields(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: The sum, and the sum of squares if asked for."""
        return ("sum", "square") if self.std else ("sum",)

    @property
    def sum_field(self) -> str | None:
        """`str`: The sum."""
        return "sum"

    @property
    def square_field(self) -> str | None:
        """`str` or `None`: The sum of squares."""
        return "square" if self.std else None

    @property
    def last_only(self) -> bool:
        """`bool`: True for TOVA."""
        return self.score == "last"

    def observe(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """Adds what the chunk's queries see to every slot; see [`Observer.observe`]."""
        observing = 1 if self.last_only else chunk.new.tokens
        powers = attention_seen_both(chunk, observing) if self.std else [attention_seen(chunk, observing, power=1)]
        result = {}
        for name, seen in zip(self.fields, powers, strict=True):
            reduced = seen.reduce(lambda scores, order: scores.sum(2))
            result[name] = seen.write(reduced, name, add=not self.last_only)
        return result

    def importance(self, slots: Slots) -> torch.Tensor:
        """Mean, sum or last attention; see [`Observer.importance`]."""
        total = slots.fields["sum"]
        return total / self._count(slots) if self.score == "mean" else total

    def spread(self, slots: Slots) -> torch.Tensor | None:
        """Population standard deviation, infinite for a slot that one query has seen; see [`Observer.spread`]."""
        if not self.std:
            return None
        count = self._count(slots)
        variance = slots.fields["square"] / count - (slots.fields["sum"] / count).square()
        return torch.where(queries_that_saw(slots, slots.seen) > 1, variance.clamp(min=0).sqrt(), torch.inf)

    def _count(self, slots: Slots) -> torch.Tensor:
        return queries_that_saw(slots, slots.seen) * slots.group[:, None]
