"""What one cache holds: which layer's rows are in which store, whose pages are in which arena, and what was counted."""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch

from kvcompress_hf import kernels
from kvcompress_hf.paging.arena import Arena
from kvcompress_hf.paging.geometry import Geometry
from kvcompress_hf.paging.key_turn import Rotation
from kvcompress_hf.paging.store import PagedStore
from kvcompress_hf.paging.waiting import ask, known, known_as
from kvcompress_hf.recipe import TIERS, Recipe
from kvcompress_hf.runtime.records import AttentionState, Counters, LayerState, RunStatistics, StoreLayers

__all__ = ["AttentionState", "CacheState", "Counters", "LayerState", "RunStatistics", "StoreLayers", "layout_for"]

_COUNTED_IN_FILES = tuple(
    {f.name for f in fields(AttentionState)} & {f.name for f in fields(Counters)} - {"distortion"}
)


class CacheState:
    """Layers, stores and arenas of one cache, and its counters.

    Args:
        recipes (`Sequence[Recipe]`): How to compress: one recipe for all sequences, or one per sequence of the batch,
            which differ in budget, plan and protection only.
        windows (`Sequence[int | None]`): Sliding window of each layer, `None` for full attention.
        prompt_tokens (`int`, *optional*): Length of the prompt in tokens when it is known beforehand; a fraction
            budget is then a fraction of the whole prompt from its first chunk on.
        max_bytes (`int`, *optional*): Most bytes of pages per device.
        sharing (`Sequence[str | None]`, *optional*): Per layer `"store"` where later layers read its keys and values as
            well, `"reuse"` where it reads those of an earlier layer and has none itself, else `None`.
        inv_freq (`torch.Tensor`, *optional*): Radians per position of each pair of rotary channels, float32 `[pairs]`,
            for recipes with `positions="reindexed"`.
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        windows: Sequence[int | None],
        prompt_tokens: int | None = None,
        max_bytes: int | None = None,
        sharing: Sequence[str | None] | None = None,
        inv_freq: torch.Tensor | None = None,
    ) -> None:
        self.recipe = recipes[0]  # what sequences share: observer, tiers, when
        self.given_recipes = tuple(recipes)
        self.prompt_tokens, self.max_bytes, self.inv_freq = prompt_tokens, max_bytes, inv_freq
        #: How position turns the queries of each layer, where the observer asks for it and the model has told.
        self.rotations: Sequence[Rotation | None] = ()
        self.recording = False
        self.statistics = RunStatistics()
        self.counters = Counters(self.given_recipes)
        shares = [None] * len(windows) if sharing is None else sharing
        self.layers = [LayerState(window, mode) for window, mode in zip(windows, shares, strict=True)]
        self.owned: dict[Geometry, StoreLayers] = {}
        self.pools: dict[tuple[torch.device, int], Arena] = {}

    # -- looking inside --------------------------------------------------------------------------------------------

    @property
    def seen(self) -> int:
        """`int`: Logical tokens."""
        return self.counters.seen

    @property
    def batch(self) -> int:
        """`int`: Sequences, 0 while empty."""
        return self.counters.batch

    @property
    def awaits_second_reading(self) -> bool:
        """`bool`: Whether the prompt is stored, and planned for once it has been read again."""
        return self.counters.awaits_second_reading

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """`tuple[Recipe, ...]`: One for all sequences, or one per sequence."""
        return self.counters.recipes

    @property
    def entry(self) -> int:
        """`int`: The tier that new slots enter, but for sinks that are stored apart: the best that any may stay in."""
        if self.recipe.sinks_apart:
            return 1
        return min(tier for recipe in self.recipes for tier in recipe.resting_tiers)

    @property
    def every(self) -> int:
        """`int`: Tokens that gather in the tails before they are packed."""
        when = self.recipe.when
        if when.tight is None or any(len(each.resting_tiers) == len(each.tiers) for each in self.recipes):
            return when.every
        return min(when.every, when.tight)

    @property
    def windows(self) -> list[int | None]:
        """`list[int | None]`: Sliding window of each layer."""
        return [layer.window for layer in self.layers]

    @property
    def sharing(self) -> list[str | None]:
        """`list[str | None]`: Per layer whether its keys and values are read by others, or are those of another."""
        return [layer.sharing for layer in self.layers]

    @property
    def num_layers(self) -> int:
        """`int`: Layers of the model."""
        return len(self.layers)

    def rotation_of(self, layer: LayerState) -> Rotation | None:
        """How position turns the queries of a layer that has a place.

        Args:
            layer (`LayerState`): The layer.

        Returns:
            `Rotation` or `None`: `None` where that is not known.
        """
        if layer.store is None or not self.rotations:
            return None
        return self.rotations[self.owned[layer.store.geometry].layers[layer.index]]

    @property
    def guesses(self) -> bool:
        """`bool`: Whether the observer wanted to look further than it can in some layer, so that it may be wrong."""
        observer = self.recipe.observer
        if observer is None or not observer.needs_rotary:
            return False
        return any(self.rotation_of(layer) is None for layer in self.layers if layer.store is not None)

    @property
    def has_forks(self) -> bool:
        """`bool`: Whether other caches take pages from the same arenas."""
        mine = {id(owned.store) for owned in self.owned.values()}
        return any(arena.has_other_owners(mine) for arena in self.pools.values())

    @property
    def stores(self) -> list[PagedStore]:
        """`list[PagedStore]`: One per shape of layer and device."""
        return [owned.store for owned in self.owned.values()]

    @property
    def layers_of_stores(self) -> list[list[int]]:
        """`list[list[int]]`: Layers of the model in each of the stores, in the order of its rows."""
        return [list(owned.layers) for owned in self.owned.values()]

    @property
    def arenas(self) -> list[Arena]:
        """`list[Arena]`: The page pools."""
        return list(self.pools.values())

    @property
    def nbytes(self) -> int:
        """`int`: Bytes allocated for slabs, tables, tails, decode plans and their steps."""
        pools = sum(arena.nbytes + arena.table_bytes for arena in self.pools.values())
        stores = sum(owned.store.own_bytes + owned.store.plan_bytes for owned in self.owned.values())
        return pools + stores + self.step_bytes

    @property
    def step_bytes(self) -> int:
        """`int`: Bytes that decode steps take as they run; on a device, layers use the same ones in turn."""
        most: dict[torch.device, int] = {}
        for store in (owned.store for owned in self.owned.values()):
            most[store.arena.device] = max(store.step_bytes, most.get(store.arena.device, 0))
        return sum(most.values())

    def slots_per_head(self) -> list[torch.Tensor]:
        """Slots kept in each row.

        Returns:
            `list[torch.Tensor]`: Slots of each row, `int64` `[batch, kv_heads]` per layer of the model; a layer that
            never ran has no rows.
        """
        slots = {id(owned.store): owned.store.slots() for owned in self.owned.values()}
        return [
            torch.zeros((self.batch, 0), dtype=torch.int64)
            if layer.store is None
            else slots[id(layer.store)][layer.index]
            for layer in self.layers
        ]

    def dense_bytes(self) -> int:
        """Works out what a `DynamicCache` would hold after the same tokens, padding included.

        Returns:
            `int`: Bytes of its keys and values.
        """
        total = 0
        for layer in self.layers:
            if layer.store is not None:
                geometry = layer.store.geometry
                tokens = layer.seen if layer.window is None else min(layer.seen, layer.window - 1)
                total += 2 * self.batch * geometry.kv_heads * geometry.head_dim * geometry.dtype.itemsize * tokens
        return total

    def note_peak(self) -> None:
        """Remembers the bytes held now, if they are more than ever."""
        self.statistics.peak_bytes = max(self.statistics.peak_bytes, self.nbytes)

    # -- tails -----------------------------------------------------------------------------------------------------

    def tail_used(self, owned: StoreLayers) -> int:
        """Finds the longest tail of a store.

        Args:
            owned (`StoreLayers`): The store and its layers.

        Returns:
            `int`: Slots of the sequence that has the most there.
        """
        return max((self.layers[index].tail_used for index in owned.layers), default=0)

    def tails(self, owned: StoreLayers) -> torch.Tensor | None:
        """Slots in the tails of a store, as far as the host knows.

        Args:
            owned (`StoreLayers`): The store.

        Returns:
            `torch.Tensor` or `None`: `int32` `[layers of the store, batch]`; `None` if only the device knows.
        """
        here = known(owned.store.tail_lengths)
        if here is not None:
            return here
        lengths = torch.zeros((owned.store.layers, self.batch), dtype=torch.int32)
        for row, index in zip(lengths, owned.layers, strict=False):
            layer = self.layers[index]
            if layer.uneven and layer.tails is None:
                return None
            row.copy_(layer.tails) if layer.uneven and layer.tails is not None else row.fill_(layer.tail_used)
        return lengths

    def learn_tails(self) -> None:
        """Asks, at once, for what masks have left to the devices: tails of uneven lengths, and the padding so far."""
        owners = [owned for owned in self.owned.values() if self.tails(owned) is None]
        padding = [] if self.counters.padding is None else [self.counters.padding]
        answers = ask([*(owned.store.tail_lengths for owned in owners), *padding])
        for owned, tails in zip(owners, answers, strict=False):
            for index, row in zip(owned.layers, tails, strict=False):
                self.layers[index].tails = row
        for asked, answer in zip(padding, answers[len(owners) :], strict=True):
            known_as(asked, answer)

    def losses(self) -> list[torch.Tensor]:
        """Brings the measured losses of all layers to the host, by one transfer per device.

        Returns:
            `list[torch.Tensor]`: The losses of each layer that was measured, float32 `[batch, kv_heads, tiers]`.
        """
        distortion = self.counters.distortion
        bits = ask([losses.view(torch.int32) for losses in distortion.values()])
        here = [each.to(torch.int32).view(torch.float32) for each in bits]
        self.counters.distortion = dict(zip(distortion, here, strict=True))
        return here

    def give_back(self) -> None:
        """Lets arenas return what is free beyond what comes next."""
        self._drop_decode_plans()
        room = self.counters.room
        for arena in self.pools.values():
            arena.trim(None if room is None else room // len(self.pools))
        self._drop_decode_plans()

    def _drop_decode_plans(self) -> None:
        """Drops decode plans that are not right any more: each holds on to the tables and slabs it was made for."""
        for owned in self.owned.values():
            tensors = owned.store.tensors
            made_for = {self.layers[index].plan_key[0] for index in owned.layers}
            if not owned.store.backend.decodes_on or made_for != {tensors.version}:
                tensors.plans.clear()

    # -- places ----------------------------------------------------------------------------------------------------

    def place(self, layer_idx: int, key: torch.Tensor) -> PagedStore:
        """Finds or makes the store for a layer when its first keys arrive.

        Args:
            layer_idx (`int`): Index of the layer.
            key (`torch.Tensor`): Its first keys, `[batch, kv_heads, tokens, head_dim]`.

        Returns:
            `PagedStore`: The store in which the layer has its rows from now on.

        Raises:
            ValueError: If the keys are of another batch than the cache holds.
        """
        layer = self.layers[layer_idx]
        batch, heads, _, head_dim = key.shape
        if batch != self.batch:
            raise ValueError(f"The cache holds {self.batch} sequences, but keys of {batch} arrived; use a fresh cache.")
        geometry = Geometry(key.device, key.dtype, heads, head_dim, layer.window is not None)
        owned = self.owned.get(geometry)
        if owned is None:
            layout = layout_for(self.recipes, geometry)
            place = (key.device, layout.page_bytes)
            if place not in self.pools:
                self.pools[place] = Arena(layout.page_bytes, key.device, self.max_bytes)
            alike = sum(
                (other.window is None) == (layer.window is None) for other in self.layers if other.sharing != "reuse"
            )
            backend = kernels.get_backend(key.device)
            pool, rotates = self.pools[place], self.recipe.rotates_values
            owned = StoreLayers(PagedStore(geometry, alike, batch, layout, pool, backend, rotates))
            self.owned[geometry] = owned
        layer.store, layer.index = owned.store, len(owned.layers)
        owned.layers.append(layer_idx)
        return owned.store

    # -- the past as a whole ---------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forgets all tokens and gives all pages back; what was set beforehand stays."""
        for owned in self.owned.values():
            owned.store.close()
        for arena in self.pools.values():
            arena.trim()
        # Layers first: were this interrupted, they would hold stores that nobody else knows of.
        self.layers = [LayerState(layer.window, layer.sharing) for layer in self.layers]
        self.owned.clear()
        self.pools.clear()
        self.counters = Counters(self.given_recipes)

    def share_with(self, other: "CacheState") -> None:
        """Fills an empty state of the same kind with what this one holds; pages are shared.

        Args:
            other (`CacheState`): To be filled.
        """
        other.recording, other.counters = self.recording, self.counters.copy()
        other.pools = dict(self.pools)
        for geometry, owned in self.owned.items():
            other.owned[geometry] = StoreLayers(owned.store.fork(), list(owned.layers))
        other.layers = [
            layer.copy(store=None if layer.store is None else other.owned[layer.store.geometry].store)
            for layer in self.layers
        ]

    def state(self) -> AttentionState:
        """Collects what a file must hold besides the stores; the inverse of [`CacheState.load_state`].

        Returns:
            `AttentionState`: Numbers and tensors that are not changed in place later.

        Raises:
            RuntimeError: If a forward pass is under way or stopped half way, or recorded tokens wait for `crop`.
        """
        if any(layer.store is not None and layer.seen != self.seen for layer in self.layers):
            raise RuntimeError("A forward pass is not through yet; save the cache between two forward passes.")
        if any(layer.held for layer in self.layers):
            raise RuntimeError("Recorded tokens may still be taken back; to save, call crop(0) first.")
        losses = self.losses()
        by_layer = dict(zip(self.counters.distortion, losses, strict=True))
        return AttentionState(
            **{name: getattr(self.counters, name) for name in _COUNTED_IN_FILES},
            prompt_tokens=self.prompt_tokens,
            recording=self.recording,
            groups=[layer.group for layer in self.layers],
            tail_used=[layer.tail_used for layer in self.layers],
            distortion=torch.cat([by_layer[i] for i in sorted(by_layer)], dim=1) if by_layer else None,
        )

    def load_state(self, state: AttentionState, stores: Sequence[tuple[PagedStore, Sequence[int]]]) -> None:
        """Fills an empty cache; nothing is checked here.

        Args:
            state (`AttentionState`): As from [`CacheState.state`].
            stores (`Sequence[tuple[PagedStore, Sequence[int]]]`): Filled stores, and the layers of the model whose rows
                each of them holds.
        """
        self.prompt_tokens, self.recording = state.prompt_tokens, state.recording
        distortion: dict[int, torch.Tensor] = {}
        heads = {layer: store.geometry.kv_heads for store, layers in stores for layer in layers}
        if state.distortion is not None:
            parts = state.distortion.split([heads[layer] for layer in sorted(heads)], dim=1)
            distortion = dict(zip(sorted(heads), parts, strict=True))
        counted = {name: getattr(state, name) for name in _COUNTED_IN_FILES}
        self.counters = replace(self.counters, **counted, distortion=distortion)
        for store, layers in stores:
            self.owned[store.geometry] = StoreLayers(store, list(layers))
            self.pools[store.geometry.device, store.arena.page_bytes] = store.arena
            for index, layer_idx in enumerate(layers):
                layer = self.layers[layer_idx]
                layer.store, layer.index, layer.seen = store, index, state.seen
                layer.group, layer.tail_used = state.groups[layer_idx], state.tail_used[layer_idx]
                layer.uneven = True  # assumed until measured
        self.note_peak()


def layout_for(recipes: Sequence[Recipe], geometry: Geometry, page_bytes: int | None = None) -> kernels.PageLayout:
    """Works out what the pages of a cache look like.

    Args:
        recipes (`Sequence[Recipe]`): Its recipes: tiers, page size, which tiers slots stay in, and whether slots need
            positions and scores.
        geometry (`Geometry`): Shape and dtype of the keys.
        page_bytes (`int`, *optional*): Size of pages that there are already, as in a file.

    Returns:
        `PageLayout`: Size and sections of a page in each of the recipes' tiers.

    Raises:
        ValueError: If pages of that size, or the recipes', hold too little, or `head_dim` is not supported.
    """
    recipe = recipes[0]
    observed = () if recipe.observer is None else recipe.observer.fields
    slot_fields = ("position", *observed) if recipe.evicts or geometry.windowed else ()
    tiers = [TIERS[name] for name in recipe.tiers]
    resting = sorted({tier for each in recipes for tier in each.resting_tiers})
    size = recipe.page_bytes if page_bytes is None else page_bytes
    return kernels.page_layout(geometry.head_dim, geometry.dtype, tiers, slot_fields, size, resting)
