"""All slots of all stores seen by sequence: gathered for observers and plans, and changed as a plan decides."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from kvcompress_hf.errors import CacheMemoryError
from kvcompress_hf.kernels import get_backend
from kvcompress_hf.paging.evicted import remember_evicted
from kvcompress_hf.paging.key_turn import newer_evicted
from kvcompress_hf.paging.store import PagedStore
from kvcompress_hf.paging.waiting import derive, known_as, on_host, pick, to_device


@dataclass(frozen=True)
class StorePart:
    """A store and which of the model's layers it holds.

    Args:
        store (`PagedStore`): The store; its tail must be packed.
        layers (`tuple[int, ...]`): Layers of the model, in the order of the store's layers.
        groups (`tuple[int, ...]`): Query heads per KV head of each of them.
    """

    store: PagedStore
    layers: tuple[int, ...]
    groups: tuple[int, ...]

    @property
    def rows(self) -> int:
        """`int`: Rows of one sequence."""
        return len(self.layers) * self.store.geometry.kv_heads


@dataclass(frozen=True)
class Slots:
    """Every stored slot of a batch, over all layers and heads.

    Columns are grouped by tier: first the slots of the best tier, then those of the next.

    Args:
        fields (`dict[str, torch.Tensor]`): Slot fields by name, float32 `[batch, rows, slots]`.
        positions (`torch.Tensor`): `int32` `[batch, rows, slots]`.
        filled (`torch.Tensor`): `bool` `[batch, rows, slots]`, false where there is no slot.
        tier (`torch.Tensor`): `int64` `[slots]`, the tier of each column.
        layer_of_row (`torch.Tensor`): `int64` `[rows]`, the model's layer of each row.
        group (`torch.Tensor`): `int64` `[rows]`, query heads that share the row's KV head.
        seen (`int`): Tokens seen, padding and evicted ones included.
        prompt (`int`): Tokens of `seen` that came in chunks; the rest was decoded one by one.
        padding (`torch.Tensor`, *optional*): `int64` `[batch]` on the host, padding before the first token of each
            sequence.
    """

    fields: dict[str, torch.Tensor]
    positions: torch.Tensor
    filled: torch.Tensor
    tier: torch.Tensor
    layer_of_row: torch.Tensor
    group: torch.Tensor
    seen: int
    prompt: int
    padding: torch.Tensor | None = None

    def columns(self, tier: int) -> slice:
        """Finds the columns that hold the slots of a tier.

        Args:
            tier (`int`): Index of the tier.

        Returns:
            `slice`: From its first column to behind its last one.
        """
        tiers = on_host(self.tier)
        return slice(int((tiers < tier).sum()), int((tiers <= tier).sum()))

    def of(self, sequences: torch.Tensor | slice) -> "Slots":
        """Picks sequences of the batch.

        Args:
            sequences (`torch.Tensor` or `slice`): Their indices, `int64` `[n]` on the host, or a range of them.

        Returns:
            `Slots`: The slots of these sequences alone, in the given order.
        """
        return replace(
            self,
            fields={name: pick(values, sequences) for name, values in self.fields.items()},
            positions=pick(self.positions, sequences),
            filled=pick(self.filled, sequences),
            padding=None if self.padding is None else pick(self.padding, sequences),
        )


def gather_slots(
    parts: Sequence[StorePart], fields: Sequence[str], seen: int, prompt: int, sequences: torch.Tensor | None = None
) -> Slots:
    """Reads the fields of every slot.

    Args:
        parts (`Sequence[StorePart]`): The stores; the first one's device is where the result lies.
        fields (`Sequence[str]`): Names of the float32 fields to read.
        seen (`int`): Tokens seen.
        prompt (`int`): Tokens that came in chunks.
        sequences (`torch.Tensor`, *optional*): `int64` `[n]` on the host, in ascending order, those of the batch that
            are read; all when left out.

    Returns:
        `Slots`: Every slot of these sequences, with the fields asked for.
    """
    device = parts[0].store.geometry.device
    tiers = len(parts[0].store.layout.tiers)
    longest = [part.store.lengths_on_host().amax(1).tolist() for part in parts]
    widths = [max(row[t] for row in longest) for t in range(tiers)]
    joined = _gather(parts, ("position", *fields), widths, longest, sequences)
    heads = [part.store.geometry.kv_heads for part in parts]
    layers = [layer for part, h in zip(parts, heads, strict=True) for layer in part.layers for _ in range(h)]
    groups = [group for part, h in zip(parts, heads, strict=True) for group in part.groups for _ in range(h)]
    tier_of = torch.repeat_interleave(torch.arange(tiers), torch.tensor(widths))
    return Slots(
        fields={name: joined[name] for name in fields},
        positions=joined["position"],
        filled=joined["filled"],
        tier=to_device(tier_of, device),
        layer_of_row=to_device(torch.tensor(layers), device),
        group=to_device(torch.tensor(groups), device),
        seen=seen,
        prompt=prompt,
    )


def _gather(
    parts: Sequence[StorePart],
    names: Sequence[str],
    widths: Sequence[int],
    longest: Sequence[Sequence[int]],
    sequences: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """The named fields and `filled`, `[batch, rows, slots]`, where the first part lies."""
    store = parts[0].store
    device, layout = store.geometry.device, store.layout
    batch = store.batch if sequences is None else sequences.numel()
    shape = (batch, sum(part.rows for part in parts), sum(widths))
    joined = {name: torch.zeros(shape, dtype=layout.field_dtype(name), device=device) for name in names}
    filled = joined["filled"] = torch.empty(shape, dtype=torch.bool, device=device)
    start = 0
    for part, own in zip(parts, longest, strict=True):
        rows, begin = slice(start, start + part.rows), 0
        start += part.rows
        for tier, width in enumerate(widths):
            lengths = to_device(_by_sequence(part.store.lengths[tier][:, None], part), device)
            lengths = lengths if sequences is None else lengths[to_device(sequences, device)]
            column = torch.arange(width, dtype=torch.int32, device=device)
            torch.lt(column, lengths, out=filled[:, rows, begin : begin + width])
            for name in names if own[tier] else ():
                part.store.read_field_to(tier, name, joined[name][:, rows, begin : begin + own[tier]], sequences)
            begin += width
    return joined


@dataclass(frozen=True)
class Decision:
    """What targets mean for each store, of all its sequences.

    Whoever knows how many slots go where can do all of it without asking again.

    Args:
        targets (`tuple[torch.Tensor, ...]`): Per store `int8` `[store rows, slots]`: the tier of each slot from now
            on, -1 for slots that go and where there is none.
        counts (`tuple[torch.Tensor, ...]`): Per store `int32` `[tiers, tiers, store rows]`: slots of each tier that are
            to be in each tier.
        protected (`tuple[torch.Tensor, ...]`): Per store `bool` `[store rows, slots]`: slots that may not go.
    """

    targets: tuple[torch.Tensor, ...]
    counts: tuple[torch.Tensor, ...]
    protected: tuple[torch.Tensor, ...]

    @classmethod
    def of(
        cls,
        parts: Sequence[StorePart],
        slots: Slots,
        targets: torch.Tensor,
        protected: torch.Tensor,
        sequences: torch.Tensor | None = None,
    ) -> "Decision":
        """Counts what goes where.

        Args:
            parts (`Sequence[StorePart]`): The stores, as they were gathered.
            slots (`Slots`): The slots, as they were gathered.
            targets (`torch.Tensor`): Integers `[batch, rows, slots]`: tier to keep each slot in, -1 to evict it. A slot
                whose target is above its tier stays where it is.
            protected (`torch.Tensor`): `bool` `[batch, rows, slots]`: slots that may not go.
            sequences (`torch.Tensor`, *optional*): Those that were gathered, as for [`gather_slots`]; the others stay
                as they are.

        Returns:
            `Decision`: What has to be done; nothing of it has been done yet.
        """
        tiers = len(parts[0].store.layout.tiers)
        targets, table = count_targets(targets, slots.filled, slots.tier, tiers)
        rows, counts, stays, start = [], [], [], 0
        for part in parts:
            own, device = slice(start, start + part.rows), part.store.geometry.device
            start += part.rows
            rows.append(_by_row(_in_batch(to_device(targets[:, own], device), part, sequences), part))
            stays.append(_by_row(_in_batch(to_device(protected[:, own], device), part, sequences), part, False))
            of_rows = _by_row(_in_batch(to_device(table[:, own].flatten(2), device), part, sequences), part, 0)
            of_tiers = of_rows.t().contiguous().unflatten(0, (tiers, tiers))
            if sequences is not None:
                stay = torch.ones(part.store.batch, dtype=torch.bool).index_fill_(0, sequences, False)
                stay = to_device(stay.repeat_interleave(part.store.geometry.kv_heads).repeat(len(part.layers)), device)
                for tier in range(tiers):
                    of_tiers[tier, tier, : stay.numel()] += part.store.lengths[tier, : stay.numel()] * stay
            counts.append(of_tiers)
        return cls(tuple(rows), tuple(counts), tuple(stays))


def count_targets(
    targets: torch.Tensor, filled: torch.Tensor, tier: torch.Tensor, tiers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Brings targets into order, and counts how many slots of each tier are to be in each tier.

    Args:
        targets (`torch.Tensor`): Integers `[batch, rows, slots]`: a tier, or below zero for what goes.
        filled (`torch.Tensor`): `bool` `[batch, rows, slots]`, false where there is no slot.
        tier (`torch.Tensor`): `int64` `[slots]`, the tier of each column; columns are grouped by tier.
        tiers (`int`): Number of tiers.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `int8` `[batch, rows, slots]`, none above its slot's tier, and -1 where a
        slot goes or there is none; and `int32` `[batch, rows, tiers, tiers]`.
    """
    narrow = targets.to(torch.int8)  # as every step reads all of them
    at = on_host(tier)
    columns = [int((at < t).sum()) for t in range(tiers + 1)]
    native = get_backend(targets.device).plans
    if native is not None:
        return native.tally(narrow, filled, columns)
    narrow = torch.where((narrow < 0) | ~filled, -1, torch.maximum(narrow, tier.to(torch.int8)))
    none = torch.zeros(narrow.shape[:2], dtype=torch.int32, device=narrow.device)
    table = []
    for from_tier, (begin, end) in enumerate(itertools.pairwise(columns)):
        moved = narrow[..., begin:end]
        table += [none if to < from_tier else (moved == to).sum(-1, dtype=torch.int32) for to in range(tiers)]
    return narrow, torch.stack(table, dim=-1).unflatten(-1, (tiers, tiers))


def apply_targets(
    parts: Sequence[StorePart],
    slots: Slots,
    decision: Decision,
    inv_freq: torch.Tensor | None = None,
    remembers: bool = False,
) -> int:
    """Lowers and evicts slots.

    Args:
        parts (`Sequence[StorePart]`): The stores, as they were gathered.
        slots (`Slots`): The slots, as they were gathered.
        decision (`Decision`): What is to be done; its counts are best known on the host.
        inv_freq (`torch.Tensor`, *optional*): Where given, what stays is re-indexed: each key is rotated on by the
            number of newer slots of its row that go. Radians per position of each pair of channels, float32 `[pairs]`;
            all tiers must be native.
        remembers (`bool`): Whether the means of what goes are kept; see [`remember_evicted`].

    Returns:
        `int`: Number of slots evicted.
    """
    evicted = evicted_by(parts, decision)
    turns = _turns(parts, slots, decision) if inv_freq is not None else ()
    start = 0
    every = zip(parts, decision.targets, decision.counts, decision.protected, strict=True)
    for part, rows, counts, protected in every:
        store = part.store
        turned = [to_device(each[:, start : start + part.rows], rows.device) for each in turns]
        start += part.rows
        turned = [_by_row(each, part, 0) for each in turned]
        here, stays = [], []
        for tier in range(len(store.layout.tiers)):
            columns, width = slots.columns(tier), store.width(tier)
            decided, stay = (each[:, columns][:, :width].clone() for each in (rows, protected))
            # What goes for good goes first: its pages serve what is lowered.
            turning = [each[:, columns][:, :width].clone() for each in turned]
            kept = derive(pick(counts, tier), lambda to: to.sum(0, dtype=torch.int32))
            if remembers:
                remember_evicted(store, tier, decided < 0, store.lengths_on_host()[tier] - on_host(kept))
            lowers = tier < len(store.layout.tiers) - 1
            _drop(store, tier, (decided, -1), kept, *((decided, stay) if lowers else ()), *turning)
            if turning and inv_freq is not None:
                by, seed = turning
                store.turn_keys(tier, by, seed, inv_freq)
            here.append(decided)
            stays.append(stay)
        for tier in reversed(range(len(here) - 1)):
            for lower in range(tier + 1, len(here)):
                count = pick(pick(counts, tier), lower)
                _lower(store, tier, lower, here[tier], stays[tier], count, remembers)
    return evicted


def evicted_by(parts: Sequence[StorePart], decision: Decision) -> int:
    """How many slots a decision evicts.

    Args:
        parts (`Sequence[StorePart]`): The stores, before it is carried out.
        decision (`Decision`): The decision, its counts known on the host.

    Returns:
        `int`: Number of slots, over all sequences.
    """
    held = sum(int(part.store.lengths_on_host().sum()) for part in parts)
    return held - sum(int(on_host(counts).sum()) for counts in decision.counts)


def own_before_applying(parts: Sequence[StorePart], slots: Slots, decision: Decision, turning: bool) -> None:
    """Copies shared pages that [`apply_targets`] will write to, so that it needs no more memory for them.

    Args:
        parts (`Sequence[StorePart]`): The stores, as they were gathered.
        slots (`Slots`): The slots, as they were gathered.
        decision (`Decision`): What is to be done.
        turning (`bool`): Whether keys will be turned.

    Raises:
        CacheMemoryError: If an arena is full; what is stored is as it was.
    """
    turns = _turns(parts, slots, decision) if turning else ()
    start = 0
    for part, rows, counts in zip(parts, decision.targets, decision.counts, strict=True):
        store = part.store
        amounts = [_by_row(to_device(each[:, start : start + part.rows], rows.device), part, 0) for each in turns[:1]]
        start += part.rows
        if not store.arena.shared:
            continue
        for tier in range(len(store.layout.tiers)):
            kept = counts[tier].sum(0, dtype=torch.int32)
            # A slot that is lowered leaves its tier as well.
            store.own_before_evicting(tier, kept, counts[tier, tier] < store.lengths[tier])
            for by in amounts:
                store.own(tier, by[:, slots.columns(tier)][:, : store.width(tier)] > 0)


def _turns(parts: Sequence[StorePart], slots: Slots, decision: Decision) -> tuple[torch.Tensor, ...]:
    """How far each key is to be turned, and the seed of rounding, `[batch, rows, slots]`; nothing if nothing goes."""
    if not evicted_by(parts, decision):
        return ()
    # The age is another one at each plan, and the same whatever a sequence is batched with.
    stays = torch.cat([_by_sequence(rows, part) for rows, part in zip(decision.targets, parts, strict=True)], dim=1)
    return newer_evicted(slots.positions, slots.filled, stays < 0), slots.seen - slots.positions


def _drop(
    store: PagedStore, tier: int, marked: tuple[torch.Tensor, int], kept: torch.Tensor, *decided: torch.Tensor
) -> None:
    """Evicts the slots with a mark; what was decided on the others, each `[store rows, slots]`, moves with them."""
    marks, gone = marked
    moved = store.evict(tier, marks, kept, gone)
    if moved is not None:
        row, source, target = moved
        for values in decided:
            values[row, target] = values[row, source]


def _lower(
    store: PagedStore,
    tier: int,
    lower: int,
    decided: torch.Tensor,
    protected: torch.Tensor,
    counts: torch.Tensor,
    remembers: bool,
) -> None:
    """Moves slots to a lower tier; a few rows at a time where an arena at its limit has no room for all at once.

    A row that not a page is left for gives up what was to be lowered: it holds more than its share anyway. Of that,
    what is protected stays in its tier.
    """
    every = counts.shape[0]
    groups = [torch.arange(every)]
    while groups:
        rows = groups.pop()
        mine = torch.zeros(every, dtype=torch.bool).index_fill_(0, rows, True)
        count = derive(counts, lambda of_row, mine=mine: of_row * to_device(mine, of_row.device))  # type: ignore[misc]
        if not bool(on_host(count).any()):
            continue
        marked = decided, lower
        try:
            store.demote(tier, lower, decided, count)
        except CacheMemoryError:
            if rows.numel() > 1:
                groups += rows.tensor_split(2)
                continue
            filled = torch.arange(decided.shape[1], device=decided.device) < store.lengths[tier][:, None]
            chosen = filled & (decided == lower) & to_device(mine, decided.device)[:, None] & ~protected
            count, marked = chosen.sum(1, dtype=torch.int32), (chosen, 1)
            if remembers:
                remember_evicted(store, tier, chosen, on_host(count))
        kept = store.lengths[tier] - count
        _drop(store, tier, marked, known_as(kept, store.lengths_on_host()[tier] - on_host(count)), decided, protected)


def _by_sequence(values: torch.Tensor, part: StorePart) -> torch.Tensor:
    """`[store rows, slots]` to `[batch, rows, slots]`, the rows of layers that never arrived left out."""
    store = part.store
    shaped = values.view(store.layers, store.batch, store.geometry.kv_heads, values.shape[1])
    return shaped[: len(part.layers)].transpose(0, 1).flatten(1, 2)


def _by_row(values: torch.Tensor, part: StorePart, absent: int = -1) -> torch.Tensor:
    """The inverse of [`_by_sequence`]; rows of layers that never arrived get `absent`, which evicts as a target."""
    store = part.store
    used, heads = len(part.layers), store.geometry.kv_heads
    rows = values.view(store.batch, used, heads, values.shape[-1]).transpose(0, 1).flatten(0, 2)
    missing = store.lengths.shape[1] - rows.shape[0]
    return F.pad(rows, (0, 0, 0, missing), value=absent) if missing else rows


def _in_batch(values: torch.Tensor, part: StorePart, sequences: torch.Tensor | None) -> torch.Tensor:
    """`[gathered sequences, ...]` to `[batch, ...]`; 0, which as a target changes nothing, for those not gathered."""
    if sequences is None:
        return values
    every = values.new_zeros(part.store.batch, *values.shape[1:])
    every[to_device(sequences, values.device)] = values
    return every
