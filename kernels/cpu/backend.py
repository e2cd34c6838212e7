"""The CPU backend: `libkvc_cpu.so` through ctypes.

Arguments are checked here and handed over in one pre-packed struct per operation (`include/abi.h`); the native
code trusts shapes and strides. What only a look at the data tells, it checks itself before it writes anything: page
ids and lengths against the slabs, room in the tail, positions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import abi, checks
from ..arguments import fill_logits, fill_rows, fill_strides, fill_tail, pointer
from ..backend import Backend, DecodePlan, WindowScores
from ..layout import DTYPES, PageLayout
from ..library import load_library
from ..linear import LinearPlan
from ..rotation import Rotation
from ..types import Logits, Rows, Tail
from .linear import CpuLinearPlan
from .plans import CpuPlanOperations

__all__ = ["CpuBackend"]

CPU = torch.device("cpu")


def instruction_sets() -> tuple[str, ...]:
    """Names of the instruction sets that this build has code for and this machine can run, best first."""
    library = load_library()
    return tuple(
        library.kvc_isa_name(i).decode() for i in range(library.kvc_isa_count()) if library.kvc_isa_available(i)
    )


def _refusal(operation: str, status: int) -> ValueError | MemoryError:
    if status == abi.KVC_BAD_PAGE:
        return ValueError(f"{operation}: a table names a page that is in none of the slabs, or a row is longer than it")
    if status == abi.KVC_NO_MEMORY:
        return MemoryError(f"{operation}: the machine has no memory left")
    return ValueError(f"the native {operation} refused its arguments (status {status})")


class CpuBackend(Backend):
    """The native operations on the CPU. Holds no state; see `Backend` for the operations.

    Args:
        isa: Instruction set to use: `"avx512vnni"`, `"avx2"` or `"scalar"`; `None` = the best this machine has.

    Raises:
        ValueError: The machine or the build does not have the instruction set.
        ImportError: The native library was not built.
    """

    page_order = "cpu"
    decodes_on = True  # lengths are read, and tables checked, at each step

    def __init__(self, isa: str | None = None) -> None:
        library = load_library()
        names = [library.kvc_isa_name(i).decode() for i in range(library.kvc_isa_count())]
        available = instruction_sets()
        if isa is not None and isa not in available:
            raise ValueError(f"isa must be one of {', '.join(available)} on this machine, got {isa!r}")
        self.isa = isa or available[0]
        self.name = f"cpu-{self.isa}"
        self.reason = "asked for" if isa else f"best instruction set here of {', '.join(names)}"
        self._isa = names.index(self.isa)
        self._library = library
        self.plans = CpuPlanOperations(self._call)

    def _call(self, operation: str, args: ctypes.Structure) -> None:
        status = getattr(self._library, f"kvc_{operation}")(self._isa, ctypes.addressof(args))
        if status != abi.KVC_OK:
            raise _refusal(operation, status)

    # ------------------------------------------------------------------------------------------ storage
    def append(self, tail: Tail, k: Tensor, v: Tensor, position: int, valid: Tensor | None = None) -> None:
        checks.check_append(tail, k, v, valid, CPU)
        batch, kv_heads, n_k, head_dim = k.shape
        checks.check_positions(position, n_k)
        valid = None if valid is None else valid.contiguous()
        c = abi.KvcAppend(position=position, batch=batch, kv_heads=kv_heads, n_k=n_k, head_dim=head_dim)
        fill_tail(c.tail, tail)
        c.k, c.v, c.valid = k.data_ptr(), v.data_ptr(), pointer(valid)
        fill_strides(c, "k", k)
        fill_strides(c, "v", v)
        c.dtype = DTYPES[k.dtype]
        c.n_fields = 0 if tail.fields is None else tail.fields.shape[0]
        self._call("append", c)

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
        checks.check_pack(rows, tier, k, v, counts, index, fields, CPU)
        layout = rows.layout
        c = abi.KvcPack(tier=tier, batch=k.shape[0], kv_heads=k.shape[1], n_fields=len(layout.fields))
        fill_rows(c, rows)
        c.k, c.v = k.data_ptr(), v.data_ptr()
        fill_strides(c, "k", k)
        fill_strides(c, "v", v)
        if index is not None:
            index = index if index.stride(2) == 1 else index.contiguous()
            c.index, c.index_b, c.index_h = index.data_ptr(), index.stride(0), index.stride(1)
        c.count, c.count_b, c.count_h = counts.data_ptr(), counts.stride(0), counts.stride(1)
        ordered = [fields[name] for name in layout.fields]
        ordered = [values if values.stride(2) == 1 else values.contiguous() for values in ordered]  # kept alive
        for i, values in enumerate(ordered):
            c.field[i], c.field_b[i], c.field_h[i] = values.data_ptr(), values.stride(0), values.stride(1)
        self._call("pack", c)
        return c.overflow

    def move(self, rows: Rows, tier: int, row: Tensor, dst: Tensor, src: Tensor) -> None:
        checks.check_rows(rows, CPU)
        checks.check_slots(rows, tier, row, CPU, dst=dst, src=src)
        c = abi.KvcMove(tier=tier, n=row.shape[0])
        fill_rows(c, rows)
        c.row, c.dst, c.src = row.data_ptr(), dst.data_ptr(), src.data_ptr()
        self._call("move", c)

    def retier(self, rows: Rows, row: Tensor, src_tier: int, src: Tensor, dst_tier: int, dst: Tensor) -> int:
        checks.check_rows(rows, CPU)
        checks.check_slots(rows, src_tier, row, CPU, src=src)
        checks.check_slots(rows, dst_tier, row, CPU, dst=dst)
        c = abi.KvcRetier(src_tier=src_tier, dst_tier=dst_tier, n=row.shape[0])
        fill_rows(c, rows)
        c.row, c.dst, c.src = row.data_ptr(), dst.data_ptr(), src.data_ptr()
        self._call("retier", c)
        return c.overflow

    def _fields(self, rows: Rows, tier: int, field: str, values: Tensor, write: bool) -> None:
        c = abi.KvcFields(tier=tier, field=rows.layout.field_index(field), write=write, stride=values.shape[1])
        fill_rows(c, rows)
        c.values = values.data_ptr()
        self._call("fields", c)

    def read_field(self, rows: Rows, tier: int, field: str, width: int) -> Tensor:
        checks.check_rows(rows, CPU)
        checks.check_width(rows, tier, width)
        values = torch.zeros(rows.count, width, dtype=rows.layout.field_dtype(field))
        self._fields(rows, tier, field, values, write=False)
        return values

    def write_field(self, rows: Rows, tier: int, field: str, values: Tensor) -> None:
        checks.check_rows(rows, CPU)
        shape = (rows.count, None)
        checks.check_tensor("values", values, shape, rows.layout.field_dtype(field), CPU, contiguous=False)
        checks.check_width(rows, tier, values.shape[1])
        self._fields(rows, tier, field, values.contiguous(), write=True)

    def read_slots(self, rows: Rows, tier: int, width: int) -> tuple[Tensor, Tensor]:
        checks.check_rows(rows, CPU)
        checks.check_width(rows, tier, width)
        k, v = (torch.zeros(rows.count, width, rows.layout.head_dim) for _ in range(2))
        c = abi.KvcDense(tier=tier, stride=width)
        fill_rows(c, rows)
        c.k, c.v = k.data_ptr(), v.data_ptr()
        self._call("dense", c)
        return k, v

    def slot_sums(self, rows: Rows, tier: int, chosen: Tensor) -> Tensor:
        checks.check_rows(rows, CPU)
        checks.check_tensor("chosen", chosen, (rows.count, None), torch.bool, CPU, contiguous=False)
        checks.check_width(rows, tier, chosen.shape[1])
        chosen = chosen.contiguous()
        sums = torch.zeros(rows.count, 2, rows.layout.head_dim)
        c = abi.KvcSlotSums(tier=tier, stride=chosen.shape[1])
        fill_rows(c, rows)
        c.chosen, c.sums = chosen.data_ptr(), sums.data_ptr()
        self._call("slot_sums", c)
        return sums

    def hadamard(self, x: Tensor, block: int) -> Tensor:
        checks.check_hadamard(x, block, CPU)
        out = torch.empty(x.shape, dtype=x.dtype)
        batch, outer, inner, head_dim = x.shape
        x_b, x_h, x_t, _ = x.stride()
        address, to, dtype = x.data_ptr(), out.data_ptr(), DTYPES[x.dtype]
        self._call("hadamard", abi.KvcHadamard(address, x_b, x_h, x_t, to, batch, outer, inner, head_dim, block, dtype))
        return out

    def _convert(self, layout: PageLayout, tier: int, pages: Tensor, to_canonical: bool) -> Tensor:
        checks.check_pages(layout, tier, pages, CPU)
        pages = pages.contiguous()
        result = torch.empty_like(pages)
        c = abi.KvcConvert(tier=tier, n=pages.shape[0], to_canonical=to_canonical)
        c.layout = ctypes.addressof(layout.c)
        c.from_pages, c.to_pages = pages.data_ptr(), result.data_ptr()
        self._call("convert", c)
        return result

    def to_canonical(self, layout: PageLayout, tier: int, pages: Tensor) -> Tensor:
        return self._convert(layout, tier, pages, True)

    def from_canonical(self, layout: PageLayout, tier: int, pages: Tensor) -> Tensor:
        return self._convert(layout, tier, pages, False)

    # ---------------------------------------------------------------------------------------- attention
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
        layout = rows.layout
        batch, kv_heads = tail.k.shape[:2]
        checks.check_rows(rows, CPU, kv_heads)
        checks.check_tail(tail, layout, batch, kv_heads, CPU)
        checks.check_heads(rows, batch, kv_heads, q_heads)
        checks.check_attention(layout, q_heads, rows, logits, CPU)
        checks.check_accumulators(layout, tail, sum_field, square_field)
        checks.check_key_shift(key_shift, layout, batch, kv_heads, CPU)
        for tier in range(len(layout.tiers)):
            checks.check_packed_width(rows, tier, rows.lengths[tier])
        c = abi.KvcDecode(
            batch=batch,
            kv_heads=kv_heads,
            group=q_heads // kv_heads,
            sum_field=-1 if sum_field is None else layout.field_index(sum_field),
            square_field=-1 if square_field is None else layout.field_index(square_field),
            rotates_values=rotates_values,
        )
        fill_rows(c, rows)
        fill_tail(c.tail, tail)
        fill_logits(c, logits, layout)
        c.key_shift = pointer(key_shift)
        c.out_b, c.out_h = q_heads * layout.head_dim, layout.head_dim
        return _CpuDecodePlan(self._library.kvc_decode, self._isa, c, rows, tail, (logits, key_shift))

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
        layout = rows.layout
        checks.check_block(q, k_new, rows, tail, CPU)
        checks.check_attention(layout, q.shape[1], rows, logits, CPU)
        checks.check_tensor("v_new", v_new, k_new.shape, layout.dtype, CPU)
        batch, kv_heads, n_k, head_dim = k_new.shape
        q_heads, n_q = q.shape[1:3]
        checks.check_positions(position, n_q)
        checks.check_positions(position if key_position is None else key_position, n_k)
        if allowed is not None:
            checks.check_tensor("allowed", allowed, (batch, n_q, n_k), torch.bool, CPU, contiguous=False)
            allowed = allowed.contiguous()
        if bias is not None:
            checks.check_tensor("bias", bias, (batch, n_q, n_k), torch.float32, CPU, contiguous=False)
            bias = bias.contiguous()
        out = torch.empty(batch, n_q, q_heads, head_dim, dtype=layout.dtype)
        if out.numel():
            c = abi.KvcChunk(
                position=position,
                key_position=position if key_position is None else key_position,
                batch=batch,
                kv_heads=kv_heads,
                group=q_heads // kv_heads,
                n_q=n_q,
                n_k=n_k,
            )
            fill_rows(c, rows)
            fill_tail(c.tail, tail)
            c.q, c.k, c.v = q.data_ptr(), k_new.data_ptr(), v_new.data_ptr()
            for name, tensor in (("q", q), ("k", k_new), ("v", v_new)):
                fill_strides(c, name, tensor)
            fill_logits(c, logits, layout)
            c.out, c.allowed, c.bias = out.data_ptr(), pointer(allowed), pointer(bias)
            c.out_b, c.out_t, c.out_h, _ = out.stride()
            self._call("chunk", c)
        return out

    def reads_prompts(self, dtype: torch.dtype, tokens: int) -> bool:
        # With AVX2 torch is as fast in float32 and bfloat16, and with a few tokens everywhere.
        faster = self.isa.startswith("avx512") or (self.isa == "avx2" and dtype is torch.float16)
        return faster and tokens >= 32

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
        (scores,) = self._scores(
            (power,),
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
        return scores

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
        first, second = self._scores(
            (1, 2),
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
        powers: Sequence[int],
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
        layout = rows.layout
        checks.check_block(q, k_new, rows, tail, CPU)
        checks.check_attention(layout, q.shape[1], rows, logits, CPU)
        batch, kv_heads, n_k, _ = k_new.shape
        q_heads, n_q = q.shape[1:3]
        checks.check_positions(position, n_q)
        checks.check_positions(key_position, n_k)
        if query_valid is not None:
            checks.check_tensor("query_valid", query_valid, (batch, n_q), torch.bool, CPU, contiguous=False)
            query_valid = query_valid.contiguous()
        if key_valid is not None:
            checks.check_tensor("key_valid", key_valid, (batch, n_k), torch.bool, CPU, contiguous=False)
            key_valid = key_valid.contiguous()
        widths = [rows.width(tier) for tier in range(len(layout.tiers))]
        results = [
            WindowScores(
                [torch.zeros(batch, q_heads, width) for width in widths],
                torch.zeros(batch, q_heads, 0 if tail is None else tail.capacity),
                torch.zeros(batch, q_heads, n_k),
            )
            for _ in powers
        ]
        if q.numel() == 0:
            return results
        c = abi.KvcScores(
            position=position,
            key_position=key_position,
            exclude=exclude,
            batch=batch,
            kv_heads=kv_heads,
            group=q_heads // kv_heads,
            n_q=n_q,
            n_k=n_k,
            powers=sum(power or abi.LARGEST for power in powers),
        )
        fill_rows(c, rows)
        fill_tail(c.tail, tail)
        fill_logits(c, logits, layout, exclude)
        c.q, c.k = q.data_ptr(), k_new.data_ptr()
        fill_strides(c, "q", q)
        fill_strides(c, "k", k_new)
        c.query_valid, c.key_valid = pointer(query_valid), pointer(key_valid)
        for power, scores in zip(powers, results, strict=True):
            sums = c.square if power == 2 else c.sum
            for tier, past in enumerate(scores.past):
                sums.past[tier], c.past_stride[tier] = past.data_ptr(), past.stride(1)
            sums.tail, sums.fresh = scores.tail.data_ptr(), scores.fresh.data_ptr()
        self._call("scores", c)
        return results

    def non_causal_scores(
        self, q: Tensor, k_new: Tensor, *, logits: Logits, rotation: Rotation, valid: Tensor | None = None
    ) -> Tensor:
        checks.check_non_causal(q, k_new, logits, rotation, valid, CPU)
        batch, kv_heads, n, head_dim = k_new.shape
        q_heads = q.shape[1]
        scores = torch.zeros(batch, q_heads, n)
        if not scores.numel():
            return scores
        inv_freq, valid = rotation.inv_freq.contiguous(), None if valid is None else valid.contiguous()
        c = abi.KvcNonCausal(
            scale=logits.scale,
            softcap=logits.softcap or 0.0,
            pairs=inv_freq.numel(),
            start=rotation.start,
            interleaved=rotation.interleaved,
            dtype=DTYPES[k_new.dtype],
            head_dim=head_dim,
            batch=batch,
            kv_heads=kv_heads,
            group=q_heads // kv_heads,
            n=n,
        )
        c.q, c.k, c.valid = q.data_ptr(), k_new.data_ptr(), pointer(valid)
        c.inv_freq, c.sinks, c.scores = inv_freq.data_ptr(), pointer(logits.sinks), scores.data_ptr()
        fill_strides(c, "q", q)
        fill_strides(c, "k", k_new)
        self._call("non_causal", c)
        return scores

    def plan_linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearPlan:
        if weight.dtype not in (torch.bfloat16, torch.float16) or weight.device != CPU:
            return super().plan_linear(weight, bias)
        return CpuLinearPlan(self._library.kvc_linear, self._isa, weight, bias)


class _CpuDecodePlan(DecodePlan):
    """The hot path: everything but pointers and strides of the new token is already in the struct."""

    def __init__(
        self,
        function: ctypes._FuncPointer,
        isa: int,
        c: abi.KvcDecode,
        rows: Rows,
        tail: Tail,
        others: tuple[Logits, Tensor | None],
    ) -> None:
        self._function, self._isa, self._c, self._address = function, isa, c, ctypes.addressof(c)
        self._kept = (rows, tail, others, *rows.tables, *rows.lengths, *rows.slabs, rows.slab_addresses, tail.k, tail.v)
        self._kept_tail = (tail.lengths, tail.positions, tail.fields)  # the struct holds bare addresses of all these
        batch, kv_heads, head_dim = c.batch, c.kv_heads, rows.layout.head_dim
        q_heads = kv_heads * c.group
        self._dtype = rows.layout.dtype
        self._q_shape = torch.Size((batch, q_heads, 1, head_dim))
        self._k_shape = torch.Size((batch, kv_heads, 1, head_dim))
        # The quickest way to an output is to ask for one like something of its shape: the tail, where there is one.
        shape, empty = (batch, 1, q_heads, head_dim), not tail.k.numel()
        like = torch.empty(1, dtype=self._dtype) if empty else tail.k
        self._like = like.as_strided(shape, (0, 0, 0, 0))
        self.nbytes = like.untyped_storage().nbytes() if empty else 0
        # What the struct holds from the last step: only what differs is written.
        self._strides: tuple = ()
        self._appends = self._padded = False

    def run(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        position: int,
        valid: Tensor | None = None,
        append: bool = True,
    ) -> Tensor:
        c, dtype = self._c, self._dtype
        if q.shape != self._q_shape or q.dtype is not dtype or not q.is_cpu:
            checks.check_tensor("q", q, self._q_shape, dtype, CPU)
        c.q = q.data_ptr()
        if append:
            if k is None or v is None:
                raise ValueError("k and v are needed unless append is False")
            if k.shape != self._k_shape or k.dtype is not dtype or not k.is_cpu:
                checks.check_tensor("k", k, self._k_shape, dtype, CPU)
            if v.shape != self._k_shape or v.dtype is not dtype or not v.is_cpu:
                checks.check_tensor("v", v, self._k_shape, dtype, CPU)
            c.k, c.v = k.data_ptr(), v.data_ptr()
            strides = (q.stride(), k.stride(), v.stride())
        else:
            strides = (q.stride(), (0, 0, 0, 1), (0, 0, 0, 1))
        if strides != self._strides:
            if any(stride[3] != 1 for stride in strides):
                raise ValueError(f"q, k and v must be contiguous in their last dimension, got strides {strides}")
            (c.q_b, c.q_h, *_), (c.k_b, c.k_h, *_), (c.v_b, c.v_h, *_) = strides
            self._strides = strides
        if not 0 <= position <= checks.LAST_POSITION:
            checks.check_positions(position, 1)
        c.position = position
        if append is not self._appends:
            c.append = self._appends = append
        if valid is None:
            if self._padded:
                c.valid, self._padded = None, False
        else:
            self._padded = True
            checks.check_tensor("valid", valid, self._q_shape[:1], torch.bool, CPU)
            c.valid = valid.data_ptr()
        out = torch.empty_like(self._like)
        c.out = out.data_ptr()
        status = self._function(self._isa, self._address)
        if status:
            if status == abi.KVC_TAIL_FULL:
                raise ValueError(f"the tail is full ({c.tail.capacity} slots per row): pack first")
            raise _refusal("decode", status)
        return out
