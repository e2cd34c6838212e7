"""Who wants a model patched, with which recipe: the last `patch`, and every `patched` block that is open.

Threads may share a model. What changes it is done under a lock of that model; the patch stays until nobody holds it.
"""

import contextvars
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from kvcompress_hf.recipe import Recipe

__all__ = ["Holder", "Holders", "enter", "leave", "lock_of", "surely"]

#: Blocks entered in this context (thread or task), the innermost last. Blocks that others ended may still be in it.
_ENTERED: contextvars.ContextVar[tuple["Holder", ...]] = contextvars.ContextVar("kvcompress_blocks", default=())

_LOCKS: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()  # type: ignore[valid-type]
_LOCKS_GUARD = threading.Lock()


def lock_of(model: nn.Module) -> threading.RLock:  # type: ignore[valid-type]
    """The lock under which a model is patched and unpatched.

    Args:
        model (`nn.Module`): The inner model. Nothing is put on it: a lock can be neither copied nor pickled.

    Returns:
        `threading.RLock`: One per model, for as long as the model lives.
    """
    with _LOCKS_GUARD:
        return _LOCKS.setdefault(model, threading.RLock())


def surely(undo: Callable[[], None]) -> None:
    """Undoes something even if an interrupt comes while it is undone; the interrupt then comes afterwards.

    Args:
        undo (`Callable`): May be called again where it was stopped.
    """
    try:
        undo()
    except BaseException:
        undo()
        raise


@dataclass(eq=False)
class Holder:
    """One `patch`, or one open `patched` block.

    Args:
        recipe (`Recipe`): What fresh caches are made with.
        route (`str`): The route that the model went then.
        check (`bool`): Whether a dry run was asked for.
        linears (`str`): What multiplies by the weights (`linears.py`).
        suspended (`Holders`, *optional*): Of a block inside of which `unpatch` was called, what comes back after it.
        left (`bool`): Of a block, whether it was left.
    """

    recipe: Recipe
    route: str
    check: bool = True
    linears: str = "auto"
    suspended: "Holders | None" = None
    left: bool = False

    def become(self, wanted: "Holder") -> None:
        """Takes over what another wants; whose it is and what it suspends stay.

        Args:
            wanted (`Holder`): What is wanted from now on.
        """
        self.recipe, self.route, self.check, self.linears = wanted.recipe, wanted.route, wanted.check, wanted.linears


@dataclass(eq=False)
class Holders:
    """All that hold one model's patch.

    Args:
        base (`Holder`, *optional*): The last `patch`, until `unpatch`.
        blocks (`list[Holder]`): Open `patched` blocks, of all threads, the newest last.
    """

    base: Holder | None = None
    blocks: list[Holder] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.base is not None or bool(self.blocks)

    def own(self) -> list[Holder]:
        """The open blocks of the calling thread or task.

        Returns:
            `list[Holder]`: The innermost last; empty outside of any block.
        """
        return [block for block in _ENTERED.get() if block in self.blocks]

    def newest(self) -> Holder | None:
        """The one whose route counts.

        Returns:
            `Holder` or `None`: `None` if nobody holds the patch.
        """
        blocks = tuple(self.blocks)  # other threads come and go
        return blocks[-1] if blocks else self.base

    def in_use_elsewhere(self) -> bool:
        """Whether other threads or tasks have blocks open, under which the route must not change.

        Returns:
            `bool`: False if all open blocks are the caller's own.
        """
        return len(self.own()) < len(self.blocks)

    def in_force(self) -> Holder | None:
        """The one whose recipe counts for the calling thread or task.

        Its own innermost block; else the last `patch`; else, as for a thread started inside a block, the newest block.

        Returns:
            `Holder` or `None`: `None` if nobody holds the patch.
        """
        own = self.own()
        return own[-1] if own else self.base or self.newest()

    def suspend(self) -> None:
        """What `unpatch` does: ends the last `patch`, and the caller's own blocks until the innermost is left."""
        own = self.own()
        if own:
            own[-1].suspended = Holders(self.base, own[:-1])
        self.base = None
        for block in own:
            self.blocks.remove(block)

    def take_back(self, suspended: "Holders") -> None:
        """Undoes [`Holders.suspend`] for whoever has not left since.

        Args:
            suspended (`Holders`): What comes back.
        """
        self.blocks += [block for block in suspended.blocks if not block.left]
        self.base = self.base or suspended.base


def enter(block: Holder) -> None:
    """Notes that the calling thread or task is in a block.

    Args:
        block (`Holder`): The block.
    """
    _ENTERED.set((*_ENTERED.get(), block))


def leave(block: Holder) -> None:
    """Undoes [`enter`], in any order of blocks; a block that was entered in another context is not there, and ignored.

    Args:
        block (`Holder`): The block.
    """
    _ENTERED.set(tuple(each for each in _ENTERED.get() if each is not block))
