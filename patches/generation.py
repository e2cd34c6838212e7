"""The bound methods of a patched model that `generate` goes through, and what they share: the patch record.

Each takes the model it is bound to as its first argument and is put on the instance as a `functools.partial`,
which `copy.deepcopy` and pickling bind to the copy; a closure over the stock bound method would go on calling
the old model.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig, PreTrainedModel

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import (
    Cache,
    CandidateGenerator,
    PreTrainedConfig,
    cache_argument,
    find_cache,
    fresh_cache_name,
    generate_argument,
    move_cache,
)
from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.patches.second_reading import read_again
from kvcompress_hf.patches.speculation import BoundedCandidates
from kvcompress_hf.patches.support import check_adapters, text_config, unwrap
from kvcompress_hf.presets import resolve_rows
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.reports import RunReport

__all__ = ["RECORD", "PatchRecord", "bind_methods", "record_of", "unbind_methods"]

#: The one attribute a patched model carries.
RECORD = "_kvcompress_patch"

_OPTION = "kvcompress"
#: On the config of one call: whether it works on a compressed cache.
_MARK = "_kvcompress_cache"


@dataclass(eq=False)
class PatchRecord:
    """All that is known of a patch, and all that undoing it needs. Nothing in it belongs to a cache.

    Args:
        recipe (`Recipe`): What fresh caches are made with.
        route (`str`): `"swap"` or `"interface"`.
        swapped (`list[tuple[nn.Module, nn.Module]]`): (paged, original) attention modules.
        implementations (`list[tuple]`): (config, attention implementation before, installed) where they
            differ.
        replaced (`dict[str, Any]`): Instance attributes of the model that ours took the place of.
        methods (`tuple[str, ...]`): Names of the bound methods.
        hooks (`list[RemovableHandle]`): Of the hooks that bring a cache to where each part of the model looks for it.
        last_run (`RunReport`, *optional*): Figures of the last cache `generate` worked on.
    """

    recipe: Recipe
    route: str = "swap"
    swapped: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)
    implementations: list[tuple[PreTrainedConfig, str | None, str | None]] = field(default_factory=list)
    replaced: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = ()
    hooks: list[RemovableHandle] = field(default_factory=list)
    last_run: RunReport | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model has had no run of its own yet.
        return {**self.__dict__, "last_run": None}


def record_of(model: nn.Module) -> PatchRecord | None:
    """The record of a patched model.

    Args:
        model (`nn.Module`): Any model.

    Returns:
        `PatchRecord` or `None`: `None` if the model is not patched.
    """
    return unwrap(model).__dict__.get(RECORD)


def bind_methods(model: PreTrainedModel, record: PatchRecord) -> None:
    """Puts the wrapping methods on the model and notes in the record what they replace.

    Args:
        model (`PreTrainedModel`): The model.
        record (`PatchRecord`): Its record.
    """
    methods: dict[str, Callable[..., Any]] = {
        "_prepare_generation_config": _prepare_generation_config,
        "_prepare_cache_for_generation": _prepare_cache,
        "_get_candidate_generator": _get_candidate_generator,
        "_prefill": _prefill,
    }
    if _may_drop_cache(model):
        methods["prepare_inputs_for_generation"] = _prepare_inputs
    record.methods = tuple(methods)
    for name, function in methods.items():
        if name in model.__dict__:
            record.replaced[name] = model.__dict__[name]
        bound = functools.partial(function, model)
        if name == "prepare_inputs_for_generation":
            # generate() reads this signature to tell which arguments the model takes.
            bound.__signature__ = inspect.signature(getattr(model, name))  # type: ignore[attr-defined]
        model.__dict__[name] = bound
    for part in model.modules():
        # Not the outermost alone: PEFT and others call a part of the model without going through the whole.
        if isinstance(part, PreTrainedModel):
            hook = functools.partial(_bring_cache, cache_argument(part))
            record.hooks.append(part.register_forward_pre_hook(hook, with_kwargs=True))


def _bring_cache(name: str, part: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook: a compressed cache under any name goes to where this version of transformers looks for it."""
    moved = move_cache(name, CompressedPagedCache, args, kwargs)
    return None if moved is kwargs else (args, moved)


def unbind_methods(model: nn.Module, record: PatchRecord) -> None:
    """Undoes [`bind_methods`].

    Args:
        model (`nn.Module`): The model.
        record (`PatchRecord`): Its record.
    """
    for name in record.methods:
        model.__dict__.pop(name, None)
        if name in record.replaced:
            model.__dict__[name] = record.replaced[name]
    for handle in record.hooks:
        handle.remove()
    record.hooks.clear()


def _stock(model: PreTrainedModel, name: str) -> Callable[..., Any]:
    record = record_of(model)
    if record is not None and name in record.replaced:
        return record.replaced[name]
    return functools.partial(getattr(type(model), name), model)


def _prepare_generation_config(
    model: PreTrainedModel, generation_config: GenerationConfig | None = None, **kwargs: Any
) -> tuple[GenerationConfig, dict[str, Any]]:
    """As the stock method; moves the argument `kvcompress` of `generate` to this call's config.

    The config returned is a copy made for the call, so nothing stays on the model.
    """
    # PEFT lends the model inside its own method for the length of a call; it may have come after the patch.
    lender = getattr(model.__dict__.get("prepare_inputs_for_generation"), "__self__", None)
    if lender is not model:
        check_adapters(lender)
    for name in {generate_argument(), cache_argument(model)}:
        past = kwargs.get(name)
        if past is not None and not isinstance(past, Cache):
            raise TypeError(
                f"{name} is a {type(past).__name__}; generate() takes a transformers Cache, such as a "
                "CompressedPagedCache or a DynamicCache."
            )
    given = _OPTION in kwargs
    option = kwargs.pop(_OPTION, None)
    if isinstance(option, Cache):
        if not isinstance(option, CompressedPagedCache):
            raise TypeError(
                f"kvcompress is a {type(option).__name__}; it takes a CompressedPagedCache or a recipe."
            )
        if find_cache([option, *kwargs.values()], CompressedPagedCache) is option:
            kwargs, given = {**kwargs, generate_argument(): option}, False
    kwargs = move_cache(generate_argument(), CompressedPagedCache, (), kwargs)
    generation_config, model_kwargs = _stock(model, "_prepare_generation_config")(generation_config, **kwargs)
    if given:
        setattr(generation_config, _OPTION, option)
    return generation_config, model_kwargs


def _prepare_cache(
    model: PreTrainedModel,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> None:
    """As the stock method; makes a fresh compressed cache where stock would make a `DynamicCache`."""
    record = record_of(model)
    option = getattr(generation_config, _OPTION, None)
    past = find_cache(model_kwargs)
    implementation = generation_config.cache_implementation
    setattr(generation_config, _MARK, isinstance(past, CompressedPagedCache))
    if record is None or past is not None or generation_config.use_cache is False or implementation is not None:
        if option is not None and past is None:
            wish = f"cache_implementation={implementation!r}" if implementation is not None else "use_cache=False"
            raise ValueError(f"kvcompress={option!r} and {wish} ask for different caches; leave one of them out.")
        if isinstance(past, CompressedPagedCache):
            _check_passed_cache(model, generation_config, model_kwargs, past)
            past.belongs_to(model)
            if record is not None:
                record.last_run = past.run_report
        _stock(model, "_prepare_cache_for_generation")(generation_config, model_kwargs, *args, **kwargs)
        return
    # The class's own method, not one that another library put on the instance: its caches are not ours.
    prepare: Any = type(model)._prepare_cache_for_generation  # type: ignore[attr-defined]
    make = functools.partial(prepare, model, generation_config, model_kwargs)
    name = fresh_cache_name(model, model_kwargs, functools.partial(make, *args, **kwargs))
    cache = CompressedPagedCache(
        model.config,
        list(resolve_rows(option, record.recipe)),
        prompt_tokens=_prompt_tokens(generation_config, model_kwargs),
    )
    cache.belongs_to(model)
    if generation_config.is_assistant:
        cache.activate_past_recording()
    model_kwargs[name] = cache
    setattr(generation_config, _MARK, True)
    record.last_run = cache.run_report


def _prefill(
    model: PreTrainedModel,
    input_ids: Any,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    **kwargs: Any,
) -> Any:
    """As the stock method; reads the prompt a second time where the recipe wants it."""
    cache = _cache_of_call(model, generation_config, model_kwargs)
    before = 0 if cache is None else cache.get_seq_length()
    outputs = _stock(model, "_prefill")(input_ids, generation_config, model_kwargs, **kwargs)
    if cache is not None and cache.awaits_second_reading:
        new = cache.get_seq_length() - before
        ids = input_ids[:, -new:] if model_kwargs.get("inputs_embeds") is None else input_ids[:, :0]
        read_again(model, cache, ids, model_kwargs.get("attention_mask"))
    return outputs


def _get_candidate_generator(model: PreTrainedModel, **kwargs: Any) -> CandidateGenerator:
    """As the stock method; keeps drafts within what a compressed cache can verify exactly."""
    inner: CandidateGenerator = _stock(model, "_get_candidate_generator")(**kwargs)
    cache = _cache_of_call(model, kwargs["generation_config"], kwargs["model_kwargs"])
    if cache is not None and cache.recipe.changes_slots and not inner.requires_model_outputs:
        mask = kwargs["model_kwargs"].get("attention_mask")
        return BoundedCandidates(inner, cache, lambda ids: read_again(model, cache, ids, mask))
    return inner


def _cache_of_call(
    model: PreTrainedModel, generation_config: GenerationConfig, model_kwargs: Mapping[str, Any]
) -> CompressedPagedCache | None:
    """The compressed cache that a call of `generate` works on; an error if it had one and lost it on the way."""
    cache = find_cache(model_kwargs, CompressedPagedCache)
    if cache is None and getattr(generation_config, _MARK, False):
        raise UnsupportedFeatureError(
            f"generate() of {type(model).__name__} had a compressed cache and lost it before the model ran, so it "
            f"would go on without compression; its arguments are now {', '.join(sorted(model_kwargs))}."
        )
    return cache


def _check_passed_cache(
    model: PreTrainedModel,
    generation_config: GenerationConfig,
    model_kwargs: Mapping[str, Any],
    cache: CompressedPagedCache,
) -> None:
    layers = text_config(model).num_hidden_layers
    if len(cache) != layers:
        raise ValueError(
            f"The cache passed to generate() was made for {len(cache)} layers, but {type(model).__name__} has "
            f"{layers}; make it with CompressedPagedCache(model.config, ...)."
        )
    if generation_config.use_cache is False:
        # Stock would feed all tokens to the cache again at every step.
        raise ValueError("use_cache=False contradicts the cache passed to generate(); leave one of them out.")
    seen, given = cache.get_seq_length(), _prompt_tokens(generation_config, model_kwargs)
    if seen and given is not None and given <= seen:
        # Stock takes the tokens for the whole text, finds nothing new in it, and fails or reads them a second time.
        raise ValueError(
            f"The prompt has {given} tokens by its attention mask, but the cache passed to generate() already "
            f"holds {seen}. Pass the whole text and what is new, or only the new tokens with an attention_mask of all: "
            f"[batch, {seen} + new tokens]."
        )


def _prompt_tokens(generation_config: GenerationConfig, model_kwargs: Mapping[str, Any]) -> int | None:
    """Length of the prompt, padding included; generate() drops a mask of ones but notes its length."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        return int(mask.shape[-1]) or None
    length = getattr(generation_config, "_mask_length", None)
    if length is None and model_kwargs.get("position_ids") is not None:
        length = model_kwargs["position_ids"].shape[-1]
    return int(length) if length else None


def _may_drop_cache(model: PreTrainedModel) -> bool:
    """Whether this is one of the long-rope Phis, whose inputs lose their cache at a certain length."""
    return text_config(model).model_type in ("phi3", "phimoe", "phi4_multimodal")


def _prepare_inputs(model: PreTrainedModel, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """As the stock method of the long-rope Phis, which drops the cache where its rotary factors change.

    The model would go on with a new `DynamicCache`, and compression would end without a word. Emptying the
    cache and filling it again from all tokens is the same computation.
    """
    cache = find_cache((*args, *kwargs.values()), CompressedPagedCache)
    inputs = _stock(model, "prepare_inputs_for_generation")(*args, **kwargs)
    if cache is not None and find_cache(inputs, CompressedPagedCache) is None:
        cache.reset()
        inputs[generate_argument()] = cache
    return inputs
