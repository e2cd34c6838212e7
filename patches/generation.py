"""The bound methods of a patched model that `generate` goes through, and what they share: the patch record.

Each takes the model it is bound to as its first argument and is put on the instance as a `functools.partial`,
which `copy.deepcopy` and pickling bind to the copy; a closure over the stock bound method would go on calling
the old model.
"""

import functools
import inspect
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig, PreTrainedModel

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import (
    Cache,
    CandidateGenerator,
    GenerationMode,
    PreTrainedConfig,
    cache_argument,
    find_cache,
    fresh_cache_name,
    generate_argument,
    move_cache,
)
from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.patches.graph import GraphSteps, start_graphs, take_option
from kvcompress_hf.patches.holders import Holders
from kvcompress_hf.patches.implementation import has_implementation
from kvcompress_hf.patches.passes import (
    HELD,
    after_pass,
    before_pass,
    check_implementation,
    rotations_for,
    tell_once,
    turns_otherwise,
)
from kvcompress_hf.patches.prompt_chunks import set_chunk
from kvcompress_hf.patches.second_reading import read_again
from kvcompress_hf.patches.speculation import BoundedCandidates, recording_ends, tokens_held
from kvcompress_hf.patches.support import check_adapters, text_config, unwrap
from kvcompress_hf.patches.turning import Turning
from kvcompress_hf.presets import resolve_rows
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.reports import RunReport

__all__ = ["RECORD", "PatchRecord", "begin_pass", "bind_methods", "record_of", "unbind_methods"]

#: The one attribute a patched model carries.
RECORD = "_kvcompress_patch"

_OPTION = "kvcompress"
#: On the config of one call: whether its decode steps are to be replayed from a graph.
_GRAPH = "_kvcompress_graph"
#: On the config of one call: whether it works on a compressed cache.
_MARK = "_kvcompress_cache"


@dataclass(eq=False)
class PatchRecord:
    """All that is known of a patch, and all that undoing it needs. Nothing in it belongs to a cache.

    Args:
        route (`str`): `"swap"` or `"interface"`.
        linears (`str`): What was asked for of linear layers (`linears.py`).
        holders (`Holders`): Who wants the patch, and with which recipe.
        installed (`bool`): False once the patch is taken off.
        swapped (`list[tuple[nn.Module, nn.Module]]`): (paged, original) attention modules.
        implementations (`list[tuple]`): (config, attention implementation before, installed) where they
            differ.
        replaced (`dict[str, Any]`): Instance attributes of the model that ours took the place of.
        methods (`tuple[str, ...]`): Names of the bound methods.
        hooks (`list[RemovableHandle]`): Of the hooks before and after each pass of a part of the model.
        told (`set[str]`): What was warned of.
        last_run (`RunReport`, *optional*): Figures of the last cache `generate` worked on.
        turning (`Turning`, *optional*): How position turns the model's queries, once a recipe has asked for it.
        readers (`set[weakref.ref[CompressedPagedCache]]`): The caches that passes have gone by.
    """

    route: str
    linears: str
    holders: Holders = field(default_factory=Holders)
    installed: bool = True
    swapped: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)
    implementations: list[tuple[PreTrainedConfig, str | None, str | None]] = field(default_factory=list)
    replaced: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = ()
    hooks: list[RemovableHandle] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    last_run: RunReport | None = None
    turning: Turning | None = None
    readers: set["weakref.ref[CompressedPagedCache]"] = field(default_factory=set)

    @property
    def recipe(self) -> Recipe | None:
        """`Recipe` or `None`: What fresh caches of the calling thread are made with; `None`: stock ones."""
        holder = self.holders.in_force()
        return None if holder is None else holder.recipe

    def wait_for_attention(self) -> None:
        """Waits until keys that caches have handed out have come to attention, in whichever thread that is.

        Were the patch taken off in between, stock attention would get them, and answer from the new tokens alone. Of a
        pass that stopped there the keys never come, so this does not take longer than a tenth of a second.
        """
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            caches = [each() for each in tuple(self.readers)]
            if not any(cache is not None and cache.is_awaited() for cache in caches):
                return
            time.sleep(0.001)

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model has had no run of its own yet, and nobody would ever leave its blocks.
        fresh: dict[str, Any] = {
            "last_run": None,
            "turning": None,
            "told": set(),
            "readers": set(),
            "holders": Holders(self.holders.in_force()),
        }
        return self.__dict__ | fresh


def record_of(model: nn.Module) -> PatchRecord | None:
    """The record of a patched model.

    Args:
        model (`nn.Module`): Any model.

    Returns:
        `PatchRecord` or `None`: `None` if the model is not patched.
    """
    return unwrap(model).__dict__.get(RECORD)


def begin_pass(model: PreTrainedModel, cache: CompressedPagedCache, tokens: int) -> None:
    """Makes a cache ready to be given recorded queries, keys and values of a patched model by hand.

    Args:
        model (`PreTrainedModel`): The patched model.
        cache (`CompressedPagedCache`): An empty cache.
        tokens (`int`): How many tokens per row will come.

    Raises:
        ValueError: If the model is not patched.
    """
    record = record_of(model)
    if record is None:
        raise ValueError(f"{type(model).__name__} is not patched; call kvcompress_hf.patch(model) first.")
    cache.begin_pass(record, (), rotations_for(model, record, cache, tokens))


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
        "prepare_inputs_for_generation": _prepare_inputs,
        "_valid_auto_compile_criteria": _has_other_call,
        "get_compiled_call": _other_call,
        "generate": _generate,
    }
    if hasattr(model, "init_continuous_batching"):
        methods["init_continuous_batching"] = _init_continuous_batching
    record.methods = tuple(methods)
    for name, function in methods.items():
        if name in model.__dict__:
            record.replaced[name] = model.__dict__[name]
        bound = functools.partial(function, model)
        if not name.startswith("_"):
            # generate() reads the one signature to tell which arguments the model takes, other libraries the other.
            bound.__signature__ = _plain_signature(getattr(model, name))  # type: ignore[attr-defined]
        model.__dict__[name] = bound
    for part in model.modules():
        # Not the outermost alone: PEFT and others call a part of the model without going through the whole.
        if isinstance(part, PreTrainedModel):
            hook = functools.partial(before_pass, model, record)
            record.hooks.append(part.register_forward_pre_hook(hook, with_kwargs=True))
            record.hooks.append(part.register_forward_hook(after_pass, with_kwargs=True))


def _plain_signature(method: Callable[..., Any]) -> inspect.Signature:
    """A signature without annotations, which cannot always be pickled with the model."""
    signature = inspect.signature(method)
    plain = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return signature.replace(parameters=plain, return_annotation=signature.empty)


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


def _generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """As the stock method; a cache on which tokens were only tried records nothing any more afterwards."""
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    stock = _stock(model, "generate")
    option = {"kvcompress": kwargs.pop("kvcompress")} if "kvcompress" in kwargs else {}
    kwargs = {**move_cache(generate_argument(), CompressedPagedCache, args, kwargs), **option}
    if getattr(config, "is_assistant", False):
        return stock(*args, **kwargs)  # its cache records for the generate() that it assists
    with recording_ends(find_cache((*args, *kwargs.values()), CompressedPagedCache)):
        outputs = stock(*args, **kwargs)
    made = find_cache(list(outputs.values()), CompressedPagedCache) if isinstance(outputs, Mapping) else None
    if made is not None and find_cache((*args, *kwargs.values()), CompressedPagedCache) is None:
        made.stop_past_recording()
    return outputs


def _init_continuous_batching(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """As the stock method, which `generate_batch` and servers come by; its cache is its own and stays uncompressed."""
    record = record_of(model)
    if record is not None:
        if record.route == "interface" and has_implementation(model, record.route):
            raise UnsupportedFeatureError(
                f"Continuous batching (generate_batch and servers) has a paged cache of its own, which the patched "
                f"{type(model).__name__} cannot read. Call kvcompress_hf.unpatch(model) before it."
            )
        tell_once(
            record,
            "continuous batching",
            "continuous batching (generate_batch and servers) has a paged cache of its own. Use generate(), or leave "
            "the model unpatched for it.",
        )
    return _stock(model, "init_continuous_batching")(*args, **kwargs)


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
            raise TypeError(f"kvcompress is a {type(option).__name__}; it takes a CompressedPagedCache or a recipe.")
        if find_cache([option, *kwargs.values()], CompressedPagedCache) is option:
            kwargs, given = {**kwargs, generate_argument(): option}, False
    kwargs = move_cache(generate_argument(), CompressedPagedCache, (), kwargs)
    generation_config, model_kwargs = _stock(model, "_prepare_generation_config")(generation_config, **kwargs)
    if given:
        option, graph = take_option(option)
        setattr(generation_config, _OPTION, option)
        setattr(generation_config, _GRAPH, graph)
    return generation_config, model_kwargs


def _has_other_call(
    model: PreTrainedModel, model_kwargs: dict[str, Any], generation_config: GenerationConfig, **kwargs: Any
) -> bool:
    """As the stock method, by which `generate` learns that it is not the model that its loop calls."""
    if isinstance(generation_config.compile_config, GraphSteps):
        return True
    result: bool = _stock(model, "_valid_auto_compile_criteria")(model_kwargs, generation_config, **kwargs)
    return result


def _other_call(model: PreTrainedModel, compile_config: Any) -> Callable[..., Any]:
    """As the stock method, which would compile the model; where steps are replayed, what replays them."""
    if isinstance(compile_config, GraphSteps):
        return compile_config
    call: Callable[..., Any] = _stock(model, "get_compiled_call")(compile_config)
    return call


def _prepare_cache(
    model: PreTrainedModel,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> None:
    """As the stock method; makes a fresh compressed cache, and lets decode steps be replayed where that is wanted."""
    _find_or_make_cache(model, generation_config, model_kwargs, *args, **kwargs)
    if not getattr(generation_config, _GRAPH, False):
        return
    cache, record = find_cache(model_kwargs, CompressedPagedCache), record_of(model)
    if cache is None or record is None:
        raise ValueError('kvcompress={"graph": True} replays steps over a compressed cache; this call has none.')
    modes = [each for each in (*args, *kwargs.values()) if isinstance(each, GenerationMode)]
    start_graphs(model, record, cache, generation_config, next(iter(modes), None))


def _find_or_make_cache(
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
    recipe = None if record is None else record.recipe
    if record is not None and isinstance(past, CompressedPagedCache):
        check_implementation(model, record)
    own_choice = past is not None or generation_config.use_cache is False or implementation is not None
    if record is None or recipe is None or own_choice:
        if option is not None and past is None:
            wish = f"cache_implementation={implementation!r}" if implementation is not None else "use_cache=False"
            raise ValueError(f"kvcompress={option!r} and {wish} ask for different caches; leave one of them out.")
        if isinstance(past, CompressedPagedCache):
            _check_passed_cache(model, generation_config, model_kwargs, past)
            past.belongs_to(model)
            if record is not None:
                record.last_run = past.run_report
        elif past is None and recipe is not None and record is not None and implementation is not None:
            tell_once(
                record,
                f"cache_implementation={implementation}",
                f"cache_implementation={implementation!r} asks generate() for a stock cache. Leave it out of the call, "
                "and set model.generation_config.cache_implementation to None, to have a compressed one.",
            )
        _stock(model, "_prepare_cache_for_generation")(generation_config, model_kwargs, *args, **kwargs)
        return
    check_implementation(model, record)
    # The class's own method, not one that another library put on the instance: its caches are not ours.
    prepare: Any = type(model)._prepare_cache_for_generation  # type: ignore[attr-defined]
    make = functools.partial(prepare, model, generation_config, model_kwargs)
    name = fresh_cache_name(model, model_kwargs, functools.partial(make, *args, **kwargs))
    rows, tokens = list(resolve_rows(option, recipe)), _prompt_tokens(generation_config, model_kwargs)
    assisted = GenerationMode.ASSISTED_GENERATION in (*args, *kwargs.values())
    set_chunk(generation_config, model_kwargs, assisted, rows, tokens)
    cache = CompressedPagedCache(model.config, rows, prompt_tokens=tokens)
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
    """As the stock method; keeps drafts within what a compressed cache can verify exactly.

    Stock verification would read the whole text again where the cache holds the beginning of it, so the number of
    tokens held is noted for [`_prepare_inputs`].
    """
    inner: CandidateGenerator = _stock(model, "_get_candidate_generator")(**kwargs)
    config, model_kwargs = kwargs["generation_config"], kwargs["model_kwargs"]
    cache = _cache_of_call(model, config, model_kwargs)
    if cache is None:
        return inner
    held = tokens_held(cache, inner, kwargs["input_ids"], model_kwargs, getattr(config, "_mask_length", None))
    if held:
        model_kwargs[HELD] = held
    if inner.requires_model_outputs:
        return inner
    mask = model_kwargs.get("attention_mask")
    return BoundedCandidates(inner, cache, lambda ids: read_again(model, cache, ids, mask))


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
    if not cache.is_recording_past(0):
        cache.crop(0)  # generate() goes by what the cache holds, so tokens of a pass that stopped need not come again
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


def _may_turn_otherwise(model: PreTrainedModel) -> bool:
    """Whether rotary factors change with the length, or inputs lose their cache there (the long-rope Phis)."""
    text = text_config(model)
    return text.model_type in ("phi3", "phimoe", "phi4_multimodal") or "longrope" in str(
        getattr(text, "rope_parameters", None)
    )


def _prepare_inputs(model: PreTrainedModel, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """As the stock method; leaves out what the cache holds, and keeps the cache.

    Where the rotary factors of a long rope change under the keys of a cache, the long-rope Phis drop the cache and
    would go on with a new `DynamicCache`; other models would ask keys of one kind with queries of another. Emptying
    the cache and filling it again from all tokens is what is right.
    """
    cache = find_cache((*args, *kwargs.values()), CompressedPagedCache)
    held = kwargs.pop(HELD, 0)
    if held and kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is None:
        embeds = kwargs.get("inputs_embeds")
        kwargs["next_sequence_length"] = (input_ids if embeds is None else embeds).shape[1] - held
    stock = _stock(model, "prepare_inputs_for_generation")
    inputs = stock(input_ids, *args, **kwargs)
    if cache is None or not _may_turn_otherwise(model):
        return inputs
    dropped = find_cache(inputs, CompressedPagedCache) is None
    if not dropped and not turns_otherwise(model, cache, inputs):
        return inputs
    mask, positions, seen = kwargs.get("attention_mask"), kwargs.get("position_ids"), cache.get_seq_length()
    if mask is not None:
        total = mask.shape[-1]
    else:  # generate() drops a mask of ones; the positions then tell how much text there is
        total = int(positions.max()) + 1 if positions is not None else seen + 1
    if input_ids.shape[1] < max(total, seen + 1):
        raise UnsupportedFeatureError(
            f"The long rope of {type(model).__name__} changes its factors between the {seen} tokens that the cache "
            "holds and the new ones, so all tokens must be read again, but generate() was given only the new ones. "
            "Pass the whole text and what is new, or keep the text within one side of the border "
            "(original_max_position_embeddings)."
        )
    recording = cache.is_recording_past(0)
    cache.reset()
    if recording:  # drafts are still to be verified
        cache.activate_past_recording()
    if not dropped:
        inputs = stock(input_ids, *args, **{**kwargs, "next_sequence_length": None})
    inputs[generate_argument()] = cache
    positions = inputs.get("position_ids")
    if positions is not None and positions.shape[-1] != input_ids.shape[1]:
        ones = torch.ones_like(input_ids) if mask is None else mask.long()
        inputs["position_ids"] = (ones.cumsum(-1) - 1).clamp(min=0)
    return inputs
