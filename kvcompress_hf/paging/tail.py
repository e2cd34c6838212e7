"""The newest slots of every row, in the dtype of the model and not packed yet."""

import torch

from kvcompress_hf.kernels import PageLayout
from kvcompress_hf.kernels import Tail as TailViews
from kvcompress_hf.paging.sequence_tensors import Declared, SequenceTensors

_STATES = ("layers", "batch", "kv_heads", "slots", "head_dim")


def declare_tail(layout: PageLayout) -> list[Declared]:
    """Declares the tensors of a tail.

    Args:
        layout (`PageLayout`): Layout of the store's pages; slots of the tail have the same fields.

    Returns:
        `list[Declared]`: Lengths; keys, values, positions and fields, which forks share until one of them writes.
    """
    common = {"kind": "tail", "shared": True}
    tail = [
        Declared("tail_lengths", torch.int32, ("layers", "batch"), always=True),
        # Only what lies behind the lengths is written to, so of these no copy is needed to go back.
        Declared("tail_keys", None, _STATES, changed_by="nothing", **common),  # type: ignore[arg-type]
        Declared("tail_values", None, _STATES, changed_by="nothing", **common),  # type: ignore[arg-type]
        Declared("tail_positions", torch.int32, ("layers", "batch", "slots"), changed_by="nothing", **common),  # type: ignore[arg-type]
    ]
    if layout.fields:
        dims = ("layers", "fields", "batch", "kv_heads", "slots")
        tail.append(Declared("tail_fields", torch.int32, dims, changed_by="statistics", **common))  # type: ignore[arg-type]
    return tail


class TailSlots:
    """The tail of all layers of a store.

    Args:
        tensors (`SequenceTensors`): The store's tensors, those of the tail among them.
    """

    def __init__(self, tensors: SequenceTensors) -> None:
        self.tensors = tensors
        self.shared = False  # whether a fork may still read the same memory

    def views(self, layer: int) -> TailViews:
        """Shows the tail of one layer to the kernels; it must have been reserved.

        Args:
            layer (`int`): Index of the layer.

        Returns:
            `Tail`: Views of the layer's keys, values, lengths, positions and fields.
        """
        values = self.tensors.values
        if "tail_keys" not in values:
            raise RuntimeError("The tail was used before reserve_tail().")
        fields = values.get("tail_fields")
        return TailViews(
            k=values["tail_keys"][layer],
            v=values["tail_values"][layer],
            lengths=values["tail_lengths"][layer],
            positions=values["tail_positions"][layer],
            fields=None if fields is None else fields[layer],
        )

    @property
    def capacity(self) -> int:
        """`int`: Tokens it has room for."""
        keys = self.tensors.values.get("tail_keys")
        return 0 if keys is None else keys.shape[3]

    @property
    def lengths(self) -> torch.Tensor:
        """`torch.Tensor`: Slots each sequence has, `int32` `[layers, batch]`."""
        return self.tensors.values["tail_lengths"]

    def reserve(self, capacity: int) -> None:
        """Makes it private to this store and large enough.

        Args:
            capacity (`int`): Tokens per row there must be room for, those already there included.
        """
        tensors, old = self.tensors, self.capacity
        if "tail_keys" in tensors.values and not self.shared and capacity <= old:
            return
        wider: dict[str, torch.Tensor] = {}
        for name, each in tensors.declared.items():
            if "slots" not in each.dims:
                continue
            wider[name] = tensors.zeros(name, slots=max(capacity, old))
            if name in tensors.values:
                wider[name].narrow(each.dims.index("slots"), 0, old).copy_(tensors.values[name])
        with torch.inference_mode(False):
            wider["tail_lengths"] = self.lengths.clone()
        tensors.replace({**tensors.values, **wider})
        self.shared = False

    def drop(self) -> None:
        """Gives its memory back; it must be empty."""
        tensors = self.tensors
        if "tail_keys" in tensors.values:
            kept = {name: x for name, x in tensors.values.items() if "slots" not in tensors.declared[name].dims}
            tensors.replace(kept)
            self.shared = False

    def crop(self, position: int) -> None:
        """Forgets slots at or behind a position.

        Args:
            position (`int`): First logical position to forget.
        """
        positions = self.tensors.values.get("tail_positions")
        if positions is None:
            return
        used = torch.arange(self.capacity, device=positions.device) < self.lengths[..., None]
        with torch.inference_mode(False):
            self.tensors.values["tail_lengths"] = (used & (positions < position)).sum(-1, dtype=torch.int32)
        self.tensors.moved()

    def empty(self, part: slice) -> None:
        """Notes that some layers have no slots there any more.

        Args:
            part (`slice`): The layers whose tail has been emptied.
        """
        if self.shared:
            with torch.inference_mode(False):
                self.tensors.values["tail_lengths"] = self.lengths.clone()
            self.tensors.moved()
        self.lengths[part] = 0
