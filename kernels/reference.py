"""Every operation on pages in plain torch, on any device: the oracle the native backends are tested against.

Pages are in canonical order (`include/page_layout.h`). Written to be read; fast enough for small models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .backend import Backend, DecodePlan, WindowScores
from .layout import POSITION, PageLayout
from .linear import LinearPlan
from .non_causal import non_causal_scores
from .quantize import dequantize, hadamard, pack_codes, quantize, unpack_codes
from .rotation import Rotation
from .types import Logits, Rows, Tail

__all__ = ["ReferenceBackend", "page_section"]

QUERY_BLOCK = 256  # queries handled at once, so that no full queries x keys matrix is made


# ------------------------------------------------------------------------------------------------- pages
def page_section(slab: Tensor, layout: PageLayout, tier: int, name: str) -> Tensor:
    """A view of one section of pages in canonical order.

    Args:
        slab: `uint8` `[pages, page_bytes]`.
        layout: Their layout.
        tier: Index of the tier they hold.
        name: `"keys"`, `"values"`, `"key_params"`, `"value_params"` or `"fields"`.

    Returns:
        `[pages, slots, width]`: keys and values have the width in elements (native) or bytes (codes), params are
        `(scale, offset)`, fields one int32 per field.
    """
    t = layout.tiers[tier]
    if name in ("keys", "values"):
        start, bits = (t.keys, t.key_bits) if name == "keys" else (t.values, t.value_bits)
        if t.native:
            width = layout.head_dim * layout.dtype.itemsize
            section = slab[:, start : start + t.slots * width].view(layout.dtype)
        else:
            width = layout.head_dim * bits // 8
            section = slab[:, start : start + t.slots * width]
        return section.unflatten(1, (t.slots, -1))
    if name in ("key_params", "value_params"):
        start = t.key_params if name == "key_params" else t.value_params
        return slab[:, start : start + t.slots * 4].view(torch.float16).unflatten(1, (2, t.slots)).transpose(1, 2)
    section = slab[:, t.fields : t.fields + t.slots * 4 * len(layout.fields)].view(torch.int32)
    return section.unflatten(1, (len(layout.fields), t.slots)).transpose(1, 2)


def _load(rows: Rows, tier: int, name: str, page: Tensor, slot: Tensor | None = None) -> Tensor:
    """A section of pages `[n]`: whole (`[n, slots, width]`), or of one slot each (`[n, width]`)."""
    slab_ids, inner = page.long() >> rows.slab_shift, page.long() & ((1 << rows.slab_shift) - 1)
    result: Tensor | None = None
    for i in slab_ids.unique().tolist():
        section = page_section(rows.slabs[i], rows.layout, tier, name)
        here = slab_ids == i
        part = section[inner[here]] if slot is None else section[inner[here], slot[here].long()]
        if result is None:
            result = part.new_empty((page.shape[0], *part.shape[1:]))
        result[here] = part
    if result is None:
        raise ValueError("no pages to load")
    return result


def _store(rows: Rows, tier: int, name: str, page: Tensor, slot: Tensor, values: Tensor) -> None:
    """Writes slots `[n]` of pages `[n]`; `values` `[n, width]`."""
    slab_ids, inner = page.long() >> rows.slab_shift, page.long() & ((1 << rows.slab_shift) - 1)
    for i in slab_ids.unique().tolist():
        here = slab_ids == i
        page_section(rows.slabs[i], rows.layout, tier, name)[inner[here], slot[here].long()] = values[here]


def _locate(rows: Rows, tier: int, row: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Page id and slot inside the page, for slots `[n]` of rows `[n]`."""
    slots = rows.layout.tiers[tier].slots
    return rows.tables[tier][row.long(), slot.long() // slots], slot.long() % slots


class _Slots(NamedTuple):
    """Slots as they are stored, decoded to float32 (keys still rotated), with their fields as int32."""

    k: Tensor
    v: Tensor
    fields: Tensor


def _decode(layout: PageLayout, tier: int, sections: Mapping[str, Tensor]) -> _Slots:
    t = layout.tiers[tier]
    if t.native:
        return _Slots(sections["keys"].float(), sections["values"].float(), sections["fields"])
    k, v = (
        dequantize(unpack_codes(sections[codes], bits), *sections[params].unbind(-1))
        for codes, params, bits in (("keys", "key_params", t.key_bits), ("values", "value_params", t.value_bits))
    )
    return _Slots(k, v, sections["fields"])


def _names(layout: PageLayout, tier: int) -> tuple[str, ...]:
    if layout.tiers[tier].native:
        return ("keys", "values", "fields")
    return ("keys", "key_params", "values", "value_params", "fields")


def _read(rows: Rows, tier: int, row: Tensor, slot: Tensor) -> _Slots:
    """Reads slots `[n]` of rows `[n]`."""
    page, inner = _locate(rows, tier, row, slot)
    names = _names(rows.layout, tier)
    return _decode(rows.layout, tier, {name: _load(rows, tier, name, page, inner) for name in names})


def _write(rows: Rows, tier: int, row: Tensor, slot: Tensor, slots: _Slots) -> int:
    """Quantises and writes slots `[n]` of rows `[n]`; keys come already rotated where the tier wants it."""
    t = rows.layout.tiers[tier]
    page, inner = _locate(rows, tier, row, slot)
    _store(rows, tier, "fields", page, inner, slots.fields)
    if t.native:
        _store(rows, tier, "keys", page, inner, slots.k.to(rows.layout.dtype))
        _store(rows, tier, "values", page, inner, slots.v.to(rows.layout.dtype))
        return 0
    overflow = torch.zeros_like(row, dtype=torch.bool)
    feedback = rows.key_feedback[row].float() if rows.key_feedback is not None and t.rotate_keys else None
    for x, bits, codes_name, params_name, how in (
        (slots.k, t.key_bits, "keys", "key_params", {"feedback": feedback}),
        (slots.v, t.value_bits, "values", "value_params", {"values": True}),
    ):
        codes, scale, offset, clamped = quantize(x, bits, **how)
        _store(rows, tier, codes_name, page, inner, pack_codes(codes, bits))
        _store(rows, tier, params_name, page, inner, torch.stack((scale, offset), dim=-1))
        overflow |= clamped
    return int(overflow.sum())


def _read_all(rows: Rows, tier: int, width: int, names: Sequence[str]) -> dict[str, Tensor]:
    """Sections of all rows in slot order, `[rows, width, ...]`, zero beyond each row's length."""
    slots = rows.layout.tiers[tier].slots
    device = rows.lengths[tier].device
    lengths = rows.lengths[tier].long().unsqueeze(1)
    pages = -(-width // slots)
    table = rows.tables[tier][:, :pages]
    used = torch.arange(table.shape[1], device=device) * slots < lengths  # [rows, pages]
    sections = {}
    for name in names:
        empty = page_section(
            torch.empty(1, rows.layout.page_bytes, dtype=torch.uint8, device=device), rows.layout, tier, name
        )
        whole = empty.new_zeros((rows.count, pages, *empty.shape[1:]))
        if bool(used.any()):
            whole[:, : used.shape[1]][used] = _load(rows, tier, name, table[used])
        section = whole.flatten(1, 2)[:, :width]
        beyond = torch.arange(width, device=device) >= lengths
        sections[name] = section.masked_fill(beyond.unsqueeze(-1), 0)
    return sections


# --------------------------------------------------------------------------------------------- attention
class _Keys(NamedTuple):
    """All keys a query may meet in one place. `[batch, kv_heads, n, ...]`; `position` is `None` = always seen."""

    k: Tensor
    v: Tensor
    position: Tensor | None
    stored: Tensor  # bool [batch, kv_heads, n]: the slot is in use


def _softmax(
    logits: Tensor, seen: Tensor, sinks: Tensor | None, evicted: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Probabilities over the last dimension, zero where nothing is seen, and those of evicted slots.

    `logits` are `[batch, kv_heads, group, n_q, n]`; `evicted` are `[batch, kv_heads, group, n_q]`, -inf for none.
    """
    lse = logits.masked_fill(~seen, float("-inf")).logsumexp(-1)
    if evicted is not None:
        lse = torch.where(evicted > float("-inf"), torch.logaddexp(lse, evicted), lse)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype))
    rest = None if evicted is None else torch.where(evicted > float("-inf"), (evicted - lse).exp(), 0.0)
    return torch.where(seen, (logits - lse.unsqueeze(-1)).exp(), 0.0), rest


class ReferenceBackend(Backend):
    """Plain torch on any device, pages in canonical order.

    Args:
        compute: The dtype of attention arithmetic: float32, or float64 to judge other backends.
        reason: Why this backend was picked.
    """

    name = "reference"
    page_order = "canonical"

    def __init__(self, compute: torch.dtype = torch.float32, reason: str = "asked for") -> None:
        if compute not in (torch.float32, torch.float64):
            raise ValueError(f"compute must be torch.float32 or torch.float64, got {compute}")
        self.compute = compute
        self.reason = reason

    # ------------------------------------------------------------------------------------------ storage
    def append(self, tail: Tail, k: Tensor, v: Tensor, position: int, valid: Tensor | None = None) -> None:
        device = tail.k.device
        checks.check_append(tail, k, v, valid, device)
        batch, n = k.shape[0], k.shape[2]
        if valid is None:
            valid = torch.ones(batch, n, dtype=torch.bool, device=device)
        b, t = valid.nonzero(as_tuple=True)
        slot = (tail.lengths.unsqueeze(1) + valid.cumsum(1) - 1)[b, t]
        tail.k[b, :, slot] = k[b, :, t]
        tail.v[b, :, slot] = v[b, :, t]
        tail.positions[b, slot] = (position + t).int()
        if tail.fields is not None:
            tail.fields[:, b, :, slot] = 0
        tail.lengths += valid.sum(1).int()

    def pack(
        self,
        rows: Rows,
        tier: int,
        k: Tensor,
        v: Tensor,
        counts: Tensor,
        index: Tensor | None = None,
        fields: Mapping[str, Tensor] | None = None,
    ) -> int:
        fields = fields or {}
        checks.check_pack(rows, tier, k, v, counts, index, fields, k.device)
        kv_heads = k.shape[1]
        if index is None:
            index = torch.arange(k.shape[2], device=k.device, dtype=torch.int32).expand(*k.shape[:3])
        new = torch.arange(index.shape[2], device=k.device) < counts.unsqueeze(-1)
        b, h, i = new.nonzero(as_tuple=True)
        if b.numel() == 0:
            return 0
        source = (b, h, index[b, h, i].long())
        keys = k[source].float()
        if rows.layout.tiers[tier].rotate_keys:
            keys = hadamard(keys, rows.layout.rotation_block)
        bits = [fields[name][source].view(torch.int32) for name in rows.layout.fields]
        field_bits = torch.stack(bits, -1) if bits else torch.empty(b.numel(), 0, dtype=torch.int32, device=k.device)
        row = b * kv_heads + h
        return _write(rows, tier, row, rows.lengths[tier][row] + i, _Slots(keys, v[source].float(), field_bits))

    def move(self, rows: Rows, tier: int, row: Tensor, dst: Tensor, src: Tensor) -> None:
        checks.check_rows(rows, row.device)
        checks.check_slots(rows, tier, row, row.device, dst=dst, src=src)
        if row.numel() == 0:
            return
        page, slot = _locate(rows, tier, row, src)
        moved = {name: _load(rows, tier, name, page, slot) for name in _names(rows.layout, tier)}
        page, slot = _locate(rows, tier, row, dst)
        for name, values in moved.items():
            _store(rows, tier, name, page, slot, values)

    def retier(self, rows: Rows, row: Tensor, src_tier: int, src: Tensor, dst_tier: int, dst: Tensor) -> int:
        checks.check_rows(rows, row.device)
        checks.check_slots(rows, src_tier, row, row.device, src=src)
        checks.check_slots(rows, dst_tier, row, row.device, dst=dst)
        if row.numel() == 0:
            return 0
        slots = _read(rows, src_tier, row, src)
        tiers = rows.layout.tiers
        if tiers[src_tier].rotate_keys != tiers[dst_tier].rotate_keys:  # the transform is its own inverse
            slots = slots._replace(k=hadamard(slots.k, rows.layout.rotation_block))
        return _write(rows, dst_tier, row, dst, slots)

    def read_field(self, rows: Rows, tier: int, field: str, width: int) -> Tensor:
        checks.check_rows(rows, rows.lengths[0].device)
        checks.check_width(rows, tier, width)
        i = rows.layout.field_index(field)
        values = _read_all(rows, tier, width, ["fields"])["fields"][..., i].contiguous()
        return values.view(rows.layout.field_dtype(field))

    def write_field(self, rows: Rows, tier: int, field: str, values: Tensor) -> None:
        device = rows.lengths[0].device
        checks.check_rows(rows, device)
        shape = (rows.count, None)
        checks.check_tensor("values", values, shape, rows.layout.field_dtype(field), device, contiguous=False)
        checks.check_width(rows, tier, values.shape[1])
        i = rows.layout.field_index(field)
        present = torch.arange(values.shape[1], device=device) < rows.lengths[tier].unsqueeze(1)
        row, slot = present.nonzero(as_tuple=True)
        if row.numel() == 0:
            return
        page, inner = _locate(rows, tier, row, slot)
        fields = _load(rows, tier, "fields", page, inner)
        fields[:, i] = values[row, slot].view(torch.int32)
        _store(rows, tier, "fields", page, inner, fields)

    def read_slots(self, rows: Rows, tier: int, width: int) -> tuple[Tensor, Tensor]:
        checks.check_rows(rows, rows.lengths[0].device)
        checks.check_width(rows, tier, width)
        slots = _decode(rows.layout, tier, _read_all(rows, tier, width, _names(rows.layout, tier)))
        if not rows.layout.tiers[tier].rotate_keys:
            return slots.k, slots.v
        return hadamard(slots.k, rows.layout.rotation_block), slots.v

    def to_canonical(self, layout: PageLayout, tier: int, pages: Tensor) -> Tensor:
        checks.check_pages(layout, tier, pages, pages.device)
        return pages.clone()

    def from_canonical(self, layout: PageLayout, tier: int, pages: Tensor) -> Tensor:
        checks.check_pages(layout, tier, pages, pages.device)
        return pages.clone()

    # ---------------------------------------------------------------------------------------- attention
    def _packed(self, rows: Rows, tier: int, batch: int) -> _Keys:
        width = rows.width(tier)
        k, v = (x.to(self.compute).unflatten(0, (batch, -1)) for x in self.read_slots(rows, tier, width))
        stored = torch.arange(width, device=k.device) < rows.lengths[tier].unsqueeze(1)
        position = None
        if POSITION in rows.layout.fields:
            position = self.read_field(rows, tier, POSITION, width).unflatten(0, (batch, -1))
        return _Keys(k, v, position, stored.unflatten(0, (batch, -1)))

    def _tail(self, tail: Tail) -> _Keys:
        batch, kv_heads, capacity, _ = tail.k.shape
        stored = torch.arange(capacity, device=tail.k.device) < tail.lengths.unsqueeze(1)
        shape = (batch, kv_heads, capacity)
        stored = stored.unsqueeze(1).expand(shape)
        unused = ~stored.unsqueeze(-1)  # may hold anything, NaN too
        k, v = (x.to(self.compute).masked_fill(unused, 0) for x in (tail.k, tail.v))
        return _Keys(k, v, tail.positions.unsqueeze(1).expand(shape), stored)

    def _fresh(self, k: Tensor, v: Tensor, position: int, valid: Tensor | None) -> _Keys:
        shape = k.shape[:3]
        stored = torch.ones(shape, dtype=torch.bool, device=k.device)
        if valid is not None:
            stored = valid.unsqueeze(1).expand(shape)
        positions = torch.arange(position, position + shape[2], device=k.device).expand(shape)
        return _Keys(k.to(self.compute), v.to(self.compute), positions, stored)

    @staticmethod
    def _visible(keys: _Keys, query: Tensor, window: int | None) -> Tensor:
        """bool `[batch, kv_heads, 1, n_q, n]`, causality among new keys not included; `query` `[n_q]`."""
        seen = keys.stored[:, :, None, None, :].expand(-1, -1, -1, query.shape[0], -1)
        if window is not None and keys.position is not None:
            seen = seen & (query[:, None] - keys.position[:, :, None, None, :] < window)
        return seen

    def _evicted(self, q: Tensor, rows: Rows, made: Logits) -> Tensor | None:
        """`[batch, kv_heads, group, n_q]`: the logits of what was evicted, as one slot, its number included."""
        if rows.evicted_means is None or rows.evicted_counts is None:
            return None
        keys, counts = (x.unflatten(0, (q.shape[0], -1)) for x in (rows.evicted_means[:, :1], rows.evicted_counts))
        return self._logits(q, keys.to(self.compute), made)[..., 0] + counts[..., None, None].to(self.compute).log()

    def _output(self, probability: Tensor, values: Tensor, evicted: Tensor | None, rows: Rows) -> Tensor:
        """`[batch, kv_heads, group, n_q, head_dim]` of values `[batch, kv_heads, 1, n, head_dim]`."""
        out = probability @ values
        if evicted is None or rows.evicted_means is None:
            return out
        means = rows.evicted_means[:, 1].unflatten(0, (out.shape[0], -1))[:, :, None, None].to(self.compute)
        return out + evicted.unsqueeze(-1) * means

    def _logits(self, q: Tensor, k: Tensor, made: Logits) -> Tensor:
        """`[batch, kv_heads, group, n_q, n]` of queries `[batch, q_heads, n_q, head_dim]`."""
        grouped = q.to(self.compute).unflatten(1, (k.shape[1], -1))
        logits = grouped @ k.unsqueeze(2).transpose(-1, -2) * made.scale
        return logits if made.softcap is None else made.softcap * torch.tanh(logits / made.softcap)

    @staticmethod
    def _grouped_sinks(sinks: Tensor | None, kv_heads: int) -> Tensor | None:
        """`[1, kv_heads, group, 1]`"""
        return None if sinks is None else sinks.view(1, kv_heads, -1, 1)

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
        layout, device = rows.layout, q.device
        batch, kv_heads = tail.k.shape[:2]
        checks.check_query(q, kv_heads, layout, device)
        checks.check_tensor("q", q, (batch, None, 1, layout.head_dim), layout.dtype, device)
        checks.check_rows(rows, device, kv_heads)
        checks.check_tail(tail, layout, batch, kv_heads, device)
        checks.check_heads(rows, batch, kv_heads, q.shape[1])
        checks.check_attention(layout, q.shape[1], rows, logits, device)
        checks.check_accumulators(layout, tail, sum_field, square_field)
        if valid is not None:
            checks.check_tensor("valid", valid, (batch,), torch.bool, device)
        if append:
            if k_new is None or v_new is None:
                raise ValueError("k_new and v_new are needed unless append is False")
            self.append(tail, k_new, v_new, position, None if valid is None else valid.unsqueeze(1))

        parts = [self._packed(rows, tier, batch) for tier in range(len(layout.tiers))] + [self._tail(tail)]
        query = torch.tensor([position], device=device)
        found = torch.cat([self._logits(q, part.k, logits) for part in parts], -1)
        seen = torch.cat([self._visible(part, query, logits.window) for part in parts], -1)
        evicted = self._evicted(q, rows, logits)
        if valid is not None:
            seen = seen & valid.view(batch, 1, 1, 1, 1)
            evicted = None if evicted is None else evicted.masked_fill(~valid.view(batch, 1, 1, 1), float("-inf"))
        probability, rest = _softmax(found, seen, self._grouped_sinks(logits.sinks, kv_heads), evicted)
        out = self._output(probability, torch.cat([part.v for part in parts], 2).unsqueeze(2), rest, rows)
        sizes = [part.k.shape[2] for part in parts]
        for field, power in ((sum_field, 1), (square_field, 2)):
            if field is None:
                continue
            added = probability.pow(power).sum(2)[:, :, 0].float().split(sizes, -1)
            for tier, part in enumerate(added[:-1]):
                old = self.read_field(rows, tier, field, part.shape[-1])
                self.write_field(rows, tier, field, old + part.flatten(0, 1))
            tail.float_fields()[layout.field_index(field)] += torch.where(parts[-1].stored, added[-1], 0.0)
        return out.flatten(1, 2).transpose(1, 2).to(layout.dtype)

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
        layout, device = rows.layout, q.device
        batch, kv_heads, n_k, head_dim = k_new.shape
        n_q = q.shape[2]
        self._check_block(q, k_new, rows, tail, logits)
        checks.check_tensor("v_new", v_new, k_new.shape, layout.dtype, device)
        for name, mask, dtype in (("allowed", allowed, torch.bool), ("bias", bias, torch.float32)):
            if mask is not None:
                checks.check_tensor(name, mask, (batch, n_q, n_k), dtype, device)
        key_position = position if key_position is None else key_position

        fresh = self._fresh(k_new, v_new, key_position, None)
        parts = [self._packed(rows, tier, batch) for tier in range(len(layout.tiers))]
        parts += [fresh] if tail is None else [self._tail(tail), fresh]
        values = torch.cat([part.v for part in parts], 2).unsqueeze(2)
        outs = []
        for start in range(0, n_q, QUERY_BLOCK):
            block = slice(start, min(start + QUERY_BLOCK, n_q))
            query = torch.arange(position, position + n_q, device=device)[block]
            found = [self._logits(q[:, :, block], part.k, logits) for part in parts]
            seen = [self._visible(part, query, logits.window) for part in parts]
            if bias is not None:
                found[-1] = found[-1] + bias[:, None, None, block].to(self.compute)
            if allowed is not None:
                seen[-1] = seen[-1] & allowed[:, None, None, block]
            else:
                seen[-1] = seen[-1] & (fresh.position[:, :, None, None, :] <= query[:, None])  # type: ignore[index]
            grouped_sinks = self._grouped_sinks(logits.sinks, kv_heads)
            evicted = self._evicted(q[:, :, block], rows, logits)
            probability, rest = _softmax(torch.cat(found, -1), torch.cat(seen, -1), grouped_sinks, evicted)
            outs.append(self._output(probability, values, rest, rows))
        if not outs:
            outs = [values.new_zeros(batch, kv_heads, q.shape[1] // kv_heads, 0, head_dim)]
        return torch.cat(outs, 3).flatten(1, 2).transpose(1, 2).to(layout.dtype)

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
        if power not in (0, 1, 2):
            raise ValueError(f"power must be 0, 1 or 2, got {power}")
        scores = self._scores(
            q,
            k_new,
            rows,
            tail,
            position=position,
            key_position=key_position,
            logits=logits,
            exclude=exclude,
            query_valid=query_valid,
            key_valid=key_valid,
        )
        return scores[power]

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
        _, first, second = self._scores(
            q,
            k_new,
            rows,
            tail,
            position=position,
            key_position=key_position,
            logits=logits,
            exclude=exclude,
            query_valid=query_valid,
            key_valid=key_valid,
        )
        return first, second

    def _scores(
        self,
        q: Tensor,
        k_new: Tensor,
        rows: Rows,
        tail: Tail | None,
        *,
        position: int,
        key_position: int,
        logits: Logits,
        exclude: int,
        query_valid: Tensor | None,
        key_valid: Tensor | None,
    ) -> list[WindowScores]:
        """The largest probability, the sum, and the sum of squares."""
        layout, device = rows.layout, q.device
        batch, kv_heads, n_k, _ = k_new.shape
        n_q = q.shape[2]
        self._check_block(q, k_new, rows, tail, logits)
        for name, mask, n in (("query_valid", query_valid, n_q), ("key_valid", key_valid, n_k)):
            if mask is not None:
                checks.check_tensor(name, mask, (batch, n), torch.bool, device)

        fresh = self._fresh(k_new, k_new, key_position, key_valid)
        parts = [self._packed(rows, tier, batch) for tier in range(len(layout.tiers))]
        parts += [fresh] if tail is None else [self._tail(tail), fresh]
        sizes = [part.k.shape[2] for part in parts]
        totals = torch.zeros(3, batch, q.shape[1], sum(sizes), dtype=self.compute, device=device)
        for start in range(0, n_q, QUERY_BLOCK):
            block = slice(start, min(start + QUERY_BLOCK, n_q))
            query = torch.arange(position, position + n_q, device=device)[block]
            found = torch.cat([self._logits(q[:, :, block], part.k, logits) for part in parts], -1)
            seen = [self._visible(part, query, logits.window) for part in parts]
            seen[-1] = seen[-1] & (fresh.position[:, :, None, None, :] <= query[:, None])  # type: ignore[index]
            sinks, evicted = self._grouped_sinks(logits.sinks, kv_heads), self._evicted(q[:, :, block], rows, logits)
            probability, _ = _softmax(found, torch.cat(seen, -1), sinks, evicted)
            if exclude > 0:
                old_enough = [
                    s if part.position is None else query[:, None] - part.position[:, :, None, None, :] >= exclude
                    for part, s in zip(parts, seen, strict=True)
                ]
                probability = torch.where(torch.cat(old_enough, -1), probability, 0.0)
            if query_valid is not None:
                probability = probability * query_valid[:, None, None, block, None]
            totals[0] = torch.maximum(totals[0], probability.amax(3).flatten(1, 2))
            totals[1] += probability.sum(3).flatten(1, 2)
            totals[2] += probability.square().sum(3).flatten(1, 2)
        return [_split_scores(total.float(), sizes, tail is not None) for total in totals]

    def non_causal_scores(
        self, q: Tensor, k_new: Tensor, *, logits: Logits, rotation: Rotation, valid: Tensor | None = None
    ) -> Tensor:
        checks.check_non_causal(q, k_new, logits, rotation, valid, k_new.device)
        return non_causal_scores(q, k_new, logits, rotation, valid, self.compute)

    def plan_linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearPlan:
        return LinearPlan(weight, bias, self.compute)

    def _check_block(
        self,
        q: Tensor,
        k: Tensor,
        rows: Rows,
        tail: Tail | None,
        logits: Logits,
    ) -> None:
        layout, device = rows.layout, q.device
        checks.check_block(q, k, rows, tail, device)
        checks.check_attention(layout, q.shape[1], rows, logits, device)

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
        return _ReferencePlan(self, rows, tail, q_heads, logits, (sum_field, square_field), key_shift, rotates_values)


def _split_scores(scores: Tensor, sizes: Sequence[int], has_tail: bool) -> WindowScores:
    """Scores `[batch, q_heads, sum(sizes)]` of the tiers, the tail if there is one, and the new keys."""
    *past, newest = scores.split(sizes, -1)
    tail = past.pop() if has_tail else scores[..., :0]
    return WindowScores(list(past), tail, newest)


class _ReferencePlan(DecodePlan):
    def __init__(
        self,
        backend: ReferenceBackend,
        rows: Rows,
        tail: Tail,
        q_heads: int,
        logits: Logits,
        fields: tuple[str | None, str | None],
        key_shift: Tensor | None,
        rotates_values: bool,
    ) -> None:
        batch, kv_heads = tail.k.shape[:2]
        device = tail.k.device
        checks.check_rows(rows, device, kv_heads)
        checks.check_tail(tail, rows.layout, batch, kv_heads, device)
        checks.check_heads(rows, batch, kv_heads, q_heads)
        checks.check_attention(rows.layout, q_heads, rows, logits, device)
        checks.check_accumulators(rows.layout, tail, *fields)
        checks.check_key_shift(key_shift, rows.layout, batch, kv_heads, device)
        self.backend, self.rows, self.tail, self.q_heads, self.logits = backend, rows, tail, q_heads, logits
        (self.sum_field, self.square_field), self.key_shift, self.rotates_values = fields, key_shift, rotates_values

    def run(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        position: int,
        valid: Tensor | None = None,
        append: bool = True,
    ) -> Tensor:
        if q.shape[1] != self.q_heads:
            raise ValueError(f"this plan is for {self.q_heads} query heads, got {q.shape[1]}")
        if k is not None and self.key_shift is not None:
            k = k - self.key_shift
        if v is not None and self.rotates_values:
            v = self.backend.hadamard(v, self.rows.layout.rotation_block)
        out = self.backend.decode_attention(
            q,
            k,
            v,
            self.rows,
            self.tail,
            position=position,
            logits=self.logits,
            valid=valid,
            append=append,
            sum_field=self.sum_field,
            square_field=self.square_field,
        )
        return self.backend.hadamard(out, self.rows.layout.rotation_block) if self.rotates_values else out
