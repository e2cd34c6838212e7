"""Tensors in which every sequence has a part: each is declared once, and follows the sequences by that declaration.

Selecting beams, forking, saving, loading, taking a forward pass back and counting bytes all read the declarations, so
a new tensor is one more [`Declared`].
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from kvcompress_hf.kernels import DecodePlan
from kvcompress_hf.paging.waiting import on_host, to_device


@dataclass(frozen=True)
class Declared:
    """One tensor of a store, or a family of them with one member per tier.

    Args:
        name (`str`): Its name, also in files.
        dtype (`torch.dtype`, *optional*): Its dtype; that of the keys when left out.
        dims (`tuple[str, ...]`): What each dimension counts: `"layers"`, `"batch"`, `"kv_heads"`, `"rows"` (these three
            in one), `"tiers"`, `"fields"`, `"head_dim"`, `"slots"` (room of the tail), `"columns"` (pages of the
            longest row), `"group"` (query heads of a KV head), `"newest"` (queries kept), or a number. The batch is the
            dimension `"batch"` or inside `"rows"`.
        kind (`str`, *optional*): Under what its bytes are counted: `"tables"`, `"tail"` or `"metadata"`; not at all
            with `None`.
        changed_by (`str`): What changes it in place: `"step"`, a decoded token; `"packing"`; `"statistics"`, an
            observer; `"nothing"`, as it is replaced as a whole; or `"owner"`, whose changes are never taken back.
        shared (`bool`): Whether forks go on with the same memory.
        saved (`bool`): Whether it is in files.
        on_host (`bool`): Whether it is kept on the host, wherever the store's device is.
        always (`bool`): Whether it is there from the beginning, in zeros.
    """

    name: str
    dtype: torch.dtype | None
    dims: tuple[str | int, ...]
    kind: str | None = "tables"
    changed_by: str = "step"
    shared: bool = False
    saved: bool = True
    on_host: bool = False
    always: bool = False


def shape_of(each: Declared, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Works out the shape of a declared tensor.

    Args:
        each (`Declared`): Its declaration.
        sizes (`Mapping[str, int]`): `layers`, `batch`, `kv_heads`, `head_dim`, `tiers` and `fields`; `slots`,
            `columns`, `group` and `newest` are 0 when left out.

    Returns:
        `tuple[int, ...]`: The size of each of its dimensions.
    """
    known = {"columns": 0, "slots": 0, "group": 0, "newest": 0, **sizes}
    known["rows"] = known["layers"] * known["batch"] * known["kv_heads"]
    return tuple(dim if isinstance(dim, int) else known[dim] for dim in each.dims)


def of_layers(each: Declared, value: torch.Tensor, index: torch.Tensor, sizes: Mapping[str, int]) -> torch.Tensor:
    """Picks layers out of a tensor.

    Args:
        each (`Declared`): The tensor's declaration.
        value (`torch.Tensor`): Its value.
        index (`torch.Tensor`): `int64` `[layers]`, on the value's device.
        sizes (`Mapping[str, int]`): `batch` and `kv_heads`.

    Returns:
        `torch.Tensor`: A copy that holds these layers alone, in the given order.
    """
    if "layers" in each.dims:
        return value.index_select(each.dims.index("layers"), index)
    return _of_rows(each, value, 0, index, sizes)


def _of_rows(
    each: Declared, value: torch.Tensor, part: int, index: torch.Tensor, sizes: Mapping[str, int]
) -> torch.Tensor:
    dim = each.dims.index("rows")
    # One size is left to be found out, as a file may hold fewer layers than the store.
    whole = value.unflatten(dim, (-1, sizes["batch"], sizes["kv_heads"]))
    return whole.index_select(dim + part, index).flatten(dim, dim + 2)


class SequenceTensors:
    """The declared tensors of one store; those that are not there yet have no entry in `values`.

    Args:
        declared (`Iterable[Declared]`): The declarations.
        sizes (`Mapping[str, int]`): `layers`, `batch`, `kv_heads`, `head_dim`, `tiers` and `fields`.
        dtype (`torch.dtype`): Of the keys.
        device (`torch.device`): Where tensors are made that are not kept on the host.
    """

    def __init__(
        self, declared: Iterable[Declared], sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.declared = {each.name: each for each in declared}
        self.sizes = dict(sizes)
        self.dtype, self.device = dtype, device
        self.version = 0  # changes whenever a tensor that kernels read moves in memory
        self.plans: dict[int, DecodePlan] = {}  # by layer; they keep the memory alive that they were made for
        self.values: dict[str, torch.Tensor] = {}
        self._changed_by: dict[tuple[str, ...], list[str]] = {}  # names, for `note`
        for each in self.declared.values():
            if each.always:
                self.make(each.name)

    def make(self, name: str, **sizes: int) -> torch.Tensor:
        """Makes a declared tensor anew, all zeros.

        Args:
            name (`str`): Its name.
            sizes (`int`): `slots`, `columns`, `group` or `newest`, where it has such a dimension.

        Returns:
            `torch.Tensor`: The new tensor, which is the one in `values` from now on.
        """
        self.values[name] = self.zeros(name, **sizes)
        return self.values[name]

    def zeros(self, name: str, **sizes: int) -> torch.Tensor:
        """Makes zeros of the shape and dtype of a declared tensor, which itself stays as it is.

        Args:
            name (`str`): Name of the tensor.
            sizes (`int`): As for [`SequenceTensors.make`].

        Returns:
            `torch.Tensor`: Zeros that may be changed in place inside and outside of inference mode.
        """
        each = self.declared[name]
        device = torch.device("cpu") if each.on_host else self.device
        with torch.inference_mode(False):
            return torch.zeros(self.shape(each, **sizes), dtype=each.dtype or self.dtype, device=device)

    def shape(self, each: Declared, **sizes: int) -> tuple[int, ...]:
        """Works out the shape of a tensor of this store.

        Args:
            each (`Declared`): The tensor's declaration.
            sizes (`int`): `slots` or `columns`, where it has such a dimension; other sizes in place of the store's.

        Returns:
            `tuple[int, ...]`: The size of each of its dimensions.
        """
        return shape_of(each, {**self.sizes, **sizes})

    # -- along a dimension -----------------------------------------------------------------------------------------

    def of_sequences(self, each: Declared, value: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Picks sequences out of a tensor.

        Args:
            each (`Declared`): The tensor's declaration.
            value (`torch.Tensor`): Its value.
            index (`torch.Tensor`): `int64` `[new batch]`, on the value's device.

        Returns:
            `torch.Tensor`: A copy whose sequence `i` is sequence `index[i]` of `value`.
        """
        if "batch" in each.dims:
            return value.index_select(each.dims.index("batch"), index)
        return _of_rows(each, value, 1, index, self.sizes)

    def _first_layers(self, each: Declared, value: torch.Tensor, layers: int) -> torch.Tensor:
        if "layers" in each.dims:
            return value.narrow(each.dims.index("layers"), 0, layers)
        rows = layers * self.sizes["batch"] * self.sizes["kv_heads"]
        return value.narrow(each.dims.index("rows"), 0, rows)

    # -- a life ----------------------------------------------------------------------------------------------------

    def select(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """Picks sequences out of every tensor; nothing changes yet.

        Args:
            index (`torch.Tensor`): `int64` `[new batch]`.

        Returns:
            `dict[str, torch.Tensor]`: Copies by name, whose sequence `i` is what sequence `index[i]` is now; for
            [`SequenceTensors.replace`].
        """
        near, there = on_host(index), to_device(index, self.device)
        with torch.inference_mode(False):
            return {
                name: self.of_sequences(each, self.values[name], near if each.on_host else there)
                for name, each in self.declared.items()
                if name in self.values
            }

    def replace(self, values: Mapping[str, torch.Tensor], batch: int | None = None) -> None:
        """Replaces all tensors at once.

        Args:
            values (`Mapping[str, torch.Tensor]`): The new tensors by name; what is not among them is there no more.
            batch (`int`, *optional*): Sequences they are for, where that changes.
        """
        self.values = dict(values)
        if batch is not None:
            self.sizes["batch"] = batch
        self.moved()

    def copies_for_fork(self) -> dict[str, torch.Tensor]:
        """Copies the tensors for a fork.

        Returns:
            `dict[str, torch.Tensor]`: Every tensor by name: a copy, or the very same where forks share it.
        """
        with torch.inference_mode(False):
            return {name: value if self.declared[name].shared else value.clone() for name, value in self.values.items()}

    def note(self, *changing: str) -> dict[str, torch.Tensor]:
        """What tensors hold now, to go back to by [`SequenceTensors.restore`].

        Args:
            changing (`str`): What will change in place, by [`Declared`]`.changed_by`; of these, copies are noted.
                Before anything else changes in place, a later note must have copies of it.

        Returns:
            `dict[str, torch.Tensor]`: Every tensor by name: a copy where it will change in place, else the very same.
        """
        noted: dict[str, torch.Tensor] = dict(self.values)
        if changing not in self._changed_by:
            self._changed_by[changing] = [name for name, each in self.declared.items() if each.changed_by in changing]
        names = [name for name in self._changed_by[changing] if name in noted]
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # copies that may be changed in place later, in whatever mode
                noted.update((name, noted[name].clone()) for name in names)
        else:
            for name in names:
                noted[name] = noted[name].clone()
        return noted

    def restore(self, noted: Mapping[str, torch.Tensor]) -> None:
        """Puts back what was noted, but for what owners change; may be done again if it breaks off.

        Args:
            noted (`Mapping[str, torch.Tensor]`): From [`SequenceTensors.note`].
        """
        owned = {name for name, each in self.declared.items() if each.changed_by == "owner"}
        values = {name: value for name, value in self.values.items() if name in owned}
        values.update((name, value) for name, value in noted.items() if name not in owned)
        self.values = values
        self.moved()

    def moved(self) -> None:
        """Notes that something kernels read has moved in memory; plans made before are dropped."""
        self.version += 1
        self.plans.clear()

    def clear(self) -> None:
        """Forgets everything; what is always there is zeros again."""
        self.replace({name: self.zeros(name) for name, each in self.declared.items() if each.always})

    def state(self, layers: int, used: int) -> dict[str, torch.Tensor]:
        """Collects what is saved to a file.

        Args:
            layers (`int`): How many of the first layers have rows.
            used (`int`): Slots of the tail that are used; with 0, tensors that have slots are left out.

        Returns:
            `dict[str, torch.Tensor]`: The declared tensors that are saved, by name; copies of those that change in
            place at any time.
        """
        state = {}
        for name, value in self.values.items():
            each = self.declared[name]
            if not each.saved or ("slots" in each.dims and not used):
                continue
            part = self._first_layers(each, value, layers)
            if "slots" in each.dims:
                part = part.narrow(each.dims.index("slots"), 0, used)
            state[name] = part.clone() if each.always else part
        return state

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """`dict[str, int]`: Bytes of what is there, by [`Declared`]`.kind`."""
        bytes_of: dict[str, int] = {}
        for name, value in self.values.items():
            kind = self.declared[name].kind
            if kind is not None:
                bytes_of[kind] = bytes_of.get(kind, 0) + value.nbytes
        return bytes_of
