"""The errors a person can meet. Each message names the value got, what is allowed, and what to do."""

__all__ = [
    "CacheFormatError",
    "CacheMemoryError",
    "ModelNotFetchedError",
    "UnsupportedFeatureError",
    "UnsupportedModelError",
    "is_out_of_memory",
]


class UnsupportedModelError(ValueError):
    """The model cannot be patched; the message says which part of it stands in the way."""


class UnsupportedFeatureError(NotImplementedError):
    """A feature was asked for that this cache, recipe or transformers version does not support."""


class CacheMemoryError(RuntimeError):
    """The cache would grow beyond its `max_bytes`. The cache is left valid, as it was before the call."""


class CacheFormatError(ValueError):
    """A cache file is damaged, or was made for another model."""


class ModelNotFetchedError(OSError):
    """A real model of `kvcompress models` is not on this machine and could not be fetched, or may not be without a word
    of the user's; the message says why and what to do."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, which tells nothing about what was tried.

    Args:
        error (`BaseException`): Any error.

    Returns:
        `bool`: True for Python's and torch's errors of this kind. On the CPU torch raises a bare `RuntimeError`, which
        only its words tell from others.
    """
    import torch  # only here: the command's --help and the names of errors need none of it

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
