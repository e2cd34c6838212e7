"""Everything this package knows of the inside of transformers, in one place.

transformers renames what it passes around: the cache has been `past_key_value`, `past_key_values`, `layer_past`,
`cache_params` and, since 5.24, `cache`. Types and positions have been stable. So a cache is found here by its type,
and a name is only needed to hand one over: that of the model at hand, read from its signature.

What is imported from transformers' own files is imported here and nowhere else (the stock attention classes beside the
paged ones apart); `kvcompress doctor --transformers` checks all of it on the installed version.
"""

import functools
import importlib.metadata
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from packaging.version import Version
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, get_layer_types_and_kwargs
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMode
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from kvcompress_hf.errors import UnsupportedFeatureError

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "CACHE_NAMES",
    "ROPE_INIT_FUNCTIONS",
    "TESTED",
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "CandidateGenerator",
    "DynamicCache",
    "GenerationMode",
    "PreTrainedConfig",
    "as_argument",
    "cache_argument",
    "cache_of",
    "find_cache",
    "fresh_cache_name",
    "generate_argument",
    "get_layer_types_and_kwargs",
    "installed_version",
    "is_tested",
    "logging",
    "move_cache",
    "outdated_peft",
    "unreachable_argument",
]

#: The oldest and the newest transformers that the whole test suite was run with.
TESTED = ("5.23.0", "5.24.0")

#: What models call the argument that takes their cache, the newest name first.
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "layer_past")


def installed_version() -> str:
    """The version of transformers that is installed.

    Returns:
        `str`: Such as `"5.24.0"`.
    """
    # Looked up at each call: test tools load the package anew, and only one of the two modules is the current one.
    from transformers import __version__

    return __version__


def is_tested(version: str) -> bool:
    """Whether a version of transformers is one of the minor versions that the tests were run with.

    Args:
        version (`str`): Such as `"5.24.1"`.

    Returns:
        `bool`: True from the first minor of [`TESTED`] to the last, whatever the patch release.
    """
    oldest, newest = (Version(each).release[:2] for each in TESTED)
    return not Version(version).is_prerelease and oldest <= Version(version).release[:2] <= newest


# -- finding a cache, without a name -----------------------------------------------------------------------------------


def find_cache(values: Mapping[str, Any] | Iterable[Any], kind: type[Cache] = Cache) -> Any:
    """The cache among the arguments of a call, found by its type.

    Args:
        values (`Mapping[str, Any]` or `Iterable[Any]`): Arguments by name, or one after the other.
        kind (`type[Cache]`): What to look for; subclasses count too.

    Returns:
        `Cache` or `None`: `None` if there is none.

    Raises:
        ValueError: If there are two different caches and one of them is of `kind`: one of them would be lost.
    """
    by_place = isinstance(values, tuple) or not isinstance(values, Mapping)  # every layer asks, with a tuple
    named: Mapping[Any, Any] = dict(enumerate(values)) if by_place else values  # type: ignore[assignment]
    found = {name: value for name, value in named.items() if isinstance(value, Cache)}
    mine = next((value for value in found.values() if isinstance(value, kind)), None)
    if mine is not None and any(value is not mine for value in found.values()):
        told = " and ".join(
            f"a {type(value).__name__} as `{name}`" if isinstance(name, str) else f"a {type(value).__name__}"
            for name, value in found.items()
        )
        raise ValueError(f"One call has one cache, but this one was given {told}; leave one of them out.")
    return mine


def cache_of(outputs: Any) -> Cache:
    """The cache in what a model or `generate` returned, whatever this version of transformers calls the field.

    Args:
        outputs (`ModelOutput`, `dict` or `tuple`): What `model(...)` returned, or `generate` with
            `return_dict_in_generate=True`.

    Returns:
        `Cache`: Of a patched model a [`CompressedPagedCache`].

    Raises:
        TypeError: If `outputs` is a tensor or something else that holds no cache.
        ValueError: If there is no cache among the outputs.

    Example:

    ```python
    >>> out = model.generate(**inputs, return_dict_in_generate=True)  # doctest: +SKIP
    >>> print(kvc.cache_of(out).memory())  # doctest: +SKIP

    ```
    """
    if isinstance(outputs, Cache):
        return outputs
    if not isinstance(outputs, (Mapping, tuple, list)):
        raise TypeError(
            f"There is no cache in a {type(outputs).__name__}; cache_of() takes what model(...) returned, or what "
            "generate(..., return_dict_in_generate=True) did."
        )
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    cache = next((value for value in values if isinstance(value, Cache)), None)
    if cache is None:
        raise ValueError(
            f"There is no cache in this {type(outputs).__name__}: the call was made with use_cache=False, or the model "
            "does not return its cache."
        )
    return cache


# -- the one place where a name is needed: handing a cache over --------------------------------------------------------


def generate_argument() -> str:
    """The name under which `generate` of the installed transformers hands the cache to models.

    Returns:
        `str`: One of [`CACHE_NAMES`].
    """
    # The signature is that of the function inside a decorator which still takes the old name: the true one.
    return _named(GenerationMixin.prepare_inputs_for_generation) or CACHE_NAMES[0]


def cache_argument(model: nn.Module) -> str:
    """The name under which a model's `forward` takes its cache.

    Args:
        model (`nn.Module`): A model, or a part of one.

    Returns:
        `str`: Read from the model's own `forward`, else from that of its classes; what `generate` uses if none says.
    """
    for forward in _forwards(model):
        name = _named(forward)
        if name is not None:
            return name
    return generate_argument()


def as_argument(model: nn.Module, cache: Cache | None) -> dict[str, Cache]:
    """A cache as the keyword argument of a call of a model.

    Args:
        model (`nn.Module`): Who is called.
        cache (`Cache`, *optional*): The cache.

    Returns:
        `dict[str, Cache]`: For `model(ids, **as_argument(model, cache))`; empty without a cache, since a `None` under
        one name hides a cache under another.
    """
    return {} if cache is None else {cache_argument(model): cache}


def unreachable_argument(model: nn.Module) -> str | None:
    """What a model calls its cache, if `generate` would hand it over under a name that the model does not know.

    The cache would vanish in `**kwargs`: every new token would be made without a past, and no error would tell.

    Args:
        model (`nn.Module`): The model.

    Returns:
        `str` or `None`: The model's name for it; `None` if it understands what `generate` calls it.
    """
    name = cache_argument(model)
    return None if name == generate_argument() else name


def move_cache(name: str, kind: type[Cache], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Puts a cache where the function that is called will look for it.

    Args:
        name (`str`): What the function calls its cache.
        kind (`type[Cache]`): Which caches to move; all others stay where they are.
        args (`tuple`): Arguments of the call by position.
        kwargs (`dict[str, Any]`): Arguments of the call by name.

    Returns:
        `dict[str, Any]`: `kwargs` itself if there is nothing to do.

    Raises:
        ValueError: If there are two different caches.
    """
    if not any(isinstance(value, kind) for value in (*args, *kwargs.values())):
        return kwargs
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    cache = find_cache(named, kind)
    # Of two names that are given, transformers takes the newer one, even if it says None.
    rest = {
        key: value for key, value in kwargs.items() if value is not cache and not (value is None and key in CACHE_NAMES)
    }
    return rest if any(value is cache for value in args) else {**rest, name: cache}


def fresh_cache_name(model: PreTrainedModel, model_kwargs: MutableMapping[str, Any], make: Callable[[], Any]) -> str:
    """Lets `generate`'s own code make a cache and tells where it puts one.

    Args:
        model (`PreTrainedModel`): The model, for the error.
        model_kwargs (`MutableMapping[str, Any]`): Arguments that `generate` goes on with; they hold no cache yet.
        make (`Callable`): Makes a cache in `model_kwargs`, as `generate` would.

    Returns:
        `str`: The key of `model_kwargs` under which a new `DynamicCache` now lies, to be replaced by another cache.

    Raises:
        UnsupportedFeatureError: If it made none, or one of another kind.
    """
    make()
    for name, value in model_kwargs.items():
        if type(value) is DynamicCache:
            return name
    other = next((type(value).__name__ for value in model_kwargs.values() if isinstance(value, Cache)), "none")
    raise UnsupportedFeatureError(
        f"generate() of {type(model).__name__} makes its own cache ({other}) where a DynamicCache was expected, so a "
        "compressed one cannot take its place; pass a cache of your own: generate(..., kvcompress=cache)."
    )


def _forwards(model: nn.Module) -> Iterable[Callable[..., Any]]:
    yield model.forward
    for kind in type(model).__mro__:
        if "forward" in vars(kind):
            yield vars(kind)["forward"]


def _named(function: Callable[..., Any]) -> str | None:
    """What a function calls its cache: a name we know, else the one parameter annotated as a cache."""
    function = getattr(function, "__func__", function)
    # Every pass asks. Others than plain functions are not remembered: they may hold a model.
    return _named_once(function) if isinstance(function, types.FunctionType) else _named_anew(function)


def _named_anew(function: Callable[..., Any]) -> str | None:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    known = [name for name in CACHE_NAMES if name in parameters]
    annotated = [name for name, parameter in parameters.items() if "Cache" in str(parameter.annotation)]
    both = [name for name in known if name in annotated]
    return next(iter(both + known + annotated), None)


_named_once = functools.lru_cache(maxsize=256)(_named_anew)


# -- neighbours --------------------------------------------------------------------------------------------------------


def outdated_peft() -> str | None:
    """Whether the installed peft is older than the installed transformers asks for.

    Such a peft looks for the cache under its former name, finds none, and puts the virtual tokens of prompt tuning in
    front of every new token: wrong tokens without an error, patched or not.

    Returns:
        `str` or `None`: Such as `"peft 0.21.2 (transformers 5.24.0 needs 0.22.0)"`; `None` if all is well.
    """
    from transformers.integrations import peft as integration

    needed = getattr(integration, "MIN_PEFT_VERSION", None)
    try:
        installed = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        return None
    if needed is None or Version(installed) >= Version(needed):
        return None
    return f"peft {installed} (transformers {installed_version()} needs {needed})"
