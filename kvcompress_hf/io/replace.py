"""Writing a file whole or not at all: it takes the place of an older one only when everything is on disk."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["replace_file"]

_NOT_ON_THIS_DISK = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES}


def replace_file(
    path: str | os.PathLike[str], write: Callable[[BinaryIO], None], check: Callable[[Path], None] | None = None
) -> None:
    """Writes a file that appears under its name when it is whole; until then an older file stays.

    What is unfinished has no name where the disk can do that (Linux: `O_TMPFILE`), so that not even a killed process
    leaves it behind; elsewhere it is a hidden `.part` file beside the target, removed after any error or interrupt.

    A symbolic link is followed: what it points to is replaced, and the link stays. Other hard links of the old file
    keep the old content.

    Args:
        path (`str` or `os.PathLike`): Where. The permissions of a file that is there are kept, its owner and group
            where this process may set them.
        write (`Callable`): Writes the content.
        check (`Callable`, *optional*): Given the path of the finished file before it is put in place; what it raises
            leaves the old file there.

    Raises:
        IsADirectoryError: If there is a folder of that name.
        FileExistsError: If there is a device, pipe or socket of that name, which is never replaced.
        OSError: If the folder does not exist or the disk is full; nothing is left behind then.
    """
    target = Path(os.path.realpath(path))
    old = _what_is_there(target, path)
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder to write into", os.fspath(target.parent))
    unfinished = target.with_name(f".{target.name[:50]}.{secrets.token_hex(6)}.part")
    try:
        descriptor, has_name = _create(unfinished, 0o666 if old is None else 0o600)
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            if old is not None:
                _keep_permissions(file.fileno(), old)
            os.fsync(file.fileno())
            if not has_name:
                _give_name(file.fileno(), unfinished)
        if check is not None:
            check(unfinished)
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)


def _what_is_there(target: Path, path: str | os.PathLike[str]) -> os.stat_result | None:
    try:
        old = os.stat(target)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a cache is one file, and this is a folder", os.fspath(path))
    if not stat.S_ISREG(old.st_mode):
        raise FileExistsError(
            errno.EEXIST, "not an ordinary file (a device, pipe or socket), so it is not replaced", os.fspath(path)
        )
    return old


def _create(path: Path, mode: int) -> tuple[int, bool]:
    """Opens a new file: its descriptor, and whether it has got the name already."""
    if hasattr(os, "O_TMPFILE"):
        # Other file systems than those of Linux, and old kernels, refuse it in various ways.
        with contextlib.suppress(OSError):
            descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, mode)
            if os.path.exists(_link_to(descriptor)):
                return descriptor, False
            os.close(descriptor)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, mode), True


def _link_to(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _give_name(descriptor: int, path: Path) -> None:
    # With a folder's descriptor Python follows the link in /proc, which is what names the file; without, it does not.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.link(_link_to(descriptor), path.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _keep_permissions(descriptor: int, old: os.stat_result) -> None:
    if not hasattr(os, "fchmod"):
        return
    mode = stat.S_IMODE(old.st_mode) & 0o777
    new = os.fstat(descriptor)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.fchown(descriptor, old.st_uid, old.st_gid)
        except OSError:
            with contextlib.suppress(OSError):
                os.fchown(descriptor, -1, old.st_gid)
            if os.fstat(descriptor).st_gid != old.st_gid:
                mode &= ~0o070  # what one group was allowed, another is not
    os.fchmod(descriptor, mode)


def _flush_folder(folder: Path) -> None:
    """Makes the new name outlive a power cut, where a folder can be flushed."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno in _NOT_ON_THIS_DISK:
            return  # Windows opens no folders; some folders may be written to but not read
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_ON_THIS_DISK:
            raise
    finally:
        os.close(descriptor)
