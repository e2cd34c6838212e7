"""The arithmetic of plans, of how keys are stored, and of foreseen queries, that a backend may do natively.

`kvcompress_hf/plans`, `paging/key_shift.py` and `observers/foreseen.py` have the same in torch.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .rotation import Rotation
from .types import Rows

__all__ = ["Hulls", "PlanOperations"]


@dataclass(frozen=True)
class Hulls:
    """The tiers worth using in each sequence, from the cheapest to the best.

    Args:
        tiers: Per sequence the tiers.
        offsets: Per sequence how many bins a slot must be more important than for the cheapest one, for each.
    """

    tiers: Sequence[Sequence[int]]
    offsets: Sequence[Sequence[int]]


class PlanOperations(abc.ABC):
    """What plans, stores and observers ask of a backend that has native code for it. Nothing that is stored changes."""

    @abc.abstractmethod
    def key_shift(self, keys: Tensor, query: Tensor, valid: Tensor | None, bits: int, most: float) -> Tensor:
        """The steady mean of the keys of each head, zero for heads that do not gain when it is taken off.

        Args:
            keys: `[batch, kv_heads, tokens, head_dim]`, float32, float16 or bfloat16.
            query: The last queries times the factor on the logits, `[batch, q_heads, queries, head_dim]`, same dtype;
                the last 32 are looked at.
            valid: bool `[batch, tokens]`, false for padding; `None` = all valid.
            bits: Bits of the keys' codes.
            most: A head gains if no more than this share of the squared error of its logits is left.

        Returns:
            `[batch, kv_heads, 1, head_dim]` in the dtype of `keys`.

        Raises:
            ValueError: A shape or dtype is wrong, or there are more queries than keys.
        """

    @abc.abstractmethod
    def tier_losses(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        tiers: Sequence[tuple[int, int]],
        padding: Tensor | None = None,
    ) -> Tensor:
        """What storing a slot in each tier loses, as a fraction of what evicting it would lose.

        Args:
            query: `[batch, q_heads, tokens, head_dim]`, float32, float16 or bfloat16.
            keys: `[batch, kv_heads, tokens, head_dim]`, same dtype.
            values: `[batch, kv_heads, tokens, head_dim]`, same dtype.
            scale: Factor on the logits.
            tiers: Key and value bits of each tier, (0, 0) for native.
            padding: int64 `[batch]`, padding tokens at the front of each sequence; `None` = none.

        Returns:
            float32 `[batch, kv_heads, tiers]`, NaN for a sequence that is all padding.

        Raises:
            ValueError: A shape or dtype is wrong.
        """

    @abc.abstractmethod
    def fit_maps(
        self, query: Tensor, keys: Tensor, rotation: Rotation, step: int, *, apart: int, ridge: float, gain: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The linear map of each query head that best makes queries from the next token's keys, by ridge regression.

        Both are turned back to position 0.

        Args:
            query: `[batch, q_heads, tokens, head_dim]`, float32, float16 or bfloat16, of two tokens at least.
            keys: `[batch, kv_heads, tokens, head_dim]`, same dtype.
            rotation: How position turns queries and keys.
            step: From the first token of a pair to that of the next.
            apart: One pair of so many, the last of them, is left out and tells how well the map foretells queries.
            ridge: Added to variances, as a fraction of their mean over a key's channels.
            gain: What the map is multiplied by in the end.

        Returns:
            The map and what is added, as [`foresee`] takes them, and the share of the variance of the left-out queries
            that the map foretells before the gain, float32 `[batch, q_heads]`; 0 where none is left out.

        Raises:
            ValueError: A shape or dtype is wrong, there are too few tokens, the step is not positive, or all pairs
                would be left out.
        """

    @abc.abstractmethod
    def foresee(self, query: Tensor, keys: Tensor, mapping: Tensor, offset: Tensor, rotation: Rotation) -> Tensor:
        """Makes each token's query from the next one's key, by a linear map of each query head.

        The key, turned back to position 0, is mapped, and the result turned to where the query stands.

        Args:
            query: `[batch, q_heads, tokens, head_dim]`, float32, float16 or bfloat16, of a token at least.
            keys: `[batch, kv_heads, tokens, head_dim]`, same dtype.
            mapping: From channels of keys to channels of queries, float32 `[batch, q_heads, head_dim, head_dim]`.
            offset: Added to what is mapped, float32 `[batch, q_heads, head_dim]`.
            rotation: How position turns queries and keys.

        Returns:
            `[batch, q_heads, tokens, head_dim]` in the dtype of `query`; that of the last token is its own.

        Raises:
            ValueError: A shape or dtype is wrong.
        """

    @abc.abstractmethod
    def gather(self, rows: Rows, tier: int, field: str, out: Tensor, place: Tensor | None = None) -> None:
        """Reads a slot field of every row to where it is wanted.

        Args:
            rows: The rows of layers, one after the other.
            tier: The tier.
            field: The field's name.
            out: `[layers, batch, kv_heads, width]` of the field's dtype, contiguous in its last dimension; what lies
                beyond a row's length is left as it is.
            place: int32 `[batch of the rows]`, where in `out` each sequence goes, -1 for those that are not read;
                `None` = all, as they come.

        Raises:
            ValueError: A shape or dtype is wrong, or the tier or field does not exist.
        """

    @abc.abstractmethod
    def lowest(self, scores: Tensor, positions: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
        """The candidates with the lowest scores; of equal ones those with the lowest positions, then the first.

        Args:
            scores: float32 `[..., slots]`; NaN comes last.
            positions: int32 `[..., slots]`.
            candidates: bool `[..., slots]`.
            count: int64 `[...]`, how many of each row.

        Returns:
            bool `[..., slots]`.
        """

    @abc.abstractmethod
    def prices(self, scores: Tensor, candidates: Tensor, first: Tensor, step: Tensor, pages: int) -> Tensor:
        """The score of the `first + page * step`-th lowest candidate of each row, counted from 1.

        Args:
            scores: float32 `[..., slots]`; NaN comes last.
            candidates: bool `[..., slots]`.
            first: int64 `[...]`.
            step: int64 `[...]`.
            pages: How many are wanted of each row.

        Returns:
            float32 `[..., pages]`, infinite where a row has not as many candidates.
        """

    @abc.abstractmethod
    def holes(self, marks: Tensor, gone: int, before: Tensor, kept: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
        """The moves that bring the slots of each row that stay to its front: the last ones fill the holes.

        Args:
            marks: int8 `[rows, slots]`; what lies beyond a row's length is not looked at.
            gone: A slot goes where its mark is this.
            before: int32 `[rows]`, the lengths.
            kept: int32 `[rows]`, how many slots stay; a row that all stay of is not looked at.
            room: As many moves as there may be.

        Returns:
            Row, hole and slot that moves there, int32 `[n]` each.

        Raises:
            ValueError: A shape or dtype is wrong, or `kept` is not how many slots stay.
        """

    @abc.abstractmethod
    def places(self, marks: Tensor, wanted: int, lengths: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The slots with a mark, row after row.

        Args:
            marks: int8 `[rows, slots]`; what lies beyond a row's length is not looked at.
            wanted: The mark.
            lengths: int32 `[rows]`.
            counts: int32 `[rows]`, how many of each row; where that is 0, the row is not looked at.

        Returns:
            Row, slot, and how many such slots of the row come before, int32 `[n]` each.
        """

    @abc.abstractmethod
    def tally(self, targets: Tensor, filled: Tensor, columns: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Brings targets into order, and counts how many slots of each tier go to each tier.

        Args:
            targets: int8 `[batch, rows, slots]`: a tier, or below zero for what goes.
            filled: bool `[batch, rows, slots]`, false where there is no slot.
            columns: Columns are grouped by tier; where each tier begins, and where the last one ends.

        Returns:
            int8 `[batch, rows, slots]`, where no target lies above its slot's tier, and -1 where a slot goes or there
            is none; and int32 `[batch, rows, tiers, tiers]`.
        """

    @abc.abstractmethod
    def shares(
        self,
        importance: Tensor,
        filled: Tensor,
        protected: Tensor,
        tier: Tensor,
        pages: tuple[Tensor, Tensor],
        limits: tuple[Tensor, Tensor],
        hulls: Hulls,
        guesses: bool,
    ) -> Tensor:
        """The rate-distortion plan: a tier for every slot under one multiplier per sequence.

        Args:
            importance: float32 `[batch, rows, slots]`.
            filled: bool `[batch, rows, slots]`.
            protected: bool `[batch, rows, slots]`.
            tier: int64 `[slots]`.
            pages: Slots of a page in each tier, int64 `[rows, tiers]`, and its bytes, int64 `[rows]`.
            limits: Bytes allowed, int64 `[batch]`, and slots to leave room for, int64 `[batch, tiers]`.
            hulls: The tiers to use.
            guesses: Whether to evict nothing where every slot fits into the cheapest tier.

        Returns:
            int8 `[batch, rows, slots]`, -1 for what goes.
        """
