"""The records that a cache's state is made of: what is counted, per layer and in all, and what goes into a file."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvcompress_hf.kernels import Logits
from kvcompress_hf.paging.store import PagedStore
from kvcompress_hf.paging.waiting import pick, to_device
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.runtime.call import AttentionCall
from kvcompress_hf.runtime.padding import cut_runs

__all__ = ["AttentionState", "Counters", "LayerState", "RunStatistics", "StoreLayers"]


@dataclass
class RunStatistics:
    """What happened to one cache so far.

    Args:
        packings (`int`): Times the tail or a chunk was packed, over all layers.
        plans (`int`): Times a plan was made.
        evicted_slots (`int`): Slots dropped by plans.
        seconds_packing (`float`): Wall time spent packing, in seconds.
        seconds_planning (`float`): Wall time spent observing, planning and evicting, in seconds.
        peak_bytes (`int`): Most bytes the cache ever held.
        captures (`int`): Times a decode step was captured into a graph of the device.
        replays (`int`): Decode steps that were replayed from one.
    """

    packings: int = 0
    plans: int = 0
    evicted_slots: int = 0
    seconds_packing: float = 0.0
    seconds_planning: float = 0.0
    peak_bytes: int = 0
    captures: int = 0
    replays: int = 0


@dataclass(slots=True)
class LayerState:
    """What belongs to one layer of the model.

    Args:
        window (`int`, *optional*): Sliding window in tokens.
        sharing (`str`, *optional*): `"store"`: later layers read its keys and values too; `"reuse"`: it reads those of
            an earlier one and stores nothing.
        store (`PagedStore`, *optional*): Where its rows are, once keys have arrived.
        index (`int`): Its place among the store's layers.
        group (`int`): Query heads per KV head.
        seen (`int`): Logical tokens, padding and evicted ones included.
        tail_used (`int`): Most slots any sequence has in the tail.
        uneven (`bool`): Whether sequences may have fewer, because of padding.
        tails (`torch.Tensor`, *optional*): `int32` `[batch]` on the host: how many they have, if uneven and known.
        held (`list[AttentionCall]`): The newest tokens while past recording is on, oldest first.
        plan_key (`tuple`): What its store's decode plan was made for.
        plan_room (`int`): Tokens the tail had room for then.
        logits (`Logits`, *optional*): As made at its last call; see [`LayerState.logits_of`].
        given (`tuple`): The factor, soft cap and window that the model gave then.
        sinks (`torch.Tensor`, *optional*): The sinks that it gave then.
        sinks_stamp (`tuple[int, int]`, *optional*): Where those were, and how often they had been written to.
    """

    window: int | None
    sharing: str | None = None
    store: PagedStore | None = None
    index: int = 0
    group: int = 1
    seen: int = 0
    tail_used: int = 0
    uneven: bool = False
    tails: torch.Tensor | None = None
    held: list[AttentionCall] = field(default_factory=list)
    plan_key: tuple[object, ...] = (None,)
    plan_room: int = 0
    logits: Logits | None = None
    given: tuple[object, ...] = ()
    sinks: torch.Tensor | None = None
    sinks_stamp: tuple[int, int] | None = None

    def logits_of(self, scale: float, softcap: float | None, window: int | None, sinks: torch.Tensor | None) -> Logits:
        """How the layer makes logits, as kernels take it.

        Args:
            scale (`float`): Factor on the logits.
            softcap (`float`, *optional*): Soft cap on the logits.
            window (`int`, *optional*): Sliding window in tokens.
            sinks (`torch.Tensor`, *optional*): Extra logit per query head, `[q_heads]`, in any dtype.

        Returns:
            `Logits`: The very object of the last call where nothing has changed since, so that what was prepared for
            it is used again and the sinks are converted once.
        """
        same = sinks is self.sinks and self.given == (scale, softcap, window)
        if same and sinks is None and self.logits is not None:
            return self.logits
        stamp = None if sinks is None else _stamp_of(sinks)
        if self.logits is None or not same or stamp != self.sinks_stamp:
            converted = None if sinks is None else sinks.detach().float().contiguous()
            self.logits, self.given = Logits(scale, softcap, window, converted), (scale, softcap, window)
            self.sinks, self.sinks_stamp = sinks, stamp
        return self.logits

    def grows(self, tokens: int, valid: torch.Tensor | None) -> None:
        """Notes new tokens in the tail.

        Args:
            tokens (`int`): How many new tokens there are, padding included.
            valid (`torch.Tensor`, *optional*): `bool` `[batch, tokens]`; where it is given, some may be padding.
        """
        self.tail_used += tokens
        if valid is not None:
            self.uneven = True
        self.tails = None

    def emptied(self) -> None:
        """Notes that the tail is empty."""
        self.tail_used, self.uneven, self.tails = 0, False, None

    def copy(self, **changes: Any) -> "LayerState":
        """A copy that does not change with this one.

        Args:
            changes: Fields that are to be different.

        Returns:
            `LayerState`: A copy with a list of held tokens of its own, for which no decode plan has been made yet.
        """
        return replace(self, **{"held": list(self.held), "plan_key": (None,), **changes})


def _stamp_of(tensor: torch.Tensor) -> tuple[int, int]:
    """What differs once a tensor has been written to or given other memory."""
    try:
        return tensor.data_ptr(), tensor._version
    except RuntimeError:  # tensors of inference mode do not count how often they are written to
        return tensor.data_ptr(), 0


@dataclass
class StoreLayers:
    """A store and the layers of the model whose rows it holds, in the order of arrival."""

    store: PagedStore
    layers: list[int] = field(default_factory=list)


@dataclass
class Counters:
    """What a cache counts and remembers besides its stores; all of it is forked, taken back and reset together.

    Args:
        recipes (`tuple[Recipe, ...]`): One for all sequences, or one per sequence.
        seen (`int`): Logical tokens.
        batch (`int`): Sequences.
        prompt (`int`): Tokens that came in chunks; what follows was decoded one by one.
        planned (`int`): Tokens seen at the last plan.
        faded (`int`): Tokens seen when statistics last faded.
        unfinished (`bool`): Whether several tokens have been stored whose plan has not run yet.
        awaits_second_reading (`bool`): Whether the prompt is planned for once it has been read again.
        padding (`torch.Tensor`, *optional*): `int64` `[batch]`, padding tokens seen.
        gaps (`torch.Tensor`, *optional*): `int64` `[batch, runs, 2]` on the host, first position and length of each run
            of padding.
        distortion (`dict[int, torch.Tensor]`): Measured losses by layer, float32 `[batch, kv_heads, tiers]`.
        room (`int`, *optional*): Bytes of pages that the budget still allowed at the last event.
    """

    recipes: tuple[Recipe, ...]
    seen: int = 0
    batch: int = 0
    prompt: int = 0
    planned: int = 0
    faded: int = 0
    unfinished: bool = False
    awaits_second_reading: bool = False
    padding: torch.Tensor | None = None
    gaps: torch.Tensor | None = None
    distortion: dict[int, torch.Tensor] = field(default_factory=dict)
    room: int | None = None

    def copy(self) -> "Counters":
        """A copy that does not change with this one.

        Returns:
            `Counters`: A copy that shares the tensors, as those are never changed in place.
        """
        other = object.__new__(Counters)
        other.__dict__.update(self.__dict__)
        other.distortion = dict(self.distortion)
        return other

    def uncount_padding(self, seen: int) -> None:
        """Forgets padding among tokens that are taken back.

        Args:
            seen (`int`): Tokens that are left.
        """
        if self.gaps is None or self.padding is None:
            return
        left = cut_runs(self.gaps, seen)
        gone = to_device((self.gaps - left)[..., 1].sum(1), self.padding.device)
        self.padding, self.gaps = self.padding - gone, left

    def select(self, index: torch.Tensor) -> "Counters":
        """Picks sequences of the batch.

        Args:
            index (`torch.Tensor`): `int64` `[new batch]` on the host.

        Returns:
            `Counters`: A copy whose sequence `i` is this one's sequence `index[i]`.
        """
        recipes = self.recipes
        return replace(
            self,
            batch=index.numel(),
            padding=None if self.padding is None else pick(self.padding, index),
            gaps=None if self.gaps is None else self.gaps[index],
            distortion={layer: pick(losses, index) for layer, losses in self.distortion.items()},
            recipes=recipes if len(recipes) == 1 else tuple(recipes[i] for i in index.tolist()),
        )


@dataclass(frozen=True)
class AttentionState:
    """What a cache knows besides its stores, as it goes into a file.

    Args:
        seen (`int`): Logical tokens.
        batch (`int`): Sequences.
        prompt (`int`): Tokens of `seen` up to the end of the last chunk.
        prompt_tokens (`int`, *optional*): Length of the prompt, where it was known beforehand.
        planned (`int`): Tokens seen at the last plan.
        faded (`int`): Tokens seen when statistics last faded.
        recording (`bool`): Whether new tokens are held back in the tail.
        unfinished (`bool`): Whether a plan is still to be made.
        groups (`list[int]`): Query heads per KV head of each layer.
        tail_used (`list[int]`): Most slots any sequence has in the tail, per layer.
        padding (`torch.Tensor`, *optional*): `int64` `[batch]`.
        gaps (`torch.Tensor`, *optional*): `int64` `[batch, runs, 2]`, see [`Counters`].
        distortion (`torch.Tensor`, *optional*): Measured losses, float32 `[batch, heads of all layers, tiers]`, NaN for
            sequences that had only padding so far.
    """

    seen: int = 0
    batch: int = 0
    prompt: int = 0
    prompt_tokens: int | None = None
    planned: int = 0
    faded: int = 0
    recording: bool = False
    unfinished: bool = False
    groups: list[int] = field(default_factory=list)
    tail_used: list[int] = field(default_factory=list)
    padding: torch.Tensor | None = None
    gaps: torch.Tensor | None = None
    distortion: torch.Tensor | None = None
