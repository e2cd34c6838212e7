"""What a cache costs and what it did: numbers, tables and a heatmap. Looks in from outside."""

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvcompress_hf.paging.arena import Arena
from kvcompress_hf.paging.store import PagedStore
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.runtime.attention import PagedAttention, RunStatistics
from kvcompress_hf.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MemoryReport", "RowReport", "RunReport", "measure_memory", "measure_rows", "plot_slots"]


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a cache by kind. The parts add up to `total`, and `total` is what is really allocated.

    Args:
        payload (`int`): Codes or native elements of packed keys and values.
        metadata (`int`): Scales and offsets.
        fields (`int`): Slot fields: positions and scores.
        tail (`int`): The newest tokens, not packed yet (capacity, not only what is used), and those that are held back
            while past recording is on.
        tables (`int`): Page tables, lengths, reference counts, what else is known of the sequences, and on a GPU the
            memory that decode steps take while they run.
        slack (`int`): Unused space inside live pages.
        free (`int`): Allocated pages that nobody uses.
        forks (`int`): Pages of the same arena that only forks of this cache use.
        dense (`int`): What a `DynamicCache` would hold after the same tokens.
    """

    payload: int = 0
    metadata: int = 0
    fields: int = 0
    tail: int = 0
    tables: int = 0
    slack: int = 0
    free: int = 0
    forks: int = 0
    dense: int = 0

    @property
    def total(self) -> int:
        """`int`: Bytes allocated."""
        return (
            self.payload + self.metadata + self.fields + self.tail + self.tables + self.slack + self.free + self.forks
        )

    @property
    def ratio(self) -> float:
        """`float`: Bytes allocated as a fraction of the dense cache's; 0 for an empty cache."""
        return self.total / self.dense if self.dense else 0.0

    def __str__(self) -> str:
        parts = ("payload", "metadata", "fields", "tail", "tables", "slack", "free", "forks")
        lines = [f"{name:<10}{format_bytes(getattr(self, name)):>12}" for name in parts if getattr(self, name)]
        lines.append(
            f"{'total':<10}{format_bytes(self.total):>12}  = {self.ratio:.1%} of dense {format_bytes(self.dense)}"
        )
        return "\n".join(lines)


def measure_memory(attention: PagedAttention) -> MemoryReport:
    """Adds up what a cache has allocated.

    Args:
        attention (`PagedAttention`): The inside of a cache.

    Returns:
        `MemoryReport`: Bytes by kind.
    """
    kinds = dict.fromkeys(("payload", "metadata", "fields", "tail", "tables", "slack", "free", "forks"), 0)
    mine: dict[int, int] = {}
    for store in attention.stores:
        usage = store.usage()
        for kind in ("payload", "metadata", "fields", "tail", "tables", "slack"):
            kinds[kind] += getattr(usage, kind)
        kinds["tables"] += store.plan_bytes
        mine[id(store.arena)] = mine.get(id(store.arena), 0) + usage.pages
    for arena in attention.arenas:
        kinds["tables"] += arena.table_bytes
        kinds["free"] += (arena.pages - arena.live) * arena.page_bytes
        kinds["forks"] += (arena.live - mine.get(id(arena), 0)) * arena.page_bytes
    kinds["tables"] += attention.step_bytes
    counted = {_place(tensor) for store in attention.stores for tensor in store.tensors.values.values()}
    for kind, tensors in zip(("tables", "tail"), attention.tensors_aside(), strict=True):
        for tensor in tensors:
            if _place(tensor) not in counted:
                counted.add(_place(tensor))
                kinds[kind] += tensor.untyped_storage().nbytes()
    return MemoryReport(**kinds, dense=attention.dense_bytes())


def _place(tensor: torch.Tensor) -> tuple[torch.device, int]:
    """What tensors have in common that share memory."""
    return tensor.device, tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class RowReport:
    """What one row holds.

    Args:
        layer (`int`): Layer of the model.
        sequence (`int`): Sequence of the batch.
        head (`int`): KV head.
        slots (`dict[str, int]`): Packed slots by tier.
        tail (`int`): Slots in the tail.
        pages (`int`): Pages; one that sequences share is counted in each of them.
        nbytes (`int`): Bytes of these pages, and of the tail slots in use.
        positions (`torch.Tensor`, *optional*): `int64` `[slots]`, logical positions of what is kept, ascending (padding
            counts); `None` where the recipe has no use for them.
    """

    layer: int
    sequence: int
    head: int
    slots: dict[str, int]
    tail: int
    pages: int
    nbytes: int
    positions: torch.Tensor | None

    @property
    def kept(self) -> int:
        """`int`: Slots in all, packed or in the tail."""
        return sum(self.slots.values()) + self.tail

    def __str__(self) -> str:
        tiers = ", ".join(f"{count} in {tier}" for tier, count in self.slots.items())
        return (
            f"layer {self.layer}, sequence {self.sequence}, head {self.head}: {tiers}, {self.tail} in the tail; "
            f"{self.pages} pages, {format_bytes(self.nbytes)}"
        )


def measure_rows(attention: PagedAttention) -> list[RowReport]:
    """Looks into every row of a cache.

    Args:
        attention (`PagedAttention`): The inside of a cache.

    Returns:
        `list[RowReport]`: By layer, sequence and KV head.
    """
    reports = []
    for store, layers in zip(attention.stores, attention.layers_of_stores, strict=True):
        heads, layout = store.geometry.kv_heads, store.layout
        lengths = store.lengths.cpu()
        slots = torch.tensor([tier.slots for tier in layout.tiers])
        pages = (-(-lengths // slots[:, None])).sum(0)
        tail_slot = 2 * layout.head_dim * layout.dtype.itemsize + 4 * len(layout.fields)
        positions = store.positions()
        for row in range(len(layers) * store.rows_per_layer):
            layer, rest = divmod(row, store.rows_per_layer)
            sequence, head = divmod(rest, heads)
            tail = int(store.tail_lengths[layer, sequence])
            count = int(pages[row])
            reports.append(
                RowReport(
                    layer=layers[layer],
                    sequence=sequence,
                    head=head,
                    slots={name: int(lengths[tier, row]) for tier, name in enumerate(attention.recipe.tiers)},
                    tail=tail,
                    pages=count,
                    nbytes=count * layout.page_bytes + tail * tail_slot,
                    positions=None if positions is None else positions[row],
                )
            )
    return sorted(reports, key=lambda report: (report.layer, report.sequence, report.head))


@dataclass(frozen=True)
class CacheParts:
    """What a cache is made of, to look at: the parts themselves and no copies, so change nothing.

    Args:
        stores (`tuple[PagedStore, ...]`): Rows of layers of one shape and device each: tables, lengths, tail, layout.
        layers (`tuple[tuple[int, ...], ...]`): Layers of the model in each of the stores, in the order of its rows.
        arenas (`tuple[Arena, ...]`): The page pools: one per device and size of page.
        recipes (`tuple[Recipe, ...]`): One for all sequences, or one per sequence.
        statistics (`RunStatistics`): What was counted.
        padding (`torch.Tensor`, *optional*): `int64` `[batch]`, padding tokens seen by each sequence.
        inv_freq (`torch.Tensor`, *optional*): Radians per position of each pair of rotary channels, where the recipe
            asks for it.
        closed (`str`, *optional*): Why the cache can no longer be used, if so.
    """

    stores: tuple[PagedStore, ...]
    layers: tuple[tuple[int, ...], ...]
    arenas: tuple[Arena, ...]
    recipes: tuple[Recipe, ...]
    statistics: RunStatistics
    padding: torch.Tensor | None
    inv_freq: torch.Tensor | None
    closed: str | None

    @classmethod
    def of(cls, attention: PagedAttention) -> "CacheParts":
        """The parts of a cache.

        Args:
            attention (`PagedAttention`): The inside of the cache.

        Returns:
            `CacheParts`: As they are now; later forward passes may replace some.
        """
        return cls(
            stores=tuple(attention.stores),
            layers=tuple(map(tuple, attention.layers_of_stores)),
            arenas=tuple(attention.arenas),
            recipes=attention.recipes,
            statistics=attention.statistics,
            padding=attention.counters.padding,
            inv_freq=attention.inv_freq,
            closed=attention.rollback.closed,
        )


class RunReport:
    """What one cache did, for as long as it lives and after; keeps no tensor of the cache alive.

    Args:
        recipe (`Recipe`): The cache's recipe.
        attention (`PagedAttention`): The inside of the cache.
    """

    def __init__(self, recipe: Recipe, attention: PagedAttention) -> None:
        self.recipe = recipe
        self.statistics: RunStatistics = attention.statistics
        self._attention = weakref.ref(attention)
        self._memory = MemoryReport()
        self._tokens = self._batch = 0

    def freeze(self, waiting: bool = True) -> None:
        """Takes the last figures, just before the cache goes.

        Args:
            waiting (`bool`): Whether to wait where another thread is changing pages; if not, the bytes stay those of
                the last time.
        """
        attention = self._attention()
        if attention is None:
            return
        self._tokens, self._batch = attention.seen, attention.batch
        with contextlib.ExitStack() as held:
            for arena in attention.arenas:
                if not arena.lock.acquire(blocking=waiting):
                    return
                held.callback(arena.lock.release)
            self._memory = measure_memory(attention)

    @property
    def memory(self) -> MemoryReport:
        """`MemoryReport`: Bytes by kind, now or when the cache went."""
        self.freeze()
        return self._memory

    @property
    def tokens(self) -> int:
        """`int`: Tokens seen per sequence, padding included."""
        self.freeze()
        return self._tokens

    @property
    def batch(self) -> int:
        """`int`: Sequences."""
        self.freeze()
        return self._batch

    def __str__(self) -> str:
        s, memory = self.statistics, self.memory
        replayed = f", {s.replays} steps replayed from {s.captures} captures" if s.replays else ""
        return (
            f"{self.recipe.name}: {self._batch} x {self._tokens} tokens in {format_bytes(memory.total)} = "
            f"{memory.ratio:.1%} of dense, peak {format_bytes(s.peak_bytes)}; {s.packings} packings in "
            f"{s.seconds_packing:.3f} s, {s.plans} plans in {s.seconds_planning:.3f} s, {s.evicted_slots} slots evicted"
            f"{replayed}"
        )


def plot_slots(slots: Sequence[torch.Tensor], sequence: int = 0) -> "Figure":
    """A heatmap of the slots kept per layer and head.

    Args:
        slots (`Sequence[torch.Tensor]`): Per layer `[batch, kv_heads]`, as from `cache.slots()`.
        sequence (`int`): Which sequence of the batch.

    Returns:
        `matplotlib.figure.Figure`: Layers downwards, KV heads to the right, the number written in each cell.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If a cache is given in place of its slots.
        ValueError: If there is no such sequence.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_slots needs matplotlib; install kvcompress_hf[plot].") from error
    if hasattr(slots, "slots"):
        raise TypeError(f"plot_slots() takes the numbers of a cache, got {type(slots).__name__}; write cache.slots().")
    if not 0 <= sequence < slots[0].shape[0]:
        raise ValueError(f"sequence is {sequence}; it must be one of the {slots[0].shape[0]} of the batch, from 0.")
    heads = max(layer.shape[1] for layer in slots)
    grid = torch.full((len(slots), heads), float("nan"))
    for i, layer in enumerate(slots):
        grid[i, : layer.shape[1]] = layer[sequence].float()
    figure = Figure(figsize=(2.5 + 0.6 * heads, 1.5 + 0.4 * len(slots)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid.numpy(), aspect="auto", cmap="viridis", vmin=0)
    highest = grid.nan_to_num(0).max()
    for i in range(grid.shape[0]):
        for j in range(heads):
            if not grid[i, j].isnan():
                ink = "black" if grid[i, j] > 0.7 * highest else "white"
                axes.text(j, i, f"{int(grid[i, j])}", ha="center", va="center", color=ink, fontsize=8)
    axes.set(xlabel="KV head", ylabel="layer", title="slots kept", xticks=range(heads), yticks=range(len(slots)))
    figure.colorbar(image, label="slots")
    return figure
