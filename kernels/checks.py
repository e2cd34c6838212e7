"""Checks of arguments, shared by the backends, so that a mistake is a `ValueError` and never a crash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .abi import FEEDBACK_RANK
from .layout import DTYPES, MAX_HEAD_DIM, POSITION, SLOT_MULTIPLE, PageLayout
from .rotation import Rotation
from .types import Logits, Rows, Tail

LAST_POSITION = 2**31 - 2  # positions, and the number of tokens seen, are int32


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    dtype: torch.dtype,
    device: torch.device,
    contiguous: bool = True,
) -> None:
    """Checks shape (`None` = any size), dtype, device and, unless told otherwise, a contiguous last dimension."""
    got = tensor.shape
    same = len(got) == len(shape)
    if same and got != shape:  # plain loops: this runs many times per operation
        for size, want in zip(got, shape, strict=True):
            if want is not None and size != want:
                same = False
    if not same:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(got)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    if contiguous and tensor.stride(-1) != 1 and got[-1] > 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")


def bounds(values: Tensor) -> tuple[int, int]:
    """The least and the largest of some integers; a device is waited for once."""
    low, high = values.aminmax()
    if values.is_cpu:
        return int(low), int(high)
    low, high = torch.stack((low, high)).tolist()
    return low, high


def check_tier(layout: PageLayout, tier: int) -> None:
    """Checks a tier index."""
    if not 0 <= tier < len(layout.tiers):
        raise ValueError(f"tier must be between 0 and {len(layout.tiers) - 1}, got {tier}")


def check_rows(rows: Rows, device: torch.device, kv_heads: int | None = None) -> None:
    """Checks the tables, lengths and slabs of rows; of the slabs the first and last, and no page ids."""
    layout = rows.layout
    tiers = len(layout.tiers)
    if len(rows.tables) != tiers or len(rows.lengths) != tiers:
        raise ValueError(
            f"rows need one table and one lengths per tier ({tiers}), got {len(rows.tables)} and {len(rows.lengths)}"
        )
    count = rows.lengths[0].shape[0]
    for tier in range(tiers):
        check_tensor(f"lengths[{tier}]", rows.lengths[tier], (count,), torch.int32, device)
        check_tensor(f"tables[{tier}]", rows.tables[tier], (count, None), torch.int32, device)
    for slab in rows.slabs[:1] + rows.slabs[-1:]:  # there may be thousands, all made alike by the arena
        check_tensor("a slab", slab, (None, layout.page_bytes), torch.uint8, device)
        if slab.shape[0] > 1 and slab.stride(0) != layout.page_bytes:
            raise ValueError(f"slabs must be contiguous, got strides {slab.stride()}")
    check_tensor("slab_addresses", rows.slab_addresses, (len(rows.slabs),), torch.int64, device)
    if rows.key_feedback is not None:
        shape = (count, 2, FEEDBACK_RANK, layout.head_dim)
        check_tensor("key_feedback", rows.key_feedback, shape, torch.bfloat16, device)
        if not rows.key_feedback.is_contiguous():
            raise ValueError(f"key_feedback must be contiguous, got strides {rows.key_feedback.stride()}")
    if (rows.evicted_means is None) != (rows.evicted_counts is None):
        raise ValueError("evicted_means and evicted_counts must be given together")
    if rows.evicted_means is not None and rows.evicted_counts is not None:
        check_tensor("evicted_means", rows.evicted_means, (count, 2, layout.head_dim), layout.dtype, device)
        check_tensor("evicted_counts", rows.evicted_counts, (count,), torch.int32, device)
        if not (rows.evicted_means.is_contiguous() and rows.evicted_counts.is_contiguous()):
            raise ValueError("evicted_means and evicted_counts must be contiguous")
    if not 0 <= rows.slab_shift < 31:
        raise ValueError(f"slab_shift must be between 0 and 30, got {rows.slab_shift}")
    if kv_heads is not None and (kv_heads == 0 or count % kv_heads):
        raise ValueError(f"rows must be batch x kv_heads: {count} rows do not divide by {kv_heads} KV heads")


def check_tail(tail: Tail, layout: PageLayout, batch: int, kv_heads: int, device: torch.device) -> None:
    """Checks a tail against the layout and the batch."""
    shape = (batch, kv_heads, None, layout.head_dim)
    check_tail_tensors(tail, layout.dtype, shape, len(layout.fields), device)


def check_tail_tensors(
    tail: Tail, dtype: torch.dtype, shape: Sequence[int | None], n_fields: int | None, device: torch.device
) -> None:
    """Checks that the tensors of a tail agree with each other, and with what is given (`None` = anything)."""
    check_tensor("tail.k", tail.k, shape, dtype, device)
    batch, kv_heads, capacity, _ = tail.k.shape
    check_tensor("tail.v", tail.v, tail.k.shape, dtype, device)
    check_tensor("tail.lengths", tail.lengths, (batch,), torch.int32, device)
    check_tensor("tail.positions", tail.positions, (batch, capacity), torch.int32, device)
    together = {"k": tail.k, "v": tail.v, "positions": tail.positions}
    if tail.fields is not None:
        check_tensor("tail.fields", tail.fields, (n_fields, batch, kv_heads, capacity), torch.int32, device)
        together["fields"] = tail.fields
    for name, tensor in together.items():
        if not tensor.is_contiguous():
            raise ValueError(f"tail.{name} must be contiguous, got strides {tensor.stride()}")


def check_key_shift(
    key_shift: Tensor | None, layout: PageLayout, batch: int, kv_heads: int, device: torch.device
) -> None:
    """Checks what is to be taken off new keys."""
    if key_shift is not None:
        check_tensor("key_shift", key_shift, (batch, kv_heads, 1, layout.head_dim), layout.dtype, device)
        if not key_shift.is_contiguous():
            raise ValueError(f"key_shift must be contiguous, got strides {key_shift.stride()}")


def check_room(tail: Tail, new: int, valid: Tensor | None) -> None:
    """Checks that the tail has a free slot for every valid new token."""
    added = new if valid is None else valid.sum(-1).to(tail.lengths.dtype)
    if tail.lengths.numel() and int((tail.lengths + added).max()) > tail.capacity:
        raise ValueError(
            f"the tail is full: it holds {tail.capacity} slots per row and has up to {int(tail.lengths.max())} in "
            f"use, so {new} more tokens do not fit; pack first"
        )


def check_append(tail: Tail, k: Tensor, v: Tensor, valid: Tensor | None, device: torch.device) -> None:
    """Checks the arguments of `append`."""
    check_tensor("tail.k", tail.k, (None, None, None, None), tail.k.dtype, device)
    batch, kv_heads, capacity, head_dim = tail.k.shape
    if tail.k.dtype not in DTYPES:
        raise ValueError(f"the tail must be {', '.join(map(str, DTYPES))}, got {tail.k.dtype}")
    check_tail_tensors(tail, tail.k.dtype, (batch, kv_heads, capacity, head_dim), None, device)
    check_tensor("k", k, (batch, kv_heads, None, head_dim), tail.k.dtype, device)
    check_tensor("v", v, k.shape, tail.k.dtype, device)
    if valid is not None:
        check_tensor("valid", valid, (batch, k.shape[2]), torch.bool, device, contiguous=False)
    check_room(tail, k.shape[2], valid)


def check_packed_width(rows: Rows, tier: int, lengths: Tensor) -> None:
    """Checks that the table of a tier has an entry for every page up to the given lengths `[rows]`."""
    least, most = bounds(lengths) if lengths.numel() else (0, 0)
    capacity = rows.tables[tier].shape[1] * rows.layout.tiers[tier].slots
    if most > capacity or least < 0:
        raise ValueError(f"slots must be between 0 and {capacity} (table of tier {tier}), got {most}")


def check_positions(position: int, tokens: int) -> None:
    """Checks that positions from one on can be counted in 32 bits."""
    if not 0 <= position <= LAST_POSITION + 1 - tokens:
        raise ValueError(f"positions must be between 0 and {LAST_POSITION}, got {tokens} tokens from {position} on")


def check_pack(
    rows: Rows,
    tier: int,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    index: Tensor | None,
    fields: Mapping[str, Tensor],
    device: torch.device,
    look: bool = True,
) -> None:
    """Checks the arguments of `pack`; counts and indices themselves only if it may `look` at them."""
    layout = rows.layout
    check_tier(layout, tier)
    check_tensor("k", k, (None, None, None, layout.head_dim), layout.dtype, device)
    check_tensor("v", v, k.shape, layout.dtype, device)
    batch, kv_heads, tokens = k.shape[:3]
    check_rows(rows, device, kv_heads)
    if rows.count != batch * kv_heads:
        raise ValueError(f"k has {batch} x {kv_heads} rows, the tables have {rows.count}")
    if counts.shape != (batch, kv_heads) or counts.dtype != torch.int32 or counts.device != device:
        raise ValueError(
            f"counts must be int32 [{batch}, {kv_heads}] on {device}, got {counts.dtype} {list(counts.shape)}"
        )
    available = tokens
    if index is not None:
        check_tensor("index", index, (batch, kv_heads, None), torch.int32, device, contiguous=False)
        available = index.shape[2]
    if counts.numel() and look:
        least, most = bounds(counts)
        if least < 0 or most > available:
            raise ValueError(f"counts must be between 0 and {available}, got {least} to {most}")
        if index is not None and most:
            used = (
                index
                if least == available
                else index.masked_fill(torch.arange(available, device=device) >= counts.unsqueeze(-1), 0)
            )
            low, high = bounds(used)
            if low < 0 or high >= tokens:
                raise ValueError(f"index must be between 0 and {tokens - 1}, got {low} to {high}")
    if look:
        check_packed_width(rows, tier, rows.lengths[tier] + counts.reshape(-1))
    if set(fields) != set(layout.fields):
        raise ValueError(f"pack needs exactly the slot fields {layout.fields}, got {tuple(fields)}")
    for name, values in fields.items():
        shape = (batch, kv_heads, tokens)
        check_tensor(f"field {name!r}", values, shape, layout.field_dtype(name), device, contiguous=False)


def check_slots(rows: Rows, tier: int, row: Tensor, device: torch.device, look: bool = True, **slots: Tensor) -> None:
    """Checks lists of slots `[n]` of rows `[n]` in one tier; their values only if it may `look` at them."""
    check_tier(rows.layout, tier)
    check_tensor("row", row, (None,), torch.int32, device)
    n = row.shape[0]
    for name, slot in slots.items():
        check_tensor(name, slot, (n,), torch.int32, device)
    if n == 0 or not look:
        return
    low, high = bounds(row)
    if low < 0 or high >= rows.count:
        raise ValueError(f"row must be between 0 and {rows.count - 1}, got {low} to {high}")
    for slot in slots.values():
        low, high = bounds(slot)
        if low < 0:
            raise ValueError(f"slots must not be negative, got {low}")
        check_packed_width(rows, tier, torch.tensor([high + 1]))


def check_width(rows: Rows, tier: int, width: int, look: bool = True) -> None:
    """Checks the number of slots to read, and against the table the lengths if it may `look` at them."""
    check_tier(rows.layout, tier)
    if width < 0:
        raise ValueError(f"width must not be negative, got {width}")
    if look:
        check_packed_width(rows, tier, rows.lengths[tier])


def check_query(q: Tensor, kv_heads: int, layout: PageLayout, device: torch.device) -> None:
    """Checks queries `[batch, q_heads, n_q, head_dim]`."""
    check_tensor("q", q, (None, None, None, layout.head_dim), layout.dtype, device)
    if kv_heads == 0 or q.shape[1] % kv_heads or q.shape[1] == 0:
        raise ValueError(f"q_heads must be a multiple of kv_heads ({kv_heads}), got {q.shape[1]}")


def check_heads(rows: Rows, batch: int, kv_heads: int, q_heads: int) -> None:
    """Checks that rows, batch and heads agree."""
    if rows.count != batch * kv_heads:
        raise ValueError(f"the tail has {batch} x {kv_heads} rows, the tables have {rows.count}")
    if q_heads <= 0 or kv_heads <= 0 or q_heads % kv_heads:
        raise ValueError(f"q_heads must be a multiple of kv_heads ({kv_heads}), got {q_heads}")


def check_attention(layout: PageLayout, q_heads: int, rows: Rows, logits: Logits, device: torch.device) -> None:
    """Checks how logits are made, for every operation that attends."""
    window = logits.window
    check_logits(logits, q_heads, device)
    if window is not None:
        if window <= 0:
            raise ValueError(f"window must be positive or None, got {window}")
        if POSITION not in layout.fields and any(rows.width(tier) for tier in range(len(layout.tiers))):
            raise ValueError(f"a window needs the slot field {POSITION!r}; this layout has {layout.fields}")


def check_logits(logits: Logits, q_heads: int, device: torch.device) -> None:
    """Checks the soft cap and the sinks."""
    if logits.softcap is not None and not logits.softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {logits.softcap}")
    if logits.sinks is not None:
        check_tensor("sinks", logits.sinks, (q_heads,), torch.float32, device)


def check_non_causal(
    q: Tensor, k: Tensor, logits: Logits, rotation: Rotation, valid: Tensor | None, device: torch.device
) -> None:
    """Checks the arguments of `non_causal_scores`."""
    if k.dtype not in DTYPES:
        raise ValueError(f"k_new must be {', '.join(map(str, DTYPES))}, got {k.dtype}")
    check_tensor("k_new", k, (None, None, None, None), k.dtype, device)
    batch, kv_heads, n, head_dim = k.shape
    if head_dim % SLOT_MULTIPLE or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be a multiple of {SLOT_MULTIPLE} up to {MAX_HEAD_DIM}, got {head_dim}")
    check_tensor("q", q, (batch, None, n, head_dim), k.dtype, device)
    if kv_heads == 0 or q.shape[1] % kv_heads or q.shape[1] == 0:
        raise ValueError(f"q_heads must be a multiple of kv_heads ({kv_heads}), got {q.shape[1]}")
    check_logits(logits, q.shape[1], device)
    check_rotation(rotation, head_dim)
    if valid is not None:
        check_tensor("valid", valid, (batch, n), torch.bool, device, contiguous=False)


def check_rotation(rotation: Rotation, head_dim: int) -> None:
    """Checks that a rotation turns channels that there are."""
    check_tensor("rotation.inv_freq", rotation.inv_freq, (None,), torch.float32, torch.device("cpu"), contiguous=False)
    if rotation.start < 0 or rotation.start + rotation.width > head_dim:
        raise ValueError(
            f"rotation must turn channels of 0 to {head_dim - 1}, got {rotation.width} from {rotation.start} on"
        )


def check_linear(weight: Tensor, bias: Tensor | None) -> None:
    """Checks the weight and bias of a linear layer."""
    if weight.dtype not in DTYPES:
        raise ValueError(f"weight must be {', '.join(map(str, DTYPES))}, got {weight.dtype}")
    check_tensor("weight", weight, (None, None), weight.dtype, weight.device)
    if not weight.shape[1]:
        raise ValueError(f"weight must have in_features, got {list(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias, weight.shape[:1], weight.dtype, weight.device)


def check_linear_input(x: Tensor, weight: Tensor, most_rows: int) -> None:
    """Checks what is to be multiplied with the weight of a linear layer."""
    in_features = weight.shape[1]
    if not x.dim() or x.shape[-1] != in_features or not 0 < x.numel() <= most_rows * in_features:
        raise ValueError(f"x must have shape [..., {in_features}] with 1 to {most_rows} rows, got {list(x.shape)}")
    check_tensor("x", x, x.shape, weight.dtype, weight.device, contiguous=False)


def check_hadamard(x: Tensor, block: int, device: torch.device) -> None:
    """Checks vectors to be transformed, and the blocks."""
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    check_tensor("x", x, (None, None, None, None), x.dtype, device)
    head_dim = x.shape[3]
    if head_dim > MAX_HEAD_DIM or block < SLOT_MULTIPLE or block & (block - 1) or head_dim % block:
        raise ValueError(
            f"block must be a power of two of at least {SLOT_MULTIPLE} that divides head_dim, which is at most "
            f"{MAX_HEAD_DIM}; got {block} for {head_dim}"
        )


def check_accumulators(layout: PageLayout, tail: Tail | None, *fields: str | None) -> None:
    """Checks the fields that decoding adds probabilities to."""
    for name in fields:
        if name is None:
            continue
        layout.field_index(name)
        if layout.field_dtype(name) != torch.float32:
            raise ValueError(f"probabilities cannot be added to the int32 field {name!r}")
        if tail is not None and tail.fields is None:
            raise ValueError(f"the tail has no slot fields, but {name!r} is to be updated")


def check_pages(layout: PageLayout, tier: int, pages: Tensor, device: torch.device) -> None:
    """Checks whole pages `[n, page_bytes]`."""
    check_tier(layout, tier)
    check_tensor("pages", pages, (None, layout.page_bytes), torch.uint8, device)


def check_block(q: Tensor, k: Tensor, rows: Rows, tail: Tail | None, device: torch.device) -> None:
    """Checks a block of queries and new keys against the rows and the tail."""
    layout = rows.layout
    check_tensor("k_new", k, (None, None, None, layout.head_dim), layout.dtype, device)
    batch, kv_heads = k.shape[:2]
    check_query(q, kv_heads, layout, device)
    check_tensor("q", q, (batch, None, None, layout.head_dim), layout.dtype, device)
    check_rows(rows, device, kv_heads)
    if rows.count != batch * kv_heads:
        raise ValueError(f"k_new has {batch} x {kv_heads} rows, the tables have {rows.count}")
    if tail is not None:
        check_tail(tail, layout, batch, kv_heads, device)
