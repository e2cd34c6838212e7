"""Scores by reconstruction: what the model looks at when it reads the same text again (KVzip)."""

from dataclasses import dataclass

import torch

from kvcompress_hf.observers.attention_seen import attention_seen
from kvcompress_hf.observers.base import Chunk, Observer
from kvcompress_hf.observers.window import equalise_layers
from kvcompress_hf.paging.slots import Slots
from kvcompress_hf.validation import check_choice, check_flags, require_int


@dataclass(frozen=True)
class ReconstructionScores(Observer):
    """Observer: the attention a slot receives while the prompt is read a second time, after itself (KVzip).

    No question is needed: what helps to write the text again helps to answer about it (arXiv 2505.23416, section 3).
    After a prompt is stored, the model reads it again in chunks of `chunk` tokens as if each came next; what its
    queries look at among the stored slots is recorded, and nothing of the second reading is kept. Costs about a second
    prefill. The paper puts a request to repeat before each chunk; here the tokens before the chunk lead it in.

    Only `generate` and `prefill` know the tokens to read again. With a cache that already held something, the new
    tokens alone are read again, and a slot keeps what it had if that is more.

    Args:
        chunk (`int`): Tokens read again at once.
        score (`str`): `"max"`: the largest probability any query gives (KVzip); `"square"`: the sum of squared
            probabilities over queries and query heads.
        value (`bool`): Multiply by the squared distance of the slot's value from the mean value of its head.
        equalise (`bool`): Make the importances of each layer sum to one.
    """

    kind = "reconstruction"

    chunk: int = 256
    score: str = "max"
    value: bool = False
    equalise: bool = False

    def __post_init__(self) -> None:
        require_int("ReconstructionScores", "chunk", self.chunk, 16)
        check_choice(self, "score", ("max", "square"))
        check_flags(self, "value", "equalise")

    @property
    def fields(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: The score, and the value factor if asked for."""
        return ("score", "value") if self.value else ("score",)

    @property
    def describes(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: The value factor follows from the values."""
        return ("value",) if self.value else ()

    def describe(
        self, keys: torch.Tensor, values: torch.Tensor, key_mean: torch.Tensor, value_mean: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The value factor of new slots; see [`Observer.describe`]."""
        return {"value": (values.float() - value_mean).square().sum(-1)} if self.value else {}

    @property
    def square_field(self) -> str | None:
        """`str` or `None`: The score, where it is a sum of squares: decode steps go on adding to it."""
        return "score" if self.score == "square" else None

    @property
    def scores_decoded(self) -> bool:
        """`bool`: Whether decoded tokens get a score: not with maxima, as nothing is read again while decoding."""
        return self.score == "square"

    @property
    def reads_again(self) -> int | None:
        """`int`: Tokens of a chunk of the second reading."""
        return self.chunk

    def observe(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """New tokens start from zero; see [`Observer.observe`]."""
        key = chunk.new.key
        return {"score": torch.zeros(key.shape[:3], device=key.device)}

    def observe_again(self, chunk: Chunk) -> None:
        """Records what the second reading looks at; see [`Observer.observe_again`]."""
        seen = attention_seen(chunk, chunk.new.tokens, 0 if self.score == "max" else 2)
        if self.score == "max":
            seen.write(seen.reduce(lambda scores, order: scores.amax(2)), "score", add=False, largest=True)
        else:
            seen.write(seen.reduce(lambda scores, order: scores.sum(2)), "score", add=True)

    def importance(self, slots: Slots) -> torch.Tensor:
        """The score, with the factors asked for; see [`Observer.importance`]."""
        result = slots.fields["score"]
        if self.value:
            result = result * slots.fields["value"]
        if self.equalise:
            result = equalise_layers(torch.where(slots.filled, result, 0.0), slots.layer_of_row)
        return result
