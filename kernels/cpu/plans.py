"""`PlanOperations` by `libkvc_cpu.so`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import abi, checks
from ..arguments import fill_rows, fill_strides, pointer
from ..layout import DTYPES, MAX_HEAD_DIM, SLOT_MULTIPLE
from ..plan_operations import Hulls, PlanOperations
from ..rotation import Rotation
from ..types import Rows

__all__ = ["CpuPlanOperations"]

CPU = torch.device("cpu")
_SHIFT = 19  # 16 bins per octave: a float32 has 23 bits below its exponent


class CpuPlanOperations(PlanOperations):
    """See [`PlanOperations`].

    Args:
        call: Calls an operation by its name with its arguments, and raises if it refuses them.
    """

    def __init__(self, call: Callable[[str, ctypes.Structure], None]) -> None:
        self._call = call

    def gather(self, rows: Rows, tier: int, field: str, out: Tensor, place: Tensor | None = None) -> None:
        checks.check_rows(rows, CPU)
        checks.check_tensor("out", out, (None, None, None, None), rows.layout.field_dtype(field), CPU)
        layers, batch, kv_heads, width = out.shape
        checks.check_width(rows, tier, width)
        if place is not None:
            checks.check_tensor("place", place, (None,), torch.int32, CPU)
            most = checks.bounds(place)[1] if place.numel() else -1
            if most >= batch:
                raise ValueError(f"out is for {batch} sequences, and one is to go to place {most}")
            batch = place.numel()
        used = layers * batch * kv_heads
        if used > rows.count or not batch or not kv_heads:
            raise ValueError(f"out is for {layers} layers x {batch} x {kv_heads} rows, and there are {rows.count}")
        c = abi.KvcGather(tier=tier, field=rows.layout.field_index(field), width=width, batch=batch, kv_heads=kv_heads)
        fill_rows(c, rows)
        c.rows.rows = used
        c.values, c.place = out.data_ptr(), pointer(place)
        c.values_l, c.values_b, c.values_h, _ = out.stride()
        self._call("gather", c)

    def lowest(self, scores: Tensor, positions: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
        shape = scores.shape
        checks.check_tensor("scores", scores, shape, torch.float32, CPU, contiguous=False)
        checks.check_tensor("positions", positions, shape, torch.int32, CPU, contiguous=False)
        checks.check_tensor("candidates", candidates, shape, torch.bool, CPU, contiguous=False)
        checks.check_tensor("count", count, shape[:-1], torch.int64, CPU, contiguous=False)
        kept = [each.contiguous() for each in (scores, positions, candidates, count)]
        chosen = torch.empty(shape, dtype=torch.bool)
        c = abi.KvcLowest(rows=count.numel(), slots=shape[-1], chosen=chosen.data_ptr())
        c.scores, c.positions, c.candidates, c.count = (each.data_ptr() for each in kept)
        self._call("lowest", c)
        return chosen

    def prices(self, scores: Tensor, candidates: Tensor, first: Tensor, step: Tensor, pages: int) -> Tensor:
        shape = scores.shape
        checks.check_tensor("scores", scores, shape, torch.float32, CPU, contiguous=False)
        checks.check_tensor("candidates", candidates, shape, torch.bool, CPU, contiguous=False)
        for name, each in (("first", first), ("step", step)):
            checks.check_tensor(name, each, shape[:-1], torch.int64, CPU, contiguous=False)
        kept = [each.contiguous() for each in (scores, candidates, first, step)]
        price = torch.empty(*shape[:-1], pages)
        c = abi.KvcPrices(rows=first.numel(), slots=shape[-1], pages=pages, price=price.data_ptr())
        c.scores, c.candidates, c.first, c.step = (each.data_ptr() for each in kept)
        self._call("prices", c)
        return price

    def holes(self, marks: Tensor, gone: int, before: Tensor, kept: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
        checks.check_tensor("marks", marks, (None, None), torch.int8, CPU, contiguous=False)
        for name, each in (("before", before), ("kept", kept)):
            checks.check_tensor(name, each, marks.shape[:1], torch.int32, CPU, contiguous=False)
        inputs = [each.contiguous() for each in (marks, before, kept)]
        found = [torch.empty(room, dtype=torch.int32) for _ in range(3)]
        c = abi.KvcHoles(rows=marks.shape[0], slots=marks.shape[1], room=room, gone=gone)
        c.marks, c.before, c.kept, c.row, c.hole, c.mover = (each.data_ptr() for each in (*inputs, *found))
        self._call("holes", c)
        row, hole, mover = (each[: c.found] for each in found)
        return row, hole, mover

    def places(self, marks: Tensor, wanted: int, lengths: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        checks.check_tensor("marks", marks, (None, None), torch.int8, CPU, contiguous=False)
        for name, each in (("lengths", lengths), ("counts", counts)):
            checks.check_tensor(name, each, marks.shape[:1], torch.int32, CPU, contiguous=False)
        inputs = [each.contiguous() for each in (marks, lengths, counts)]
        found = [torch.empty(int(counts.sum()), dtype=torch.int32) for _ in range(3)]
        c = abi.KvcPlaces(rows=marks.shape[0], slots=marks.shape[1], room=found[0].numel(), wanted=wanted)
        c.marks, c.length, c.count, c.row, c.slot, c.rank = (each.data_ptr() for each in (*inputs, *found))
        self._call("places", c)
        row, slot, rank = (each[: c.found] for each in found)
        return row, slot, rank

    def tally(self, targets: Tensor, filled: Tensor, columns: Sequence[int]) -> tuple[Tensor, Tensor]:
        shape, tiers = targets.shape, len(columns) - 1
        checks.check_tensor("targets", targets, (None, None, None), torch.int8, CPU, contiguous=False)
        checks.check_tensor("filled", filled, shape, torch.bool, CPU, contiguous=False)
        _check_tiers(tiers)
        begin = torch.tensor(columns)
        if columns[0] or columns[-1] != shape[2] or list(columns) != sorted(columns):
            raise ValueError(f"columns must go from 0 to {shape[2]}, got {list(columns)}")
        kept = [each.contiguous() for each in (targets, filled)]
        out = torch.empty(shape, dtype=torch.int8)
        counts = torch.empty(*shape[:2], tiers, tiers, dtype=torch.int32)
        c = abi.KvcTally(rows=shape[1], slots=shape[2], batch=shape[0], tiers=tiers, begin=begin.data_ptr())
        c.targets, c.filled, c.out, c.counts = (each.data_ptr() for each in (*kept, out, counts))
        self._call("tally", c)
        return out, counts

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
        checks.check_tensor("importance", importance, (None, None, None), torch.float32, CPU, contiguous=False)
        batch, rows, slots = importance.shape
        tiers = pages[0].shape[1]
        _check_tiers(tiers)
        for name, mask in (("filled", filled), ("protected", protected)):
            checks.check_tensor(name, mask, importance.shape, torch.bool, CPU, contiguous=False)
        checks.check_tensor("pages", pages[0], (rows, tiers), torch.int64, CPU, contiguous=False)
        checks.check_tensor("room", limits[1], (batch, tiers), torch.int64, CPU, contiguous=False)
        most = checks.bounds(tier) if slots else (0, 0)
        if most[0] < 0 or most[1] >= tiers or len(hulls.tiers) != batch or int(pages[0].min()) < 1:
            raise ValueError(f"tier must be of {tiers} tiers, pages have slots, and each of {batch} sequences a hull")
        wide = [[*each, *[0] * (abi.MAX_TIERS - len(each))] for each in (*hulls.tiers, *hulls.offsets)]
        hull = torch.tensor(wide, dtype=torch.int32)
        steps = torch.tensor([len(each) for each in hulls.tiers], dtype=torch.int32)
        narrow = [each.to(torch.int32).contiguous() for each in (tier, pages[0], limits[1])]
        kept = [each.contiguous() for each in (importance, filled, protected, pages[1], limits[0])]
        targets = torch.empty(importance.shape, dtype=torch.int8)
        c = abi.KvcShares(batch=batch, rows=rows, slots=slots, tiers=tiers, shift=_SHIFT, guesses=guesses)
        c.importance, c.filled, c.protects, c.page_bytes, c.allowed = (each.data_ptr() for each in kept)
        c.tier_of, c.slots_per_page, c.room = (each.data_ptr() for each in narrow)
        c.hull_tier, c.offset, c.steps = hull.data_ptr(), hull[batch:].data_ptr(), steps.data_ptr()
        c.targets = targets.data_ptr()
        self._call("shares", c)
        return targets

    def key_shift(self, keys: Tensor, query: Tensor, valid: Tensor | None, bits: int, most: float) -> Tensor:
        _check_states(keys, query)
        batch, kv_heads, n, head_dim = keys.shape
        q_heads, n_q = query.shape[1:3]
        if n_q > n or bits not in (2, 4, 8):
            raise ValueError(f"there must be no more queries ({n_q}) than keys ({n}), of 2, 4 or 8 bits, not {bits}")
        if valid is not None:
            checks.check_tensor("valid", valid, (batch, n), torch.bool, CPU, contiguous=False)
            valid = valid.contiguous()
        shift = torch.empty(batch, kv_heads, 1, head_dim)
        if not shift.numel():
            return shift.to(keys.dtype)
        c = abi.KvcKeyShift(
            most=most,
            bits=bits,
            dtype=DTYPES[keys.dtype],
            head_dim=head_dim,
            batch=batch,
            kv_heads=kv_heads,
            group=q_heads // kv_heads,
            n=n,
            n_q=n_q,
        )
        c.k, c.q, c.valid, c.shift = keys.data_ptr(), query.data_ptr(), pointer(valid), shift.data_ptr()
        fill_strides(c, "k", keys)
        fill_strides(c, "q", query)
        self._call("key_shift", c)
        return shift.to(keys.dtype)

    def tier_losses(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        tiers: Sequence[tuple[int, int]],
        padding: Tensor | None = None,
    ) -> Tensor:
        _check_states(keys, query, values)
        batch, kv_heads, n, head_dim = keys.shape
        checks.check_tensor("query", query, (batch, None, n, head_dim), keys.dtype, CPU)
        _check_tiers(len(tiers))
        count = None
        if padding is not None:
            checks.check_tensor("padding", padding, (batch,), torch.int64, CPU, contiguous=False)
            count = (n - padding).clamp(0, n)
        loss = torch.empty(batch, kv_heads, len(tiers))
        if not loss.numel():
            return loss
        c = abi.KvcTierLosses(
            scale=scale,
            tiers=len(tiers),
            dtype=DTYPES[keys.dtype],
            head_dim=head_dim,
            batch=batch,
            kv_heads=kv_heads,
            group=query.shape[1] // kv_heads,
            n=n,
        )
        for tier, (key_bits, value_bits) in enumerate(tiers):
            c.key_bits[tier], c.value_bits[tier] = key_bits, value_bits
        c.k, c.v, c.q, c.loss = keys.data_ptr(), values.data_ptr(), query.data_ptr(), loss.data_ptr()
        c.count = pointer(count)
        for name, states in (("k", keys), ("v", values), ("q", query)):
            fill_strides(c, name, states)
        self._call("tier_losses", c)
        return loss

    def fit_maps(
        self, query: Tensor, keys: Tensor, rotation: Rotation, step: int, *, apart: int, ridge: float, gain: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        sizes = _check_prompt(keys, query, rotation)
        batch, q_heads, n, head_dim = query.shape
        if n < 2 or step < 1 or apart < 2:
            raise ValueError(
                "there must be two tokens, a step of one and one pair of two apart, at least, "
                f"got {n}, {step} and {apart}"
            )
        shape = (batch, q_heads, head_dim)
        mapping, offset, explained = torch.empty(*shape, head_dim), torch.empty(shape), torch.empty(shape[:2])
        inv_freq = rotation.inv_freq.contiguous()
        c = abi.KvcFitMaps(ridge=ridge, gain=gain, **sizes, step=step, apart=apart)
        c.q, c.k, c.inv_freq = query.data_ptr(), keys.data_ptr(), inv_freq.data_ptr()
        c.mapping, c.offset, c.explained = (each.data_ptr() for each in (mapping, offset, explained))
        fill_strides(c, "q", query)
        fill_strides(c, "k", keys)
        self._call("fit_maps", c)
        return mapping, offset, explained

    def foresee(self, query: Tensor, keys: Tensor, mapping: Tensor, offset: Tensor, rotation: Rotation) -> Tensor:
        sizes = _check_prompt(keys, query, rotation)
        batch, q_heads, n, head_dim = query.shape
        checks.check_tensor("mapping", mapping, (batch, q_heads, head_dim, head_dim), torch.float32, CPU, False)
        checks.check_tensor("offset", offset, (batch, q_heads, head_dim), torch.float32, CPU, False)
        if not n:
            raise ValueError("foresee needs a token at least")
        out = torch.empty(query.shape, dtype=query.dtype)
        kept = [each.contiguous() for each in (mapping, offset, rotation.inv_freq)]
        c = abi.KvcForesee(
            **sizes,
        )
        c.mapping, c.offset, c.inv_freq = (each.data_ptr() for each in kept)
        c.k, c.out = keys.data_ptr(), out.data_ptr()
        fill_strides(c, "k", keys)
        self._call("foresee", c)
        out[:, :, -1] = query[:, :, -1]
        return out


def _check_prompt(keys: Tensor, query: Tensor, rotation: Rotation) -> dict[str, int]:
    """Checks a prompt's states and how position turns them; gives what every operation on them is told."""
    _check_states(keys, query)
    batch, kv_heads, n, head_dim = keys.shape
    q_heads = query.shape[1]
    checks.check_tensor("query", query, (batch, q_heads, n, head_dim), keys.dtype, CPU)
    checks.check_rotation(rotation, head_dim)
    return {
        "pairs": rotation.inv_freq.numel(),
        "start": rotation.start,
        "interleaved": rotation.interleaved,
        "dtype": DTYPES[keys.dtype],
        "head_dim": head_dim,
        "batch": batch,
        "kv_heads": kv_heads,
        "group": q_heads // kv_heads,
        "n": n,
    }


def _check_states(keys: Tensor, query: Tensor, values: Tensor | None = None) -> None:
    if keys.dtype not in DTYPES:
        raise ValueError(f"keys must be {', '.join(map(str, DTYPES))}, got {keys.dtype}")
    checks.check_tensor("keys", keys, (None, None, None, None), keys.dtype, CPU)
    batch, kv_heads, n, head_dim = keys.shape
    if head_dim % SLOT_MULTIPLE or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be a multiple of {SLOT_MULTIPLE} up to {MAX_HEAD_DIM}, got {head_dim}")
    checks.check_tensor("query", query, (batch, None, None, head_dim), keys.dtype, CPU)
    if kv_heads == 0 or query.shape[1] % kv_heads or query.shape[1] == 0:
        raise ValueError(f"q_heads must be a multiple of kv_heads ({kv_heads}), got {query.shape[1]}")
    if values is not None:
        checks.check_tensor("values", values, (batch, kv_heads, n, head_dim), keys.dtype, CPU)


def _check_tiers(tiers: int) -> None:
    if not 1 <= tiers <= abi.MAX_TIERS:
        raise ValueError(f"there must be 1 to {abi.MAX_TIERS} tiers, got {tiers}")
