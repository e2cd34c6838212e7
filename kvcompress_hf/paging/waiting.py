"""Host copies of device tensors, so that reading them needs no synchronisation.

A device works off a queue. Whoever asks it for a number waits until the queue is empty, and it then stands idle until
new work comes. So what came from the host is remembered here, several questions are asked at once, and lists whose
length only the device knows are made as long as they can get. For tensors on the CPU asking costs nothing: there all of
this is the plain operation.
"""

from collections.abc import Callable, Sequence

import torch

from kvcompress_hf.kernels.staging import send

_KNOWN = "_kvc_on_host"  # attribute of a device tensor that is not changed in place: the same values on the host


def known(values: torch.Tensor) -> torch.Tensor | None:
    """Looks up the host's copy of a tensor; never waits for a device.

    Args:
        values (`torch.Tensor`): On any device.

    Returns:
        `torch.Tensor` or `None`: The copy on the host (a tensor on the CPU is its own); `None` if there is none, so
        that the device would have to be waited for.
    """
    return values if values.device.type == "cpu" else getattr(values, _KNOWN, None)


def known_as(values: torch.Tensor, on_host: torch.Tensor) -> torch.Tensor:
    """Attaches a host copy to a tensor on a device, for [`known`] to find.

    Args:
        values (`torch.Tensor`): On any device; must not be changed in place from now on.
        on_host (`torch.Tensor`): The same values on the host.

    Returns:
        `torch.Tensor`: `values` itself.
    """
    if values.device.type != "cpu":
        setattr(values, _KNOWN, on_host)
    return values


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Sends values from the host to a device without waiting until they have arrived; the host goes on knowing them.

    Args:
        values (`torch.Tensor`): On the host, and not changed in place from now on; or on the device already.
        device (`torch.device`): Where they are needed.

    Returns:
        `torch.Tensor`: The values on `device`; `values` itself if they are there already.
    """
    if values.device == device:
        return values
    if values.device.type != "cpu":
        return values.to(device, non_blocking=True)
    return known_as(send(values, device), values)


def on_host(values: torch.Tensor) -> torch.Tensor:
    """Brings values to the host; waits for the device if the host has no copy.

    Args:
        values (`torch.Tensor`): On any device.

    Returns:
        `torch.Tensor`: The values on the host; `values` itself for a tensor on the CPU.
    """
    here = known(values)
    return values.cpu() if here is None else here


def ask(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Brings integers to the host, all those of a device by one transfer.

    Args:
        values (`Sequence[torch.Tensor]`): Integers or truth values of any shapes, on any devices.

    Returns:
        `list[torch.Tensor]`: The values of each on the host, `int64` where the device had to be asked.
    """
    answers = [known(each) for each in values]
    for device in {each.device for each, here in zip(values, answers, strict=True) if here is None}:
        asked = [i for i, each in enumerate(values) if answers[i] is None and each.device == device]
        parts = torch.cat([values[i].reshape(-1).long() for i in asked]).cpu().split([values[i].numel() for i in asked])
        for i, part in zip(asked, parts, strict=True):
            answers[i] = part.view(values[i].shape)
    return [here for here in answers if here is not None]


def pick(values: torch.Tensor, index: torch.Tensor | slice | int) -> torch.Tensor:
    """Indexes the first dimension, and the host's copy with it.

    Args:
        values (`torch.Tensor`): On any device.
        index (`torch.Tensor`, `slice` or `int`): Index into the first dimension; a tensor is on the host.

    Returns:
        `torch.Tensor`: `values[index]`, known on the host if `values` are.
    """
    there = to_device(index, values.device) if isinstance(index, torch.Tensor) else index
    here = known(values)
    return values[there] if here is None or here is values else known_as(values[there], here[index])


def derive(values: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Applies a function to values, and to the host's copy of them.

    Args:
        values (`torch.Tensor`): On any device.
        make (`Callable`): From values on any device to a new tensor there.

    Returns:
        `torch.Tensor`: `make(values)`, known on the host if `values` are.
    """
    here = known(values)
    made = make(values)
    return made if here is None or here is values else known_as(made, make(here))


def places(mask: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns where a mask is true, in this order, as `nonzero` gives them.

    Args:
        mask (`torch.Tensor`): `bool` `[rows, columns]`.
        count (`int`): In how many places it is true.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Row and column of each place, `int64` `[count]` each.
    """
    if mask.device.type == "cpu":
        row, column = torch.nonzero(mask, as_tuple=True)
        return row, column
    numbers = torch.arange(1, count + 1, dtype=torch.int32, device=mask.device)
    return _split(_numbered(mask, numbers), mask.shape[1])


def moves_into_holes(
    holes: torch.Tensor, movers: torch.Tensor, most: int, somewhere: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The moves that fill the holes of each row in ascending order with its movers in descending order.

    Args:
        holes (`torch.Tensor`): `bool` `[rows, columns]`.
        movers (`torch.Tensor`): `bool` `[rows, columns]`, as many in each row.
        most (`int`): As many moves as there may be, at least 1.
        somewhere (`int`): A row whose first column may be moved onto itself.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Row, hole and mover, `int64` `[n]` each. On a device there
        are `most` of them, the last one repeated, and where nothing moves a column is moved onto itself.
    """
    movers = movers.flip(1)
    last = holes.shape[1] - 1
    if holes.device.type == "cpu":
        row, hole = torch.nonzero(holes, as_tuple=True)
        return row, hole, last - torch.nonzero(movers, as_tuple=True)[1]
    count = holes.sum(dtype=torch.int32)
    numbers = torch.arange(1, most + 1, dtype=torch.int32, device=holes.device).clamp(max=count)
    row, hole = _split(_numbered(holes, numbers), last + 1)
    mover = last - _split(_numbered(movers, numbers), last + 1)[1]
    none = count == 0
    return row.masked_fill(none, somewhere), hole.masked_fill(none, 0), mover.masked_fill(none, 0)


def _numbered(mask: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Where the n-th true value of a mask is, counted from 1 over all rows."""
    return torch.searchsorted(mask.flatten().cumsum(0, dtype=torch.int32), numbers)


def _split(place: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return place // columns, place % columns
