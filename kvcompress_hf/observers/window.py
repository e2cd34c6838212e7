"""Window scores: what the last queries of a prompt attend to (KV-Compress, SnapKV, LeanKV), and what all may."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvcompress_hf.observers.attention_seen import attention_seen, pool_in_order
from kvcompress_hf.observers.base import Chunk, Observer, queries_that_saw
from kvcompress_hf.observers.non_causal import non_causal_scores
from kvcompress_hf.paging.slots import Slots
from kvcompress_hf.paging.waiting import on_host
from kvcompress_hf.validation import check_choice, check_flags, check_ints, require_int


@dataclass(frozen=True)
class WindowScores(Observer):
    """Observer: the attention of the last queries of a prompt, and of decode steps after it.

    For every query head: probabilities to the `power`, summed over the last `window` queries, max-pooled over
    neighbouring positions; then summed (or the largest taken) over the query heads that share a KV head. That is the
    order in which KV-Compress' code runs (arXiv 2410.00161, eq. 8-10 write the group sum first; a sum of maxima is not
    the maximum of sums). Later chunks of a prompt replace the scores by what their own last queries see.

    Args:
        window (`int`, *optional*): Number of observing queries at the end of the prompt or chunk; `None` for all.
        power (`int`): 2 squares the probabilities (L2), 1 takes them as they are (L1).
        pool (`int`): Width of the max-pool over positions, odd; 1 switches it off.
        group (`str`): `"sum"` or `"max"` over the query heads of a KV head.
        exclude (`int`): A query counts for a key only from this distance on (KV-Compress' collection buffer v).
        mean (`bool`): Divide by the number of query heads and queries that saw the slot (LeanKV's mean attention).
        value (`bool`): Multiply by the squared distance of the slot's value from the mean value of its head.
        equalise (`bool`): Make the importances of each layer sum to one.
        decode (`bool`): Go on adding each decode step's probabilities to the `power`; with `group="max"` the largest
            over the query heads of that step (as LeanKV's code), which takes a pass of its own per step.
        non_causal (`bool`): Count every query of the prompt once more, as if the prompt came again (see
            [`non_causal_scores`]), so that what the window does not look at can still be asked for; with `power=2`
            only. Later chunks of a prompt then leave a slot the larger of the two scores. Where it is not known how
            position turns the queries of a layer, the window alone counts.
        foresee (`bool`): With `non_causal`, count every query a second time as if it knew the token after it (see
            [`foreseen_scores`]): for what heads copy when a text comes again that the model could not have guessed.
        half_life (`int`, *optional*): Decode steps after which what was seen counts half, so that slots are forgotten
            that once mattered; `None` remembers for ever, as the papers do. Scores fade once per packing.
    """

    kind = "window"

    window: int | None = 32
    power: int = 2
    pool: int = 7
    group: str = "sum"
    exclude: int = 0
    mean: bool = False
    value: bool = False
    equalise: bool = False
    decode: bool = True
    non_causal: bool = False
    foresee: bool = False
    half_life: int | None = None

    def __post_init__(self) -> None:
        check_ints(self, "window", "half_life", low=1)
        require_int("WindowScores", "power", self.power, 1, 2)
        require_int("WindowScores", "pool", self.pool, 1)
        require_int("WindowScores", "exclude", self.exclude, 0)
        if self.pool % 2 == 0:
            raise ValueError(f"WindowScores.pool is {self.pool}; it must be odd, so that it is centred on the slot.")
        check_choice(self, "group", ("sum", "max"))
        check_flags(self, "mean", "value", "equalise", "decode", "non_causal", "foresee")
        if self.non_causal and self.power != 2:
            raise ValueError(f"WindowScores(non_causal=True, power={self.power}): squares only; give power=2.")
        if self.foresee and not self.non_causal:
            raise ValueError("WindowScores(foresee=True, non_causal=False): give non_causal=True too.")
        if self.half_life is not None and not self.decode:
            raise ValueError("WindowScores(half_life=..., decode=False): nothing fades where nothing is added.")

    @property
    def fields(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: The score, and the value factor if asked for."""
        return ("score", "value") if self.value else ("score",)

    @property
    def describes(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: The value factor follows from the values."""
        return ("value",) if self.value else ()

    @property
    def sum_field(self) -> str | None:
        """`str` or `None`: The score, with L1."""
        return "score" if self.decode and self.power == 1 and not self.observes_steps else None

    @property
    def square_field(self) -> str | None:
        """`str` or `None`: The score, with L2."""
        return "score" if self.decode and self.power == 2 and not self.observes_steps else None

    @property
    def observes_steps(self) -> bool:
        """`bool`: True for maxima over query heads: the decode kernel adds up sums."""
        return self.decode and self.group == "max"

    @property
    def needs_rotary(self) -> bool:
        """`bool`: True where queries are turned to behind the prompt."""
        return self.non_causal

    @property
    def scores_decoded(self) -> bool:
        """`bool`: Whether decode steps are scored."""
        return self.decode

    @property
    def fading(self) -> tuple[tuple[str, ...], float]:
        """`tuple[tuple[str, ...], float]`: The score, with a half-life."""
        return (("score",), 0.5 ** (1 / self.half_life)) if self.half_life else ((), 1.0)

    def describe(
        self, keys: torch.Tensor, values: torch.Tensor, key_mean: torch.Tensor, value_mean: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The value factor of new slots; see [`Observer.describe`]."""
        return {"value": (values.float() - value_mean).square().sum(-1)} if self.value else {}

    def observe(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """Scores new tokens, and what is stored by what the new ones see; see [`Observer.observe`]."""
        tokens = chunk.new.tokens
        observing = tokens if self.window is None else min(self.window, tokens)
        seen = attention_seen(chunk, observing, self.power, self.exclude)
        decoding = self.observes_steps and tokens == 1 and chunk.new.position > 0

        def pooled(scores: torch.Tensor, order: Callable[[], torch.Tensor]) -> torch.Tensor:
            pools = self.pool > 1 and not decoding
            return self._of_group(pool_in_order(scores, order(), self.pool) if pools else scores)

        score = seen.write(seen.reduce(pooled), "score", add=decoding, largest=self.non_causal and not decoding)
        again = non_causal_scores(chunk, self.foresee) if self.non_causal and not decoding else None
        return {"score": score if again is None else score + self._of_group(again)}

    def _of_group(self, scores: torch.Tensor) -> torch.Tensor:
        """From scores per query head, `[batch, kv_heads, group, slots]`, to one per KV head."""
        return scores.sum(2) if self.group == "sum" else scores.amax(2)

    def importance(self, slots: Slots) -> torch.Tensor:
        """The score, with the factors asked for; see [`Observer.importance`]."""
        result = slots.fields["score"]
        if self.mean:
            observing = slots.seen if self.window is None else self.window
            result = result / queries_that_saw(slots, observing, self.fading[1])
            if self.group == "sum":
                result = result / slots.group[:, None]
        if self.value:
            result = result * slots.fields["value"]
        if self.equalise:
            result = equalise_layers(torch.where(slots.filled, result, 0.0), slots.layer_of_row)
        return result


def equalise_layers(scores: torch.Tensor, layer_of_row: torch.Tensor) -> torch.Tensor:
    """Divides each layer's scores by their sum.

    Args:
        scores (`torch.Tensor`): float32 `[batch, rows, slots]`, zero where nothing is stored.
        layer_of_row (`torch.Tensor`): `int64` `[rows]`.

    Returns:
        `torch.Tensor`: The scores so that those of each layer sum to one, float32 `[batch, rows, slots]`.
    """
    per_row = scores.sum(-1)
    layers = int(on_host(layer_of_row).max()) + 1
    per_layer = per_row.new_zeros(per_row.shape[0], layers).index_add_(1, layer_of_row, per_row)
    return scores / per_layer[:, layer_of_row, None].clamp(min=torch.finfo(torch.float32).tiny)
