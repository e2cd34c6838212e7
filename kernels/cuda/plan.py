"""Decoding steps on CUDA: everything that stays the same between steps is prepared once."""

from __future__ import annotations

import abc
import ctypes

import torch
from torch import Tensor

from .. import abi, checks
from ..arguments import fill_strides
from ..backend import DecodePlan
from ..layout import DTYPES, PageLayout
from ..types import Logits, Rows, Tail
from .hadamard import launch_hadamard
from .launch import KvcWidths, KvcWorkspace, Launcher
from .nvrtc import ALONE, BULK, RESIDENT, RING_BYTES

__all__ = ["GeneralDecodePlan", "TensorCoreDecodePlan", "fits_tensor_cores"]

THREADS = 128
TILE = 16
TIERS = ((0, 0), (8, 8), (8, 4), (4, 4), (4, 2), (2, 2))  # of the tensor-core decode


def fits_tensor_cores(layout: PageLayout) -> bool:
    """Whether `decode.cu` takes a layout; `attention.cu` takes every one."""
    known = all((tier.key_bits, tier.value_bits) in TIERS for tier in layout.tiers)
    return (
        known
        and layout.head_dim in {head_dim for head_dim, _ in RESIDENT}
        and layout.dtype in (torch.float16, torch.bfloat16)
    )


def _kernel_for(layout: PageLayout, heads: int, bulk_copies: bool) -> str:
    """The kernel of `decode.cu` that takes a layout, `heads` query heads together."""
    name = f"kvc_decode_{layout.head_dim}_{'f16' if layout.dtype is torch.float16 else 'bf16'}_{heads}"
    coded = [tier for tier in layout.tiers if not tier.native]
    bits = {(tier.key_bits, tier.value_bits) for tier in coded}
    if (layout.head_dim, heads) == (128, 8) and len(bits) == 1 and bits <= ALONE.keys():
        name += "_k{}v{}".format(*bits.pop())
    fits = bool(coded) and heads == 8 and max(tier.fields for tier in coded) <= RING_BYTES[layout.head_dim]
    return name + BULK if bulk_copies and fits else name


class CudaDecodePlan(DecodePlan):
    """What the plans have in common: the checks of a step, room in the tail, and the clock.

    The clock is the position of the next token, on the device: kernels read it and move it on, so that every step
    starts them with the same arguments. A step that has been captured into a CUDA graph may therefore be replayed, as
    often as there is room in the tail; steps before and after it may be run as ever.

    Args:
        launcher: Where kernels run.
        c: All arguments that do not change between steps.
        rows: The packed slots.
        tail: The tail.
        logits: How logits are made; `c` points to the sinks in it.
        key_shift: Taken off new keys; `None` = nothing.
    """

    replays = True

    def __init__(
        self,
        launcher: Launcher,
        c: abi.KvcDecode,
        rows: Rows,
        tail: Tail,
        logits: Logits,
        key_shift: Tensor | None,
    ) -> None:
        self._launcher, self._c, self._rows, self._tail = launcher, c, rows, tail
        self._key_shift = key_shift
        self._kept = (logits, *rows.tables, *rows.lengths, *rows.slabs, rows.slab_addresses, tail.k, tail.v)
        self._kept_tail = (tail.lengths, tail.positions, tail.fields)  # the struct holds bare addresses of all these
        self._device = tail.k.device
        self._layout = rows.layout
        batch, kv_heads, head_dim = c.batch, c.kv_heads, rows.layout.head_dim
        self._q_heads = kv_heads * c.group
        self._q_shape = torch.Size((batch, self._q_heads, 1, head_dim))
        self._k_shape = torch.Size((batch, kv_heads, 1, head_dim))
        # Lengths are on the device; no row of the tail holds more than this.
        self._used = tail.capacity if tail.used is None else tail.used
        with torch.inference_mode(False):  # it is set in other steps, inside inference mode or not
            self._clock = torch.zeros(1, dtype=torch.int32, device=self._device)
        self._time: int | None = 0  # what the clock shows, where that is known here
        self._widths = KvcWidths()
        slots = 0
        for tier, table in enumerate(rows.tables):
            self._widths.width[tier] = table.shape[1] * rows.layout.tiers[tier].slots
            slots += -(-self._widths.width[tier] // TILE)
        self._widths.tiles = slots + -(-tail.capacity // TILE)
        self._lse = torch.empty(batch, self._q_heads, device=self._device)
        self.nbytes = self._clock.nbytes + self._lse.nbytes

    def run(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        position: int,
        valid: Tensor | None = None,
        append: bool = True,
    ) -> Tensor:
        if k is not None and self._key_shift is not None:
            k = k - self._key_shift
        self._prepare(q, k, v, position, valid, append)
        if not self._c.rotates_values:
            return self._run(q, k, v, valid, append)
        block = self._layout.rotation_block
        v = None if v is None else launch_hadamard(self._launcher, v, block)
        return launch_hadamard(self._launcher, self._run(q, k, v, valid, append), block)

    def set_clock(self, position: int) -> None:
        if position != self._time:
            self._clock.fill_(position)
        self._time = position

    def note_steps(self, position: int, used: int) -> None:
        self._time, self._used = position, used

    @abc.abstractmethod
    def _run(self, q: Tensor, k: Tensor | None, v: Tensor | None, valid: Tensor | None, append: bool) -> Tensor:
        """Starts the kernels of a step that [`_prepare`] has checked."""

    def _prepare(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, position: int, valid: Tensor | None, append: bool
    ) -> None:
        dtype = self._layout.dtype
        if q.shape != self._q_shape or q.dtype is not dtype or q.device != self._device or q.stride(3) != 1:
            checks.check_tensor("q", q, self._q_shape, dtype, self._device)
        if append:
            if k is None or v is None:
                raise ValueError("k and v are needed unless append is False")
            for name, x in (("k", k), ("v", v)):
                if x.shape != self._k_shape or x.dtype is not dtype or x.device != self._device or x.stride(3) != 1:
                    checks.check_tensor(name, x, self._k_shape, dtype, self._device)
        if valid is not None:
            checks.check_tensor("valid", valid, self._q_shape[:1], torch.bool, self._device)
        full = append and self._used >= self._tail.capacity
        capturing = self._launcher.capturing()
        if capturing and (full or position != self._time):
            raise RuntimeError(
                "a decoding step can only be captured right after one that was run, at the next position and with room "
                f"in the tail; this one is at {position}, the last known is {self._time}: run a step first, or set the "
                "clock"
            )
        if full:  # the tail may have been packed since: look
            checks.check_room(self._tail, 1, None if valid is None else valid.unsqueeze(1))
            self._used = int(self._tail.lengths.max())
        self.set_clock(position)
        self._time = position + append
        self._used += append
        if capturing:  # nobody tells how often it will be replayed
            self._time, self._used = None, self._tail.capacity


class GeneralDecodePlan(CudaDecodePlan):
    """Any head_dim and dtype: append, then the kernels of `attention.cu`."""

    def _run(self, q: Tensor, k: Tensor | None, v: Tensor | None, valid: Tensor | None, append: bool) -> Tensor:
        c, layout = self._c, self._layout
        clock = ctypes.c_void_p(self._clock.data_ptr())
        c.position = -append  # attention follows the appending, which moves the clock on
        c.q, (c.q_b, c.q_h, *_) = q.data_ptr(), q.stride()
        c.valid = None if valid is None else valid.data_ptr()
        if append and k is not None and v is not None:
            new = abi.KvcAppend(batch=c.batch, kv_heads=c.kv_heads, n_k=1, head_dim=layout.head_dim)
            new.tail, new.k, new.v, new.valid = c.tail, k.data_ptr(), v.data_ptr(), c.valid
            fill_strides(new, "k", k)
            fill_strides(new, "v", v)
            new.dtype = DTYPES[layout.dtype]
            new.n_fields = 0 if self._tail.fields is None else self._tail.fields.shape[0]
            self._launcher.launch("kvc_append", c.batch, THREADS, (new, clock), self._device)
            self._launcher.launch("kvc_advance", c.batch, 32, (new, clock), self._device)
        out = torch.empty(c.batch, 1, self._q_heads, layout.head_dim, dtype=layout.dtype, device=self._device)
        chunk = abi.KvcChunk(n_q=1, n_k=0, out=out.data_ptr(), lse=self._lse.data_ptr(), q_t=0)
        shared = (
            "rows tail q q_b q_h out_b out_h sinks scale softcap window position_field position batch kv_heads group"
        )
        for name in shared.split():
            setattr(chunk, name, getattr(c, name))
        blocks = c.batch * c.kv_heads * -(-c.group // TILE)
        arguments = (layout.c, chunk, ctypes.c_void_p(), clock)
        self._launcher.launch("kvc_chunk", blocks, THREADS, arguments, self._device)
        if valid is not None:
            out.masked_fill_(~valid.view(-1, 1, 1, 1), 0)
        self._statistics(append)
        return out

    def _statistics(self, append: bool) -> None:
        c = self._c
        if c.sum_field < 0 and c.square_field < 0:
            return
        c.position = -append  # the clock has moved on
        lse, clock = ctypes.c_void_p(self._lse.data_ptr()), ctypes.c_void_p(self._clock.data_ptr())
        blocks = self._rows.count * self._widths.tiles
        arguments = (self._layout.c, c, lse, self._widths, clock)
        self._launcher.launch("kvc_statistics", blocks, THREADS, arguments, self._device)


class TensorCoreDecodePlan(CudaDecodePlan):
    """The layouts of `fits_tensor_cores`: append, attention, merge and statistics in the one kernel of `decode.cu`."""

    def __init__(
        self,
        launcher: Launcher,
        c: abi.KvcDecode,
        rows: Rows,
        tail: Tail,
        logits: Logits,
        key_shift: Tensor | None,
    ) -> None:
        super().__init__(launcher, c, rows, tail, logits, key_shift)
        head_dim, device = self._layout.head_dim, self._device
        heads = 8 if c.group <= 8 else 16  # that are handled together
        self._kernel = _kernel_for(self._layout, heads, launcher.bulk_copies)
        self._blocks = launcher.resident(self._kernel, THREADS, device)
        tiles = -(-c.group // heads)
        self._arrived = torch.zeros(rows.count * tiles + 2, dtype=torch.int32, device=device)
        self.nbytes += self._arrived.nbytes
        self._pointers = KvcWorkspace(
            arrived=self._arrived.data_ptr(), lse=self._lse.data_ptr(), clock=self._clock.data_ptr()
        )
        self._adds_up = c.sum_field >= 0 or c.square_field >= 0
        columns = min(heads, c.group + c.group % 2)  # two heads are written at once
        sums = 2 * self._blocks * heads  # of the first and the last row of a thread block
        kept = rows.count * tiles * self._widths.tiles * TILE * columns if self._adds_up else 0
        self._scratch = {"partial": sums * head_dim, "partial_max": sums, "partial_sum": sums, "logits": kept}
        self.step_nbytes = 4 * sum(self._scratch.values())

    def _run(self, q: Tensor, k: Tensor | None, v: Tensor | None, valid: Tensor | None, append: bool) -> Tensor:
        c, layout = self._c, self._layout
        c.position, c.append = 0, append
        c.q, (c.q_b, c.q_h, *_) = q.data_ptr(), q.stride()
        if (c.q | 2 * (c.q_b | c.q_h)) % 16:  # the kernel takes 16 bytes at a time
            q = q.clone(memory_format=torch.contiguous_format)
            c.q, (c.q_b, c.q_h, *_) = q.data_ptr(), q.stride()
        if append and k is not None and v is not None:
            c.k, (c.k_b, c.k_h, *_) = k.data_ptr(), k.stride()
            c.v, (c.v_b, c.v_h, *_) = v.data_ptr(), v.stride()
        c.valid = None if valid is None else valid.data_ptr()
        out = torch.empty(c.batch, 1, self._q_heads, layout.head_dim, dtype=layout.dtype, device=self._device)
        c.out = out.data_ptr()
        if self._rows.count:
            # Needed in this step only: from PyTorch's allocator all layers get the same memory, one after the other on
            # a stream, and a captured step its graph's own.
            scratch = torch.empty(self.step_nbytes // 4, device=self._device)
            self._place(scratch)
            arguments = (layout.c, c, self._pointers)
            self._launcher.launch(
                self._kernel, self._blocks, THREADS, arguments, self._device, cooperative=self._adds_up
            )
        return out

    def _place(self, scratch: Tensor) -> None:
        at = scratch.data_ptr()
        for name, size in self._scratch.items():
            setattr(self._pointers, name, at if size else None)
            at += 4 * size
