"""The operations every backend offers. Shapes, units and meanings are written here once.

Shapes use `batch`, `kv_heads`, `q_heads` (a multiple of `kv_heads`; query head `h` reads KV head
`h // (q_heads // kv_heads)`), `head_dim`, and `rows = batch * kv_heads`. Keys, values and queries are in the
layout's native dtype and may be non-contiguous (expanded too) except in their last dimension. Everything
happens in place; an operation that raises has changed nothing unless stated.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .layout import PageLayout
from .linear import LinearPlan
from .non_causal import non_causal_scores
from .plan_operations import PlanOperations
from .quantize import hadamard
from .rotation import Rotation
from .slot_sums import slot_sums
from .types import Logits, Rows, Tail

__all__ = ["Backend", "DecodePlan", "WindowScores"]


class WindowScores(NamedTuple):
    """Result of `Backend.window_scores`, float32.

    Args:
        past: Per tier `[batch, q_heads, width]`, in slot order, zero beyond a row's length.
        tail: `[batch, q_heads, capacity]`; capacity 0 without a tail.
        fresh: `[batch, q_heads, n_k]`.
    """

    past: list[Tensor]
    tail: Tensor
    fresh: Tensor


class DecodePlan(abc.ABC):
    """A prepared `decode_attention` over fixed rows and a fixed tail; made by `Backend.plan_decode`.

    The plan reads tables, lengths and slabs where they were when it was made: contents may change, but after
    one of those tensors was replaced a new plan is needed.
    """

    nbytes: int = 0  # of memory of its own, besides what it was made for
    step_nbytes: int = 0  # of memory that a step takes while it runs, where plans take theirs one after the other
    replays: bool = False  # whether a step that is captured into a graph of the device may be replayed

    @abc.abstractmethod
    def run(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        position: int,
        valid: Tensor | None = None,
        append: bool = True,
    ) -> Tensor:
        """One decoding step. Only what changes between steps is an argument.

        Args:
            q: `[batch, q_heads, 1, head_dim]`.
            k: New keys `[batch, kv_heads, 1, head_dim]`; ignored unless `append`.
            v: New values, like `k`.
            position: Logical position of the new token.
            valid: bool `[batch]`; where false the new token is padding: not stored, output zero.
            append: Whether to write `k` and `v` to the tail first.

        Returns:
            Output of attention, `[batch, 1, q_heads, head_dim]`.

        Raises:
            ValueError: A shape or dtype is wrong, or the tail is full.
        """

    def set_clock(self, position: int) -> None:
        """Gets ready for a step to be captured before one has been run.

        Args:
            position: Its logical position.

        Raises:
            NotImplementedError: Steps of this plan cannot be replayed.
        """
        raise NotImplementedError(f"steps of a {type(self).__name__} cannot be replayed")

    def note_steps(self, position: int, used: int) -> None:
        """Says where steps that were replayed have brought it, as nobody else tells, and the device is not asked.

        Args:
            position: Logical position of the next token.
            used: Slots of the longest row of the tail.

        Raises:
            NotImplementedError: Steps of this plan cannot be replayed.
        """
        raise NotImplementedError(f"steps of a {type(self).__name__} cannot be replayed")


class Backend(abc.ABC):
    """The operations on pages and the tail.

    Attributes:
        name: Short name: `"cpu-avx512vnni"`, `"cpu-avx2"`, `"cpu-scalar"`, `"cuda-sm_90a"` or `"reference"`.
        reason: Why this backend was picked, in a few words.
        page_order: Inner order of its pages: `"canonical"`, `"cpu"` (`include/page_layout.h`), or `"private"` for an
            order that does not go to files.
        plans: The arithmetic of plans in native code; `None` where plans do it in torch.
        decodes_on: Whether a decode plan goes on to be right when slots are packed or dropped, as long as tables, slabs
            and tail stay where they are.
    """

    name: str
    reason: str
    page_order: str = "private"
    plans: PlanOperations | None = None
    decodes_on: bool = False

    @abc.abstractmethod
    def append(self, tail: Tail, k: Tensor, v: Tensor, position: int, valid: Tensor | None = None) -> None:
        """Writes new tokens to the tail, from slot `tail.lengths[b]` on, and advances the lengths.

        The fields of the new slots are set to zero. Padding is skipped: it takes no slot.

        Args:
            tail: The tail.
            k: New keys `[batch, kv_heads, n, head_dim]`.
            v: New values, like `k`.
            position: Logical position of token 0; token `t` is at `position + t`, padding or not.
            valid: bool `[batch, n]`, false = padding; `None` = all valid.

        Raises:
            ValueError: A shape or dtype is wrong, or the tail has too few free slots.
        """

    @abc.abstractmethod
    def pack(
        self,
        rows: Rows,
        tier: int,
        k: Tensor,
        v: Tensor,
        counts: Tensor,
        index: Tensor | None = None,
        fields: Mapping[str, Tensor] | None = None,
    ) -> int | Tensor:
        """Quantises tokens into a tier, from slot `rows.lengths[tier][row]` on.

        Lengths are not updated: the caller does that. The pages must already be in the table.

        Args:
            rows: The rows to add to.
            tier: The tier.
            k: Keys `[batch, kv_heads, n, head_dim]`.
            v: Values, like `k`.
            counts: `int32 [batch, kv_heads]`: slots to add to each row.
            index: `int32 [batch, kv_heads, m]`: source token of each new slot; `None` = 0, 1, 2, ...
            fields: Slot fields by name, each `[batch, kv_heads, n]` by source token, of the field's dtype. All
                fields of the layout must be given.

        Returns:
            The number of slots whose range did not fit fp16 scales and was clamped; on a device that would have to
            be waited for it is an `int32 []` tensor there.

        Raises:
            ValueError: A shape, dtype, tier or field name is wrong.
        """

    @abc.abstractmethod
    def move(self, rows: Rows, tier: int, row: Tensor, dst: Tensor, src: Tensor) -> None:
        """Copies slots inside their row and tier: keys, values, parameters and fields together.

        Args:
            rows: The rows.
            tier: The tier.
            row: `int32 [n]`.
            dst: `int32 [n]` destination slots.
            src: `int32 [n]` source slots; no slot of a row is both a source and a destination, unless it is moved
                onto itself. A move may be named twice.

        Raises:
            ValueError: A shape or dtype or the tier is wrong.
        """

    @abc.abstractmethod
    def retier(self, rows: Rows, row: Tensor, src_tier: int, src: Tensor, dst_tier: int, dst: Tensor) -> int | Tensor:
        """Re-quantises slots into another tier of their row; fields are copied.

        Args:
            rows: The rows.
            row: `int32 [n]`.
            src_tier: The tier to read.
            src: `int32 [n]` slots to read.
            dst_tier: The tier to write.
            dst: `int32 [n]` slots to write; their pages must already be in the table.

        Returns:
            The number of slots whose range did not fit fp16 scales and was clamped; on a device that would have to
            be waited for it is an `int32 []` tensor there.

        Raises:
            ValueError: A shape or dtype or a tier is wrong.
        """

    @abc.abstractmethod
    def read_field(self, rows: Rows, tier: int, field: str, width: int) -> Tensor:
        """Reads a slot field of every row.

        Args:
            rows: The rows.
            tier: The tier.
            field: The field's name.
            width: Slots to read.

        Returns:
            `[rows, width]`, int32 for `"position"`, else float32; zero beyond a row's length.

        Raises:
            ValueError: The tier or field does not exist.
        """

    @abc.abstractmethod
    def write_field(self, rows: Rows, tier: int, field: str, values: Tensor) -> None:
        """Writes a slot field of every row; entries beyond a row's length are ignored.

        Args:
            rows: The rows.
            tier: The tier.
            field: The field's name.
            values: `[rows, width]` of the field's dtype.

        Raises:
            ValueError: A shape or dtype is wrong, or the tier or field does not exist.
        """

    @abc.abstractmethod
    def read_slots(self, rows: Rows, tier: int, width: int) -> tuple[Tensor, Tensor]:
        """Reads keys and values back: dequantised, un-rotated.

        Args:
            rows: The rows.
            tier: The tier.
            width: Slots to read.

        Returns:
            `(k, v)`, float32 `[rows, width, head_dim]` each; zero beyond a row's length.

        Raises:
            ValueError: The tier does not exist.
        """

    def slot_sums(self, rows: Rows, tier: int, chosen: Tensor) -> Tensor:
        """Sums up the keys and the values of chosen slots of every row, as `read_slots` gives them.

        This default reads all slots and runs plain torch.

        Args:
            rows: The rows.
            tier: The tier.
            chosen: bool `[rows, width]`; what lies beyond a row's length is ignored.

        Returns:
            float32 `[rows, 2, head_dim]`.

        Raises:
            ValueError: A shape or dtype is wrong, or the tier does not exist.
        """
        checks.check_tensor("chosen", chosen, (rows.count, None), torch.bool, rows.lengths[0].device, False)
        checks.check_width(rows, tier, chosen.shape[1], look=False)
        return slot_sums(rows, tier, chosen, self.read_slots)

    def decode_attention(
        self,
        q: Tensor,
        k_new: Tensor | None,
        v_new: Tensor | None,
        rows: Rows,
        tail: Tail,
        *,
        position: int,
        logits: Logits,
        valid: Tensor | None = None,
        append: bool = True,
        sum_field: str | None = None,
        square_field: str | None = None,
    ) -> Tensor:
        """Attention of one new token per sequence over all packed slots and the tail: a plan for a single step.

        Args:
            q: `[batch, q_heads, 1, head_dim]`.
            k_new: `[batch, kv_heads, 1, head_dim]`, written to the tail first when `append`, else ignored.
            v_new: Like `k_new`.
            rows: The packed slots.
            tail: The tail.
            position: Logical position of the new token.
            logits: How logits are made.
            valid: bool `[batch]`; where false the new token is padding: not stored, output zero.
            append: Whether to write `k_new`, `v_new` to the tail.
            sum_field: Field to which each slot's probability, summed over the group of query heads, is added.
            square_field: The same for the squared probability.

        Returns:
            `[batch, 1, q_heads, head_dim]` in the native dtype.

        Raises:
            ValueError: A shape, dtype or field name is wrong, or the tail is full.
        """
        checks.check_query(q, tail.k.shape[1], rows.layout, tail.k.device)
        plan = self.plan_decode(
            rows, tail, logits=logits, q_heads=q.shape[1], sum_field=sum_field, square_field=square_field
        )
        return plan.run(q, k_new, v_new, position, valid, append)

    @abc.abstractmethod
    def chunk_attention(
        self,
        q: Tensor,
        k_new: Tensor,
        v_new: Tensor,
        rows: Rows,
        tail: Tail | None,
        *,
        position: int,
        logits: Logits,
        key_position: int | None = None,
        allowed: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attention of a block of new tokens over all packed slots, the tail, and the new tokens themselves.

        Nothing is stored. Packed and tail slots are visible to every query (subject to the window); new keys
        up to the query's own position, or as `allowed` says.

        Args:
            q: `[batch, q_heads, n_q, head_dim]`; query `i` is at `position + i`.
            k_new: `[batch, kv_heads, n_k, head_dim]`; new key `j` is at `key_position + j`.
            v_new: Like `k_new`.
            rows: The packed slots.
            tail: The tail, or `None`.
            position: Logical position of query 0.
            logits: How logits are made; a sliding window holds for new keys as well.
            key_position: Logical position of new key 0; `None` = `position`.
            allowed: bool `[batch, n_q, n_k]`: which new keys a query may see, in place of causality.
            bias: float32 `[batch, n_q, n_k]`, added to the logits of new keys after the soft cap.

        Returns:
            `[batch, n_q, q_heads, head_dim]` in the native dtype; a query that sees nothing gives zeros.

        Raises:
            ValueError: A shape or dtype is wrong.
        """

    def reads_prompts(self, dtype: torch.dtype, tokens: int) -> bool:
        """Whether `chunk_attention` over new tokens alone is faster than torch's own attention, so that prompts go
        through it (`benchmarks/first_tokens.py` measures it).

        Args:
            dtype: Of queries, keys and values.
            tokens: New tokens.

        Returns:
            Whether it is, on this machine.
        """
        return False

    @abc.abstractmethod
    def window_scores(
        self,
        q: Tensor,
        k_new: Tensor,
        rows: Rows,
        tail: Tail | None,
        *,
        position: int,
        key_position: int,
        logits: Logits,
        power: int = 2,
        exclude: int = 0,
        query_valid: Tensor | None = None,
        key_valid: Tensor | None = None,
    ) -> WindowScores:
        """Sums `probability ** power` over the queries, for every key and query head, or takes the largest.

        With all queries of a chunk these are its column scores (the sums of the attention matrix's columns).
        New keys are seen causally. No queries x keys matrix is kept in memory.

        Args:
            q: `[batch, q_heads, n_q, head_dim]`; query `i` is at `position + i`.
            k_new: `[batch, kv_heads, n_k, head_dim]`; new key `j` is at `key_position + j`.
            rows: The packed slots.
            tail: The tail, or `None`.
            position: Logical position of query 0.
            key_position: Logical position of new key 0.
            logits: How logits are made.
            power: 1 or 2; 0 for the largest probability that any query gives.
            exclude: A query at `i` adds to the score of a key at `j` only if `i - j >= exclude`. The softmax is
                not affected. Packed slots without the field `"position"` are taken to be old enough.
            query_valid: bool `[batch, n_q]`; invalid queries add nothing.
            key_valid: bool `[batch, n_k]`; invalid new keys are not seen.

        Returns:
            The scores of packed slots, tail slots and new keys.

        Raises:
            ValueError: A shape or dtype is wrong, or `power` is not 0, 1 or 2.
        """

    def column_scores(
        self,
        q: Tensor,
        k_new: Tensor,
        rows: Rows,
        tail: Tail | None,
        *,
        position: int,
        key_position: int,
        logits: Logits,
        exclude: int = 0,
        query_valid: Tensor | None = None,
        key_valid: Tensor | None = None,
    ) -> tuple[WindowScores, WindowScores]:
        """Both powers of `window_scores`, which a backend may give for little more than the cost of one.

        Args:
            q: As in `window_scores`, like the others.
            k_new: New keys.
            rows: The packed slots.
            tail: The tail, or `None`.
            position: Logical position of query 0.
            key_position: Logical position of new key 0.
            logits: How logits are made.
            exclude: Distance from which on a query counts for a key.
            query_valid: Which queries add something.
            key_valid: Which new keys are seen.

        Returns:
            The sums of probabilities, and the sums of squared probabilities.

        Raises:
            ValueError: A shape or dtype is wrong.
        """
        first, second = (
            self.window_scores(
                q,
                k_new,
                rows,
                tail,
                position=position,
                key_position=key_position,
                logits=logits,
                power=power,
                exclude=exclude,
                query_valid=query_valid,
                key_valid=key_valid,
            )
            for power in (1, 2)
        )
        return first, second

    def non_causal_scores(
        self, q: Tensor, k_new: Tensor, *, logits: Logits, rotation: Rotation, valid: Tensor | None = None
    ) -> Tensor:
        """Squared probabilities that the tokens of a chunk would give each other if they came again.

        After Compactor (arXiv 2507.08143), whose non-causal scores let every query look at keys around it, later ones
        too. Query `i`, turned to the position behind the chunk (`rotation`; rounded to its dtype), gives key `j` the
        probability `p(i, j)`; key `j` gets the sum of `p(i, j) ** 2` over the queries up to 16 tokens away from it.
        The softmax runs over those keys, over the keys at and up to 16 tokens before `i` seen from `i` itself, over
        the first four tokens, and over 96 others evenly spaced, which stand for all that are further away than 16.
        Nothing stored is looked at, and no queries x keys matrix is kept in memory.

        This default runs plain torch in the dtype of `q`, on whatever device the tensors are: what the CUDA backend
        does with shapes that its kernel does not take.

        Args:
            q: `[batch, q_heads, n, head_dim]`.
            k_new: `[batch, kv_heads, n, head_dim]`.
            logits: How logits are made; the sliding window is not looked at: every token is taken to see every other.
            rotation: How position turns the queries.
            valid: bool `[batch, n]`, false = padding, which is on one side; `None` = all valid.

        Returns:
            float32 `[batch, q_heads, n]`, 0 for padding.

        Raises:
            ValueError: A shape or dtype is wrong.
        """
        checks.check_non_causal(q, k_new, logits, rotation, valid, k_new.device)
        return non_causal_scores(q, k_new, logits, rotation, valid, q.dtype)

    def plan_linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearPlan:
        """Prepares the product of few rows with the weight of a linear layer, for many steps.

        This default runs plain torch on whatever device the tensors are; the CPU backend has a kernel for bfloat16 and
        float16.

        Args:
            weight: `[out_features, in_features]`, contiguous in its last dimension.
            bias: `[out_features]` in the weight's dtype, or `None`.

        Returns:
            The plan.

        Raises:
            ValueError: A shape or dtype is wrong.
        """
        return LinearPlan(weight, bias, torch.float32)

    def hadamard(self, x: Tensor, block: int) -> Tensor:
        """Transforms vectors: values on their way into a store that keeps them rotated, and attention's output back.

        The transform is orthonormal and its own inverse (`quantize.hadamard`). Sums are made in float32, in the same
        order by all backends, and rounded once. This default runs plain torch.

        Args:
            x: `[batch, outer, inner, head_dim]` in float32, float16 or bfloat16.
            block: Size of a block, a power of two of at least 16 that divides `head_dim`.

        Returns:
            The transformed vectors, of the same shape and dtype, contiguous.

        Raises:
            ValueError: The shape, dtype or block is wrong.
        """
        checks.check_hadamard(x, block, x.device)
        return hadamard(x.float(), block).to(x.dtype)

    @abc.abstractmethod
    def to_canonical(self, layout: PageLayout, tier: int, pages: Tensor) -> Tensor:
        """Converts pages from this backend's inner order to the canonical one (`include/page_layout.h`).

        Args:
            layout: Their layout.
            tier: Their tier.
            pages: `uint8 [n, page_bytes]`.

        Returns:
            New pages of the same shape.

        Raises:
            ValueError: The shape, dtype or tier is wrong.
        """

    @abc.abstractmethod
    def from_canonical(self, layout: PageLayout, tier: int, pages: Tensor) -> Tensor:
        """Inverse of `to_canonical`, with the same arguments."""

    @abc.abstractmethod
    def plan_decode(
        self,
        rows: Rows,
        tail: Tail,
        *,
        logits: Logits,
        q_heads: int,
        sum_field: str | None = None,
        square_field: str | None = None,
        key_shift: Tensor | None = None,
        rotates_values: bool = False,
    ) -> DecodePlan:
        """Prepares `decode_attention` for many steps over the same rows and tail.

        Args:
            rows: The packed slots.
            tail: The tail.
            logits: How logits are made.
            q_heads: Number of query heads.
            sum_field: As in `decode_attention`.
            square_field: As in `decode_attention`.
            key_shift: `[batch, kv_heads, 1, head_dim]`, contiguous, native dtype: taken off every new key before it
                is written to the tail and attended to.
            rotates_values: Whether pages and tail hold rotated values (`hadamard`): new ones are rotated before they
                are written to the tail, and the output is rotated back.

        Returns:
            A plan for these rows and this tail.

        Raises:
            ValueError: A shape, dtype or field name is wrong.
        """
