"""Kernels compiled on this machine, kept in the user's cache folder; what others could have written is not used.

Device code runs with the rights of the process on the GPU, so a file is only used if nobody else can have put it there:
folder and file belong to the user, nobody else may write to them, and the file holds what was once compiled under its
name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import warnings
from pathlib import Path

__all__ = ["KernelCache"]

_MAGIC = b"kvcompress_hf kernel 1\n"
_DIGEST = 32  # bytes of SHA-256
_MOST = 64 * 2**20  # bytes of a file; kernels take some hundred kB


class KernelCache:
    """A folder of compiled kernels.

    Args:
        folder: Where; made when something is kept. `None` keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @classmethod
    def of_user(cls) -> KernelCache:
        """The cache of the user who runs this process.

        Returns:
            The one in `$XDG_CACHE_HOME`, or else in `~/.cache`.
        """
        base = os.environ.get("XDG_CACHE_HOME", "")
        if os.path.isabs(base):  # the convention says to ignore others
            return cls(Path(base) / "kvcompress_hf")
        with contextlib.suppress(RuntimeError):  # a user without a home
            return cls(Path.home() / ".cache" / "kvcompress_hf")
        return cls(None)

    def read(self, key: str) -> bytes | None:
        """What was kept under a name.

        Args:
            key: The name.

        Returns:
            The device code; `None` if there is none, or it is damaged or could be from somebody else.
        """
        if self.folder is None or not self._is_ours(make=False):
            return None
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with os.fdopen(os.open(self._path(key), flags), "rb") as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode) or not _only_ours(found) or found.st_size > _MOST:
                    return None
                content = file.read(_MOST)
        except OSError:
            return None
        header, code = content[: len(_MAGIC) + _DIGEST], content[len(_MAGIC) + _DIGEST :]
        return code if header == _header(key, code) else None

    def write(self, key: str, code: bytes) -> None:
        """Keeps device code, for the next process.

        Args:
            key: A name that says all that the code depends on.
            code: The code. A folder that cannot be written to costs time at the next start, nothing else.
        """
        if self.folder is None or not self._is_ours(make=True):
            return
        path = self._path(key)
        unfinished = path.with_name(f".{secrets.token_hex(8)}.part")
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(unfinished, flags, 0o600), "wb") as file:
                file.write(_header(key, code) + code)
            unfinished.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def _path(self, key: str) -> Path:
        return Path(self.folder or ".") / f"{key}.cubin"

    def _is_ours(self, make: bool) -> bool:
        """Whether the folder is there and nobody else can write to it; one of ours is closed to others."""
        folder = Path(self.folder or ".")
        try:
            if make:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = os.stat(folder)
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not _only_ours(found):
                os.chmod(folder, stat.S_IMODE(found.st_mode) & ~0o022)
                found = os.stat(folder)
        except OSError:
            return False
        if stat.S_ISDIR(found.st_mode) and _only_ours(found):
            return True
        warnings.warn(
            f"Compiled kernels are not kept in {folder}: it is not a folder that belongs to this user alone. They are "
            "compiled anew by every process; set XDG_CACHE_HOME to a folder of your own.",
            stacklevel=2,
        )
        return False


def _only_ours(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _header(key: str, code: bytes) -> bytes:
    """What a file begins with: code under another name, cut off or changed has another."""
    return _MAGIC + hashlib.sha256(key.encode() + b"\0" + code).digest()
