"""The CUDA backend: arguments checked here, kernels started through a `Launcher`.

Kernels take the structs of `include/abi.h` by value, filled as for the CPU; pages are in canonical order. Nothing in a
decoding step waits for the device, unless the tail may be full.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import abi, checks
from ..arguments import fill_logits, fill_rows, fill_strides, fill_tail, pointer
from ..backend import Backend, DecodePlan, WindowScores
from ..layout import DTYPES, PageLayout
from ..rotation import Rotation
from ..types import Logits, Rows, Tail
from .chunk import aligned, launch_chunk, launch_scores, takes_chunks
from .hadamard import launch_hadamard
from .launch import Launcher
from .non_causal import launch_non_causal, takes_non_causal
from .nvrtc import NvrtcError
from .plan import GeneralDecodePlan, TensorCoreDecodePlan, fits_tensor_cores

__all__ = ["CudaBackend"]

WARPS = 4  # of a block, one slot each
THREADS = 32 * WARPS
SUMMED = 256  # slots that a block sums some of up
TILE = 16  # query rows, or slots, that a block of the attention kernels works on


def blocks_for(items: int, each: int) -> int:
    """Blocks needed for `items`, `each` per block."""
    return -(-items // each)


class CudaBackend(Backend):
    """The operations on CUDA tensors. Holds no state of a cache; see `Backend` for the operations.

    Shapes, dtypes and places of arguments are checked; counts, rows and slots are not looked at, as that would make the
    host wait for the device.

    Args:
        launcher: Where kernels run.
    """

    page_order = "canonical"

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.name = launcher.name
        self.reason = launcher.reason

    def _device(self, tensor: Tensor) -> torch.device:
        if tensor.device.type != self.launcher.device_type:
            raise ValueError(f"{self.name} works on {self.launcher.device_type} tensors, got one on {tensor.device}")
        return tensor.device

    def _launch(self, kernel: str, blocks: int, device: torch.device, *arguments: ctypes._CData) -> None:
        self.launcher.launch(kernel, blocks, THREADS, arguments, device)

    # ------------------------------------------------------------------------------------------ storage
    def append(self, tail: Tail, k: Tensor, v: Tensor, position: int, valid: Tensor | None = None) -> None:
        device = self._device(tail.k)
        checks.check_append(tail, k, v, valid, device)
        valid = None if valid is None else valid.contiguous()
        batch, kv_heads, n_k, head_dim = k.shape
        c = abi.KvcAppend(position=position, batch=batch, kv_heads=kv_heads, n_k=n_k, head_dim=head_dim)
        fill_tail(c.tail, tail)
        c.k, c.v, c.valid = k.data_ptr(), v.data_ptr(), pointer(valid)
        fill_strides(c, "k", k)
        fill_strides(c, "v", v)
        c.dtype = DTYPES[k.dtype]
        c.n_fields = 0 if tail.fields is None else tail.fields.shape[0]
        self._launch("kvc_append", batch * n_k, device, c, _address(None))
        self.launcher.launch("kvc_advance", batch if n_k else 0, 32, (c, _address(None)), device)

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
        fields = fields or {}
        device = self._device(k)
        checks.check_pack(rows, tier, k, v, counts, index, fields, device, look=False)
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
        most = k.shape[2] if index is None else index.shape[2]  # counts are on the device
        overflow = torch.zeros((), dtype=torch.int32, device=device)
        blocks = rows.count * blocks_for(most, WARPS)
        self._launch("kvc_pack", blocks, device, layout.c, c, ctypes.c_int32(most), _address(overflow))
        return 0 if layout.tiers[tier].native else overflow

    def move(self, rows: Rows, tier: int, row: Tensor, dst: Tensor, src: Tensor) -> None:
        device = self._device(row)
        checks.check_rows(rows, device)
        checks.check_slots(rows, tier, row, device, look=False, dst=dst, src=src)
        c = abi.KvcMove(tier=tier, n=row.shape[0])
        fill_rows(c, rows)
        c.row, c.dst, c.src = row.data_ptr(), dst.data_ptr(), src.data_ptr()
        self._launch("kvc_move", blocks_for(row.shape[0], WARPS), device, rows.layout.c, c)

    def retier(self, rows: Rows, row: Tensor, src_tier: int, src: Tensor, dst_tier: int, dst: Tensor) -> int | Tensor:
        device = self._device(row)
        checks.check_rows(rows, device)
        checks.check_slots(rows, src_tier, row, device, look=False, src=src)
        checks.check_slots(rows, dst_tier, row, device, look=False, dst=dst)
        c = abi.KvcRetier(src_tier=src_tier, dst_tier=dst_tier, n=row.shape[0])
        fill_rows(c, rows)
        c.row, c.dst, c.src = row.data_ptr(), dst.data_ptr(), src.data_ptr()
        overflow = torch.zeros((), dtype=torch.int32, device=device)
        blocks = blocks_for(row.shape[0], WARPS)
        self._launch("kvc_retier", blocks, device, rows.layout.c, c, _address(overflow))
        return 0 if rows.layout.tiers[dst_tier].native else overflow

    def _fields(self, rows: Rows, tier: int, field: str, values: Tensor, write: bool) -> None:
        c = abi.KvcFields(tier=tier, field=rows.layout.field_index(field), write=write, stride=values.shape[1])
        fill_rows(c, rows)
        c.values = values.data_ptr()
        blocks = rows.count * blocks_for(values.shape[1], THREADS)
        self._launch("kvc_fields", blocks, values.device, rows.layout.c, c)

    def read_field(self, rows: Rows, tier: int, field: str, width: int) -> Tensor:
        device = self._device(rows.lengths[0])
        checks.check_rows(rows, device)
        checks.check_width(rows, tier, width, look=False)
        values = torch.zeros(rows.count, width, dtype=rows.layout.field_dtype(field), device=device)
        self._fields(rows, tier, field, values, write=False)
        return values

    def write_field(self, rows: Rows, tier: int, field: str, values: Tensor) -> None:
        device = self._device(rows.lengths[0])
        checks.check_rows(rows, device)
        shape = (rows.count, None)
        checks.check_tensor("values", values, shape, rows.layout.field_dtype(field), device, contiguous=False)
        checks.check_width(rows, tier, values.shape[1], look=False)
        self._fields(rows, tier, field, values.contiguous(), write=True)

    def read_slots(self, rows: Rows, tier: int, width: int) -> tuple[Tensor, Tensor]:
        device = self._device(rows.lengths[0])
        checks.check_rows(rows, device)
        checks.check_width(rows, tier, width, look=False)
        k, v = (torch.zeros(rows.count, width, rows.layout.head_dim, device=device) for _ in range(2))
        c = abi.KvcDense(tier=tier, stride=width)
        fill_rows(c, rows)
        c.k, c.v = k.data_ptr(), v.data_ptr()
        self._launch("kvc_dense", rows.count * blocks_for(width, WARPS), device, rows.layout.c, c)
        return k, v

    def slot_sums(self, rows: Rows, tier: int, chosen: Tensor) -> Tensor:
        device = self._device(rows.lengths[0])
        checks.check_rows(rows, device)
        checks.check_tensor("chosen", chosen, (rows.count, None), torch.bool, device, contiguous=False)
        width = chosen.shape[1]
        checks.check_width(rows, tier, width, look=False)
        chosen = chosen.contiguous()
        parts = blocks_for(width, SUMMED)
        sums = torch.empty(rows.count, parts, 2, rows.layout.head_dim, device=device)
        c = abi.KvcSlotSums(tier=tier, stride=width)
        fill_rows(c, rows)
        c.chosen, c.sums = chosen.data_ptr(), sums.data_ptr()
        self._launch("kvc_slot_sums", rows.count * parts, device, rows.layout.c, c)
        return sums.sum(1)

    def hadamard(self, x: Tensor, block: int) -> Tensor:
        device = self._device(x)
        checks.check_hadamard(x, block, device)
        return launch_hadamard(self.launcher, x, block)

    def to_canonical(self, layout: PageLayout, tier: int, pages: Tensor) -> Tensor:
        checks.check_pages(layout, tier, pages, self._device(pages))
        return pages.clone()  # pages are in that order already (pages.cuh says why)

    def from_canonical(self, layout: PageLayout, tier: int, pages: Tensor) -> Tensor:
        return self.to_canonical(layout, tier, pages)

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
        device = self._device(tail.k)
        checks.check_rows(rows, device, kv_heads)
        checks.check_tail(tail, layout, batch, kv_heads, device)
        checks.check_heads(rows, batch, kv_heads, q_heads)
        checks.check_attention(layout, q_heads, rows, logits, device)
        checks.check_accumulators(layout, tail, sum_field, square_field)
        checks.check_key_shift(key_shift, layout, batch, kv_heads, device)
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
        c.out_b, c.out_h = q_heads * layout.head_dim, layout.head_dim
        kind = TensorCoreDecodePlan if fits_tensor_cores(layout) else GeneralDecodePlan
        return kind(self.launcher, c, rows, tail, logits, key_shift)

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
        device = self._device(k_new)
        checks.check_block(q, k_new, rows, tail, device)
        checks.check_attention(layout, q.shape[1], rows, logits, device)
        checks.check_tensor("v_new", v_new, k_new.shape, layout.dtype, device)
        batch, _, n_k, head_dim = k_new.shape
        q_heads, n_q = q.shape[1:3]
        if allowed is not None:
            checks.check_tensor("allowed", allowed, (batch, n_q, n_k), torch.bool, device, contiguous=False)
            allowed = allowed.contiguous()
        if bias is not None:
            checks.check_tensor("bias", bias, (batch, n_q, n_k), torch.float32, device, contiguous=False)
            bias = bias.contiguous()
        out = torch.empty(batch, n_q, q_heads, head_dim, dtype=layout.dtype, device=device)
        if takes_chunks(layout):
            q, k_new, v_new = aligned(q), aligned(k_new), aligned(v_new)
        c = self._chunk_arguments(q, k_new, rows, tail, position, key_position, logits)
        c.v, c.out = v_new.data_ptr(), out.data_ptr()
        fill_strides(c, "v", v_new)
        c.allowed, c.bias = pointer(allowed), pointer(bias)
        c.out_b, c.out_t, c.out_h, _ = out.stride()
        self._launch_chunk(c, rows, device, None)
        return out

    @staticmethod
    def _chunk_arguments(
        q: Tensor,
        k: Tensor,
        rows: Rows,
        tail: Tail | None,
        position: int,
        key_position: int | None,
        logits: Logits,
    ) -> abi.KvcChunk:
        batch, kv_heads, n_k, _ = k.shape
        c = abi.KvcChunk(
            position=position,
            key_position=position if key_position is None else key_position,
            batch=batch,
            kv_heads=kv_heads,
            group=q.shape[1] // kv_heads,
            n_q=q.shape[2],
            n_k=n_k,
        )
        fill_rows(c, rows)
        fill_tail(c.tail, tail)
        fill_logits(c, logits, rows.layout)
        c.q, c.k = q.data_ptr(), k.data_ptr()
        fill_strides(c, "q", q)
        fill_strides(c, "k", k)
        return c

    def _launch_chunk(self, c: abi.KvcChunk, rows: Rows, device: torch.device, key_valid: Tensor | None) -> None:
        layout = rows.layout
        if takes_chunks(layout):
            launch_chunk(self.launcher, c, rows, device, key_valid)
            return
        blocks = c.batch * c.kv_heads * blocks_for(c.n_q * c.group, TILE)
        self._launch("kvc_chunk", blocks, device, layout.c, c, _address(key_valid), _address(None))

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
        masks = (query_valid, key_valid)
        places = (position, key_position)
        (scores,) = self._scores((power,), q, k_new, rows, tail, places, logits, exclude, masks)
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
        masks = (query_valid, key_valid)
        places = (position, key_position)
        first, second = self._scores((1, 2), q, k_new, rows, tail, places, logits, exclude, masks)
        return first, second

    def non_causal_scores(
        self, q: Tensor, k_new: Tensor, *, logits: Logits, rotation: Rotation, valid: Tensor | None = None
    ) -> Tensor:
        checks.check_non_causal(q, k_new, logits, rotation, valid, self._device(k_new))
        if takes_non_causal(k_new, logits):
            try:
                return launch_non_causal(self.launcher, q, k_new, logits, rotation, valid)
            except NvrtcError as error:
                warnings.warn(f"kvcompress_hf looks a second time in plain torch, which is slow; {error}")
        return super().non_causal_scores(q, k_new, logits=logits, rotation=rotation, valid=valid)

    def _scores(
        self,
        powers: Sequence[int],
        q: Tensor,
        k_new: Tensor,
        rows: Rows,
        tail: Tail | None,
        places: tuple[int, int],
        logits: Logits,
        exclude: int,
        masks: tuple[Tensor | None, Tensor | None],
    ) -> list[WindowScores]:
        layout = rows.layout
        device = self._device(k_new)
        checks.check_block(q, k_new, rows, tail, device)
        checks.check_attention(layout, q.shape[1], rows, logits, device)
        batch, kv_heads, n_k, _ = k_new.shape
        q_heads, n_q = q.shape[1:3]
        for name, mask, n in (("query_valid", masks[0], n_q), ("key_valid", masks[1], n_k)):
            if mask is not None:
                checks.check_tensor(name, mask, (batch, n), torch.bool, device, contiguous=False)
        query_valid, key_valid = (None if mask is None else mask.contiguous() for mask in masks)
        capacity = 0 if tail is None else tail.capacity
        widths = [rows.width(tier) for tier in range(len(layout.tiers))]
        results = [
            WindowScores(
                [torch.zeros(batch, q_heads, width, device=device) for width in widths],
                torch.zeros(batch, q_heads, capacity, device=device),
                torch.zeros(batch, q_heads, n_k, device=device),
            )
            for _ in powers
        ]
        on_tensor_cores = takes_chunks(layout)
        if on_tensor_cores:
            q, k_new = aligned(q), aligned(k_new)
        # First every query's log-sum-exp, then the sums key by key.
        lse = torch.empty(batch, q_heads, n_q, device=device)
        first = self._chunk_arguments(q, k_new, rows, tail, *places, logits)
        first.lse = lse.data_ptr()
        self._launch_chunk(first, rows, device, key_valid)
        c = abi.KvcScores(exclude=exclude, powers=sum(power or abi.LARGEST for power in powers))
        for name in (field[0] for field in abi.KvcScores._fields_):
            if hasattr(first, name):
                setattr(c, name, getattr(first, name))
        fill_logits(c, logits, layout, exclude)
        c.query_valid, c.key_valid = pointer(query_valid), pointer(key_valid)
        for power, scores in zip(powers, results, strict=True):
            sums = c.square if power == 2 else c.sum
            for tier, past in enumerate(scores.past):
                sums.past[tier] = past.data_ptr()
            sums.tail, sums.fresh = scores.tail.data_ptr(), scores.fresh.data_ptr()
        for tier, width in enumerate(widths):
            c.past_stride[tier] = width  # and 0 for an empty tier, whatever torch says
        if on_tensor_cores:
            launch_scores(self.launcher, c, layout, (*widths, capacity, n_k), device, lse)
            return results
        tiles = sum(blocks_for(width, TILE) for width in (*widths, capacity, n_k))
        blocks = batch * kv_heads * tiles if n_q else 0
        self._launch("kvc_scores", blocks, device, layout.c, c, _address(lse), ctypes.c_int32(tiles))
        return results


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(pointer(tensor))
