"""New tokens on their way into a store: into the tail, or, for a chunk of a prompt, straight into pages."""

import time
from functools import partial

import torch

from kvcompress_hf.observers import checked
from kvcompress_hf.paging.store import Describe, PagedStore
from kvcompress_hf.paging.waiting import known_as, to_device
from kvcompress_hf.runtime.call import AttentionCall
from kvcompress_hf.runtime.state import CacheState, LayerState


def entry_of(state: CacheState, window: int | None) -> tuple[int, int]:
    """Where new slots enter.

    Args:
        state (`CacheState`): The cache.
        window (`int`, *optional*): Sliding window of their layer: its first tokens do not stay.

    Returns:
        `tuple[int, int]`: The tier, and how many slots at the beginning of a row enter the first tier instead.
    """
    return state.entry, state.recipe.sinks_apart if window is None else 0


def describe_of(state: CacheState) -> Describe | None:
    """Finds the function that makes slot fields from keys and values, where the recipe's observer has such fields.

    Args:
        state (`CacheState`): The cache.

    Returns:
        `Callable` or `None`: The function, as [`PagedStore.describe`] calls it; `None` if there are no such fields.
    """
    observer = state.recipe.observer
    return partial(checked.describe, observer) if observer is not None and observer.describes else None


def append(
    state: CacheState, layer: LayerState, store: PagedStore, new: AttentionCall, fields: dict[str, torch.Tensor]
) -> None:
    """Puts new tokens into the tail, where they can still be taken back.

    Args:
        state (`CacheState`): The cache.
        layer (`LayerState`): The layer.
        store (`PagedStore`): Its store.
        new (`AttentionCall`): The tokens.
        fields (`dict[str, torch.Tensor]`): Their slot fields, `[batch, kv_heads, tokens]`.
    """
    store.reserve_tail(max(state.every, layer.tail_used + new.tokens))
    tail = store.tail(layer.index)
    before = tail.lengths.clone()
    store.backend.append(tail, new.key, store.rotated(new.value), new.position, new.valid)
    if fields:
        write_tail_fields(store, layer, before, new.valid, fields)
    layer.grows(new.tokens, new.valid)


def write_tail_fields(
    store: PagedStore,
    layer: LayerState,
    before: torch.Tensor,
    valid: torch.Tensor | None,
    fields: dict[str, torch.Tensor],
) -> None:
    """Puts the fields of new tokens where the tokens were appended.

    Args:
        store (`PagedStore`): The store.
        layer (`LayerState`): The layer.
        before (`torch.Tensor`): `int32` `[batch]`, the tail's lengths before.
        valid (`torch.Tensor`, *optional*): `bool` `[batch, tokens]`, false for padding.
        fields (`dict[str, torch.Tensor]`): Slot fields by name, `[batch, kv_heads, tokens]`.
    """
    tail = store.tail(layer.index)
    if tail.fields is None:
        return
    batch, heads, tokens = next(iter(fields.values())).shape
    rank = torch.arange(tail.capacity, device=before.device) - before[:, None]  # [batch, capacity]
    token = rank.clamp(0, tokens - 1)
    new = (rank >= 0) & (rank < tokens)
    if valid is not None:  # a stable sort brings the real tokens to the front in their order
        token = (~valid).to(torch.uint8).argsort(dim=1, stable=True).gather(1, token)
        new = new & (rank < valid.sum(1, keepdim=True))
    token, new = (x[:, None].expand(batch, heads, -1) for x in (token, new))
    for name, values in fields.items():
        target = tail.fields[store.layout.fields.index(name)].view(torch.float32)
        target.copy_(torch.where(new, values.gather(2, token), target))


def pack_chunk(
    state: CacheState,
    layer: LayerState,
    store: PagedStore,
    new: AttentionCall,
    fields: dict[str, torch.Tensor],
    real_on_host: torch.Tensor | None,
) -> None:
    """Packs a chunk of a prompt straight into pages; padding and what no later query can see is left out.

    Args:
        state (`CacheState`): The cache.
        layer (`LayerState`): The layer.
        store (`PagedStore`): Its store.
        new (`AttentionCall`): The tokens.
        fields (`dict[str, torch.Tensor]`): Their slot fields, `[batch, kv_heads, tokens]`.
        real_on_host (`torch.Tensor`, *optional*): `new.valid` on the host.
    """
    key, value, valid = new.key, new.value, new.valid
    batch, heads, tokens, _ = key.shape
    describe, (tier, sinks) = describe_of(state), entry_of(state, layer.window)
    if layer.tail_used:
        store.pack_tail(tier, layer.index, describe, state.tails(state.owned[store.geometry]), sinks)
        layer.emptied()
    if describe is not None:
        real = torch.ones((batch, tokens), dtype=torch.bool, device=key.device) if valid is None else valid
        fields = {**fields, **store.describe(describe, key, value, real, layer.index)}
    value = store.rotated(value)
    first = 0 if layer.window is None else max(0, tokens - layer.window + 1)
    if first:
        store.evicted = True  # rows hold fewer tokens than were seen
    index = None
    counts = to_device(torch.full((batch, heads), tokens - first, dtype=torch.int32), key.device)
    if "position" in store.layout.fields:
        positions = torch.arange(new.position, new.position + tokens, dtype=torch.int32, device=key.device)
        fields = {**fields, "position": positions.expand(batch, heads, -1)}
    if valid is not None:
        wanted = valid.clone()
        wanted[:, :first] = False
        counts = wanted.sum(1, keepdim=True, dtype=torch.int32).expand(-1, heads)
        if real_on_host is not None:
            here = real_on_host[:, first:].sum(1, keepdim=True, dtype=torch.int32)
            known_as(counts, here.expand(-1, heads))
        # A stable sort brings the wanted tokens to the front in their order.
        index = (~wanted).to(torch.uint8).argsort(dim=1, stable=True).to(torch.int32)[:, None]
        index = index.expand(-1, heads, -1)
    elif first:
        key, value = key[:, :, first:], value[:, :, first:]
        fields = {name: values[:, :, first:] for name, values in fields.items()}
    store.enter(tier, key, value, counts, index, fields, layer.index, sinks)
    state.statistics.packings += 1


def packs_next(state: CacheState) -> bool:
    """Whether something is packed at the end of this forward pass.

    Args:
        state (`CacheState`): The cache.

    Returns:
        `bool`: True after a chunk of a prompt, or once a tail is full.
    """
    if state.counters.unfinished:
        return True
    every = state.every
    return any(layer.tail_used >= every for layer in state.layers)


def pack_tails(state: CacheState) -> None:
    """Packs what is due: after a chunk of a prompt every tail, else the full ones.

    Args:
        state (`CacheState`): The cache.
    """
    started = time.perf_counter()
    every = state.every
    owners = list(state.owned.values())
    if not state.counters.unfinished:
        owners = [owned for owned in owners if state.tail_used(owned) >= every]
    state.learn_tails()
    for owned in owners:
        tier, sinks = entry_of(state, state.layers[owned.layers[0]].window)
        owned.store.pack_tail(tier, describe=describe_of(state), tails=state.tails(owned), sinks=sinks)
        for index in owned.layers:
            state.layers[index].emptied()
        state.statistics.packings += 1
    state.note_peak()
    state.statistics.seconds_packing += time.perf_counter() - started
