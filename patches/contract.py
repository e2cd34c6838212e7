"""What the package needs of transformers, item by item, checked on the installed version in seconds.

`kvcompress doctor --transformers` and the tests run the same list. Outside the versions that the tests were run with,
`patch` runs it once before it relies on anything.
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
)

from kvcompress_hf.compat import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    TESTED,
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    CacheLayerMixin,
    cache_argument,
    fresh_cache_name,
    generate_argument,
    installed_version,
    is_tested,
    logging,
)
from kvcompress_hf.errors import UnsupportedFeatureError, is_out_of_memory
from kvcompress_hf.layers import layer_windows

__all__ = ["CONTRACT", "Breach", "Install", "check_contract", "check_transformers"]

logger = logging.get_logger(__name__)

#: Patches a model for one route with the `lossless` recipe, without asking for the version first.
Install = Callable[[PreTrainedModel, str], PreTrainedModel]


class Breach(Exception):
    """An item of the contract that the installed transformers does not keep; the message says what it does instead."""


def cache_methods() -> str:
    """The base class of caches has the methods that ours overrides, and a layer needs no method that ours lacks."""
    _begins(Cache.update, "key_states", "value_states", "layer_idx")
    _begins(Cache.get_mask_sizes, "query_length", "layer_idx")
    _begins(Cache.get_seq_length, "layer_idx")
    _begins(Cache.crop, "tokens_to_remove")
    _begins(Cache.reorder_cache, "beam_idx")
    _begins(Cache.batch_select_indices, "indices")
    _begins(Cache.batch_repeat_interleave, "repeats")
    for name in ("activate_past_recording", "is_croppable", "is_compileable", "is_sliding", "get_max_length", "reset"):
        _need(hasattr(Cache, name), f"Cache has no {name}")
    ours = {"lazy_initialization", "update", "get_mask_sizes", "get_seq_length", "get_max_length"}
    more = set(CacheLayerMixin.__abstractmethods__) - ours
    _need(not more, f"a cache layer must now have {', '.join(sorted(more))}")
    return "Cache and CacheLayerMixin"


def sliding_windows() -> str:
    """The config tells the sliding window of each layer."""
    windows = layer_windows(MistralConfig(num_hidden_layers=2, sliding_window=8))
    _need(windows == [8, 8], f"the windows of a Mistral with sliding_window=8 are {windows}")
    return "read from the config"


def generation_methods() -> str:
    """The methods of `generate` that `patch` wraps exist and take what they are given."""
    _begins(GenerationMixin._prepare_generation_config, "generation_config")
    _begins(GenerationMixin._prepare_cache_for_generation, "generation_config", "model_kwargs")
    _begins(GenerationMixin._prefill, "input_ids", "generation_config", "model_kwargs")
    _takes(GenerationMixin._get_candidate_generator, "generation_config", "model_kwargs")
    _takes(GenerationMixin.prepare_inputs_for_generation, "input_ids", "attention_mask", "inputs_embeds")
    _begins(getattr(GenerationMixin, "_valid_auto_compile_criteria"), "model_kwargs", "generation_config")  # noqa: B009
    _begins(PreTrainedModel.get_compiled_call, "compile_config")
    return "seven methods"


def cache_is_handed_over() -> str:
    """A fresh cache is put where the model looks for it."""
    model, arguments = tiny_llama(), dict[str, Any]()
    prepare: Any = getattr(model, "_prepare_cache_for_generation")  # noqa: B009  (mypy takes it for a mixin's)
    make = functools.partial(prepare, GenerationConfig(), arguments, None, 1, 10)
    name = fresh_cache_name(model, arguments, make)
    _need(name == cache_argument(model), f"generate() makes {name}, but the model takes {cache_argument(model)}")
    _need(name == generate_argument(), f"generate() makes {name} and then hands over {generate_argument()}")
    return f"as `{name}`"


def attention_modules(swapped: tuple[type[nn.Module], ...]) -> str:
    """The attention classes that are swapped take the expected arguments, and only one of these is a cache."""
    for kind in swapped:
        _begins(kind.forward, "hidden_states", "position_embeddings", "attention_mask")
        parameters = inspect.signature(kind.forward).parameters.items()
        caches = [name for name, parameter in parameters if "Cache" in str(parameter.annotation)]
        _need(len(caches) == 1, f"{kind.__name__}.forward takes {caches or 'no cache'}")
        file = sys.modules[kind.__module__]
        _begins(file.apply_rotary_pos_emb, "q", "k", "cos", "sin")
        _begins(file.eager_attention_forward, "module", "query", "key", "value", "attention_mask")
    return ", ".join(kind.__name__.removesuffix("Attention") for kind in swapped)


def attention_interface() -> str:
    """Attention and mask functions can be registered and found by name."""
    _begins(ALL_ATTENTION_FUNCTIONS.get_interface, "attn_implementation", "default")
    _takes(ALL_ATTENTION_FUNCTIONS["sdpa"], "module", "query", "key", "value", "attention_mask", "dropout", "scaling")
    _begins(AttentionInterface.register, "key", "value")
    _begins(AttentionMaskInterface.register, "key", "value")
    for name in ("sdpa", "eager"):
        _need(name in ALL_MASK_ATTENTION_FUNCTIONS, f"there is no mask function {name!r}")
    return "two registries"


def end_to_end(install: Install, route: str) -> str:
    """A tiny random Llama writes the stock tokens over a compressed cache, without a deprecation warning."""
    ids = torch.arange(1, 41)[None]
    ways: list[dict[str, Any]] = [{}, {"prefill_chunk_size": 11}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}]
    model = tiny_llama()
    arguments: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    expected = [model.generate(ids, **arguments, **way) for way in ways]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        install(model, route)
        for way, stock in zip(ways, expected, strict=True):
            out = model.generate(ids, **arguments, **way)
            told = ", ".join(way) or "greedy decoding"
            _need(torch.equal(out, stock), f"with {told} the tokens differ from those of the stock model")
    return "stock tokens: greedy, chunked prefill, beams, prompt lookup"


@dataclass(frozen=True)
class Item:
    """One thing that must hold.

    Args:
        name (`str`): What `doctor` and errors call it.
        check (`Callable`): Takes `install` and the swapped classes; returns a few words, or raises.
    """

    name: str
    check: Callable[[Install, tuple[type[nn.Module], ...]], str]


#: Everything that is checked, in this order.
CONTRACT: tuple[Item, ...] = (
    Item("cache methods", lambda install, swapped: cache_methods()),
    Item("sliding windows", lambda install, swapped: sliding_windows()),
    Item("generation methods", lambda install, swapped: generation_methods()),
    Item("cache handed over", lambda install, swapped: cache_is_handed_over()),
    Item("attention modules", lambda install, swapped: attention_modules(swapped)),
    Item("attention interface", lambda install, swapped: attention_interface()),
    Item("end to end, swap route", lambda install, swapped: end_to_end(install, "swap")),
    Item("end to end, interface route", lambda install, swapped: end_to_end(install, "interface")),
)


def check_contract(
    install: Install, swapped: tuple[type[nn.Module], ...], items: tuple[Item, ...] = CONTRACT
) -> list[tuple[str, bool, str]]:
    """Runs the contract on the installed transformers.

    Args:
        install (`Callable`): Patches a model for one route, without asking for the version first.
        swapped (`tuple[type[nn.Module], ...]`): The stock attention classes that are swapped.
        items (`tuple[Item, ...]`): What to check; everything when left out.

    Returns:
        `list[tuple[str, bool, str]]`: Per item its name, whether it holds, and a few words or what is wrong.
    """
    results = []
    for item in items:
        try:
            results.append((item.name, True, item.check(install, swapped)))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            what = str(error) if isinstance(error, Breach) else f"{type(error).__name__}: {error}"
            results.append((item.name, False, what))
    return results


def check_transformers(install: Install, swapped: tuple[type[nn.Module], ...]) -> None:
    """Lets a tested transformers pass, and any other if it keeps the contract.

    Args:
        install (`Callable`): As for [`check_contract`].
        swapped (`tuple[type[nn.Module], ...]`): As for [`check_contract`].

    Raises:
        UnsupportedFeatureError: If the installed version does not keep it; the message names the item.
    """
    version = installed_version()
    if is_tested(version):
        return
    broken = _broken_items(version, install, swapped)
    if broken:
        raise UnsupportedFeatureError(
            f"transformers {version} does not keep what this package needs of it: {'; '.join(broken)}. "
            f"Install transformers {TESTED[0]} to {TESTED[-1]}; kvcompress doctor --transformers lists every item."
        )
    logger.warning_once(f"kvcompress_hf was not tested with transformers {version}; its contract holds.")


@functools.cache
def _broken_items(version: str, install: Install, swapped: tuple[type[nn.Module], ...]) -> tuple[str, ...]:
    """Names and reasons of the items that do not hold; once per version, since it takes seconds."""
    return tuple(f"{name} ({what})" for name, holds, what in check_contract(install, swapped) if not holds)


def tiny_llama() -> LlamaForCausalLM:
    """A random Llama of two layers, the same at every call, that leaves the random state of torch alone.

    Returns:
        `LlamaForCausalLM`: In evaluation mode, on the CPU, float32.
    """
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        # Wide enough that the two largest logits are never close to equal.
        initializer_range=0.2,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=1,
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).float().eval()


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Breach(otherwise)


def _begins(function: Callable[..., Any], *names: str) -> None:
    got = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    _need(got[: len(names)] == list(names), f"{_name(function)} takes ({', '.join(got)}), not {', '.join(names)} first")


def _takes(function: Callable[..., Any], *names: str) -> None:
    got = inspect.signature(function).parameters
    missing = [name for name in names if name not in got]
    _need(not missing, f"{_name(function)} takes ({', '.join(got)}), without {', '.join(missing)}")


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))
