"""What is looked at before every forward pass of a patched model, in a loop of one's own as much as in `generate`."""

import inspect
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import Cache, cache_argument, move_cache
from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.paging.key_turn import Rotation
from kvcompress_hf.patches.holders import Holders
from kvcompress_hf.patches.implementation import has_implementation
from kvcompress_hf.patches.support import text_config
from kvcompress_hf.patches.turning import Turning, learn_turning

__all__ = [
    "HELD",
    "Patch",
    "after_pass",
    "before_pass",
    "check_implementation",
    "read_with",
    "rotations_for",
    "tell_once",
    "turns_otherwise",
]

#: Among the model's arguments of one call: how many tokens of the prompt its cache already holds.
HELD = "_kvcompress_held"


class Patch(Protocol):
    """What is needed of a patch record."""

    route: str
    installed: bool
    holders: Holders
    told: set[str]
    turning: Turning | None
    readers: set["weakref.ref[CompressedPagedCache]"]


def before_pass(
    model: PreTrainedModel, record: Patch, part: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of each part of a model that is a `PreTrainedModel`.

    A compressed cache under any name goes to where this version of transformers looks for it, and is refused where it
    would be ignored or give wrong answers. A call that will make a stock cache is told of, once.

    Args:
        model (`PreTrainedModel`): The whole model.
        record (`Patch`): Its patch record.
        part (`PreTrainedModel`): The part that is called.
        args (`tuple`): Of the call.
        kwargs (`dict[str, Any]`): Of the call.

    Returns:
        `tuple` or `None`: The arguments, where they had to be moved.

    Raises:
        UnsupportedFeatureError: If the attention implementation was changed after patching, the model checkpoints
            gradients, or the rotary factors change under the keys.
        ValueError: If there are two caches, or the cache was filled by other weights.
    """
    if HELD in kwargs:
        raise UnsupportedFeatureError(
            f"The cache already holds {kwargs[HELD]} tokens of the text, and something replaced "
            f"prepare_inputs_for_generation of {type(part).__name__}, so that speculative decoding would read them a "
            "second time. Leave the assistant or prompt lookup out, or begin with an empty cache."
        )
    moved = move_cache(cache_argument(part), CompressedPagedCache, args, kwargs)
    cache = next((each for each in (*args, *moved.values()) if isinstance(each, Cache)), None)
    if isinstance(cache, CompressedPagedCache):
        _check_mask_length(cache, args, kwargs)
        _check_pass(model, record, cache)
        rotations = rotations_for(model, record, cache, _new_tokens(args, moved))
        record.readers.add(weakref.ref(cache, record.readers.discard))
        cache.begin_pass(record, read_with(model, cache, part, args, moved), rotations)
    elif cache is None and (part is model or part.config is text_config(model)):
        _tell_of_stock_cache(record, part, kwargs)
    return None if moved is kwargs else (args, moved)


def after_pass(part: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of each part of a model that is a `PreTrainedModel`: a pass may not end with keys left over.

    Args:
        part (`PreTrainedModel`): The part that was called.
        args (`tuple`): Of the call.
        kwargs (`dict[str, Any]`): Of the call, moved as by [`before_pass`].
        output (`Any`): What it returned.

    Raises:
        UnsupportedFeatureError: If keys were handed to a compressed cache that no attention came for.
    """
    for each in (*args, *kwargs.values()):
        if isinstance(each, CompressedPagedCache):
            each.check_attended()


def _check_mask_length(cache: CompressedPagedCache, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuses a 2-D mask of another length than the tokens held and the new ones: transformers would cut or fill it."""
    new, mask = _new_tokens(args, kwargs), kwargs.get("attention_mask")
    if new is None or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return
    seen = cache.get_seq_length()
    if mask.shape[1] != seen + new:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but the cache holds {seen} tokens and {new} are "
            f"new; it must be [batch, {seen + new}], padding of earlier turns included."
        )


def _new_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """How many new tokens per row a call brings, where that is seen."""
    given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
    new = next((each for each in given if isinstance(each, torch.Tensor) and each.dim() >= 2), None)
    return None if new is None else new.shape[1]


@torch.compiler.disable
def rotations_for(
    model: PreTrainedModel, record: Patch, cache: CompressedPagedCache, new: int | None
) -> tuple[Rotation | None, ...]:
    """How position turns each layer's queries, where the cache's observer asks for it; learned at the first such call.

    Args:
        model (`PreTrainedModel`): The patched model.
        record (`Patch`): Its patch record.
        cache (`CompressedPagedCache`): With what came before.
        new (`int`, *optional*): New tokens per row.

    Returns:
        `tuple[Rotation | None, ...]`: One per layer, `None` where it is not known; empty where nobody asks.
    """
    observer = cache.recipe.observer
    if observer is None or not observer.needs_rotary:
        return ()
    if record.turning is None:
        record.turning = learn_turning(model)
    seen = cache.get_seq_length()
    decoding = new == 1 and seen > 0  # such a step turns no queries, so a rope that varies need not be asked again
    return record.turning.rotations(None if decoding else seen + (new or 0))


@torch.compiler.disable
def _check_pass(model: PreTrainedModel, record: Patch, cache: CompressedPagedCache) -> None:
    check_implementation(model, record)
    if not cache.is_of(model):
        cache.belongs_to(model)
    if torch.is_grad_enabled() and any(
        part.training and getattr(part, "gradient_checkpointing", False) for part in model.modules()
    ):
        raise UnsupportedFeatureError(
            f"{type(model).__name__} checkpoints gradients, and its layers then ignore the cache they are given: what "
            "the cache holds would be missing without a word. Call model.gradient_checkpointing_disable() or "
            "model.eval() first, or train on the whole text without a cache."
        )


def check_implementation(model: PreTrainedModel, record: Patch) -> None:
    """Refuses a compressed cache on a model whose attention implementation was changed after patching.

    Args:
        model (`PreTrainedModel`): The patched model.
        record (`Patch`): Its patch record.

    Raises:
        UnsupportedFeatureError: If it no longer runs on what `patch` left it with, or is not patched any more.
    """
    changed = not has_implementation(model, record.route)
    if not record.installed:  # asked last: a patch says so before anything of it is taken off
        raise UnsupportedFeatureError(
            f"{type(model).__name__} is not patched any more, though this call has a compressed cache: another thread "
            "took the patch off meanwhile. Keep the model patched, or open a patched() block around the call."
        )
    if changed:
        raise UnsupportedFeatureError(
            f"The attention implementation of {type(model).__name__} was set to "
            f"{text_config(model)._attn_implementation!r} after patching, so its attention does not reach the "
            "compressed cache. Call kvcompress_hf.patch(model) again, or set the implementation before patching."
        )


# -- calls that compress nothing ---------------------------------------------------------------------------------------


def tell_once(record: Patch, what: str, message: str) -> None:
    """Warns that a patched model compresses nothing, once per model and reason.

    Args:
        record (`Patch`): The patch record.
        what (`str`): The reason, in a word.
        message (`str`): What is the matter and what to do.
    """
    if what not in record.told:
        record.told.add(what)
        warnings.warn(f"kvcompress_hf compresses nothing here: {message}", UserWarning, stacklevel=3)


def _tell_of_stock_cache(record: Patch, part: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = getattr(part.config, "use_cache", False)
    if not use_cache or part.training or torch.compiler.is_compiling() or record.holders.in_force() is None:
        return
    name = cache_argument(part)
    tell_once(
        record,
        "loop",
        f"{type(part).__name__} was called without a cache and makes a stock one. In a loop of your own, make one with "
        f"CompressedPagedCache(model.config, recipe) and pass it as {name}= to every call; or pass use_cache=False if "
        "only the logits are wanted.",
    )


# -- rotary factors that depend on the length --------------------------------------------------------------------------


def read_with(
    model: PreTrainedModel, cache: CompressedPagedCache, part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bool, ...]:
    """Which rotary factors new tokens will be turned with.

    Args:
        model (`PreTrainedModel`): The model.
        cache (`CompressedPagedCache`): What came before.
        part (`Any`): Whose `forward` is called.
        args (`tuple`): Of the call.
        kwargs (`dict[str, Any]`): Of the call.

    Returns:
        `tuple[bool, ...]`: Per long rope of the model, whether it is the long factors; empty for all other models.
    """
    borders = _borders(model.config)
    if not borders:
        return ()
    if cache.get_seq_length():
        cache.read_with(borders)
    named = {**dict(zip(inspect.signature(part.forward).parameters, args, strict=False)), **kwargs}
    positions = named.get("position_ids")
    if positions is not None:
        length = int(positions.max()) + 1
    else:
        tokens = next(named[name] for name in ("input_ids", "inputs_embeds") if named.get(name) is not None)
        length = cache.get_seq_length() + tokens.shape[1]
    return tuple(length > border for border in borders)


def turns_otherwise(model: PreTrainedModel, cache: CompressedPagedCache, inputs: dict[str, Any]) -> bool:
    """Whether the keys in a cache were turned with other rotary factors than the new tokens will be.

    Args:
        model (`PreTrainedModel`): The model.
        cache (`CompressedPagedCache`): The cache.
        inputs (`dict[str, Any]`): Arguments for the next forward pass.

    Returns:
        `bool`: True where long rope crosses its border.
    """
    return bool(cache.get_seq_length()) and cache.read_with(_borders(model.config)) != read_with(
        model, cache, model, (), inputs
    )


def _borders(config: Any) -> tuple[int, ...]:
    """Lengths at which long ropes change their factors, most often one or none."""
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or {}
    ropes = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    found = []
    for rope in ropes:
        if rope.get("rope_type") == "longrope":
            border = rope.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            found.append(int(border or text.max_position_embeddings))
    return tuple(found)
