"""`patch`, `unpatch`, `patched`: installing the routes on a model and taking them off again."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from kvcompress_hf.compat import logging
from kvcompress_hf.errors import UnsupportedModelError, is_out_of_memory
from kvcompress_hf.layers import layer_windows
from kvcompress_hf.patches import interface
from kvcompress_hf.patches.contract import CONTRACT, Item, check_contract, check_transformers
from kvcompress_hf.patches.dry_run import StockNotes, check_dry_run, evaluating, observe_stock
from kvcompress_hf.patches.families import swapped_classes
from kvcompress_hf.patches.generation import RECORD, PatchRecord, bind_methods, record_of, unbind_methods
from kvcompress_hf.patches.holders import Holder, enter, leave, lock_of, surely
from kvcompress_hf.patches.implementation import configs_of, has_implementation, set_implementation
from kvcompress_hf.patches.linears import LINEARS, give_back_linears, take_linears
from kvcompress_hf.patches.support import check_model, text_config, unwrap
from kvcompress_hf.patches.swap import paged_views, restore_originals, swap_modules
from kvcompress_hf.presets import resolve_recipe
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.reports import RunReport
from kvcompress_hf.rotary import key_frequencies

__all__ = ["contract_results", "is_patched", "last_run_report", "patch", "patched", "unpatch"]

logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)

_SWAPPED = swapped_classes()


def patch(
    model: Model,
    recipe: str | Mapping[str, Any] | Recipe | None = None,
    *,
    route: str = "auto",
    check: bool = True,
    linears: str = "auto",
    **overrides: Any,
) -> Model:
    """Makes a model keep its past in a compressed, paged cache whenever it generates.

    Everything else about the model stays: weights, class, config, placement. `generate`, `pipeline` and chat
    make a fresh [`CompressedPagedCache`] per call; one passed as `kvcompress=cache` is used instead, and a cache
    of another kind (such as `DynamicCache`) goes the stock way. Patching a patched model replaces only the
    recipe and `linears`.

    Before anything is relied on, a few tokens are run through the stock and the patched model, and every layer's
    attention is compared; if one differs by more than rounding, or anything else fails, the model is left exactly as
    it was.

    Args:
        model (`PreTrainedModel`): A decoder-only language model, or a PEFT model around one.
        recipe (`str`, `Recipe` or `dict`, *optional*): A preset name, a recipe, or its parts. Left out, it is
            `"k8v4"`, which keeps every token; with a `budget` it is `"auto"`.
        route (`str`): How to install: `"swap"` replaces the attention modules (`families.py`), `"interface"` goes
            through transformers' attention interface, `"auto"` takes the first that fits and passes its check.
            While other threads are inside a [`patched`] block of the model, the route it goes stays.
        check (`bool`): Whether to compare with the stock model before the patch is relied on. `False` saves about ten
            forward passes over a few tokens, and takes models that the comparison refuses; what they then say is on
            your own account. What the config shows to be unsupported is refused in any case.
        linears (`str`): What multiplies by the weights of a bfloat16 or float16 model on a CPU while one to four tokens
            are decoded without gradients: `"auto"` takes a kernel of this package where a trial, once per process,
            finds it quicker on this machine (it sums in float32; the last bit of what comes out may differ from
            torch's), `"stock"` leaves it to torch. Only plain `nn.Linear` layers are meant, whatever the cache is.
        overrides: Parts of the recipe to change, such as `budget=1/8`.

    Returns:
        `PreTrainedModel`: `model` itself.

    Raises:
        TypeError: If `model` is no transformers model, `recipe` of no known type or `check` no bool.
        ValueError: If the recipe, an override, `route` or `linears` is not allowed.
        UnsupportedModelError: If the model cannot be patched; the message says why.
        UnsupportedFeatureError: If the installed transformers lacks something that is needed of it, or positions are
            to be re-indexed and the model's rotary embedding does not allow it.

    Example:

    ```python
    >>> import kvcompress_hf as kvc
    >>> model = kvc.patch(model, "kv-compress", budget=1 / 8)  # doctest: +SKIP
    >>> model.generate(**inputs, kvcompress={"budget": "512MiB"})  # doctest: +SKIP

    ```
    """
    inner, wanted = _asked(model, recipe, overrides, route, check, linears)
    with _changing(inner):
        record = _ensure_installed(inner, wanted)
        wanted.route = record.route
        own = record.holders.own()
        if own:
            own[-1].become(wanted)  # for the rest of the block only; afterwards the model is as it was before it
        else:
            record.holders.base = wanted
    return model


def unpatch(model: Model) -> Model:
    """Takes a patch off: the model is what it was before, down to its attention modules.

    What happened to the model meanwhile (training mode, placement, hooks) is kept. Does nothing to a model
    that is not patched. While other threads are inside a [`patched`] block of the model, it stays patched for them
    until the last one leaves.

    Args:
        model (`PreTrainedModel`): Any model.

    Returns:
        `PreTrainedModel`: `model` itself.

    Raises:
        TypeError: If it is no model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch() takes the model that was patched, got {type(model).__name__}.")
    inner = unwrap(model)
    if record_of(inner) is None:
        return model
    with lock_of(inner):
        record = record_of(inner)
        if record is not None:
            record.holders.suspend()
            if not record.holders:
                _uninstall(inner, record)
    return model


@contextlib.contextmanager
def patched(
    model: Model,
    recipe: str | Mapping[str, Any] | Recipe | None = None,
    *,
    route: str = "auto",
    check: bool = True,
    linears: str = "auto",
    **overrides: Any,
) -> Iterator[Model]:
    """[`patch`] for the length of a `with` block; afterwards the model is as before, patched or not.

    Blocks may be nested, and open in several threads at once: `generate` uses the recipe of the block that its own
    thread or asyncio task is in, and the model stays patched until the last block is left, in whatever order. A thread
    outside of any block has the recipe of [`patch`], or, on a model that is patched by blocks alone, of the newest one.

    Args:
        model (`PreTrainedModel`): A decoder-only language model.
        recipe (`str`, `Recipe` or `dict`, *optional*): As for [`patch`].
        route (`str`): As for [`patch`].
        check (`bool`): As for [`patch`].
        linears (`str`): As for [`patch`].
        overrides: As for [`patch`].

    Yields:
        `PreTrainedModel`: The patched model.

    Example:

    ```python
    >>> with kvc.patched(model, "k8v4"):  # doctest: +SKIP
    ...     model.generate(**inputs)

    ```
    """
    inner, block = _asked(model, recipe, overrides, route, check, linears)
    with _changing(inner):
        record = _ensure_installed(inner, block)
        block.route = record.route
        record.holders.blocks.append(block)
    enter(block)
    try:
        yield model
    finally:
        leave(block)
        with lock_of(inner):
            _release(inner, block)


def is_patched(model: nn.Module) -> bool:
    """Whether a model is patched.

    Args:
        model (`nn.Module`): Any model.

    Returns:
        `bool`: True between [`patch`] and [`unpatch`], and while any thread is inside a [`patched`] block.
    """
    record = record_of(model)
    return record is not None and bool(record.holders)


def last_run_report(model: nn.Module) -> RunReport | None:
    """Figures of the cache that the last `generate` call of a patched model worked on.

    Args:
        model (`PreTrainedModel`): A patched model.

    Returns:
        `RunReport` or `None`: `None` before the first call.

    Raises:
        ValueError: If the model is not patched.
    """
    record = record_of(model)
    if record is None:
        raise ValueError(f"{type(model).__name__} is not patched; call kvcompress_hf.patch(model) first.")
    return record.last_run


def contract_results(items: tuple[Item, ...] = CONTRACT) -> list[tuple[str, bool, str]]:
    """Checks on the installed transformers whatever this package needs of it.

    Args:
        items (`tuple[Item, ...]`): What to check; everything when left out.

    Returns:
        `list[tuple[str, bool, str]]`: Per item its name, whether it holds, and a few words or what is wrong.
    """
    return check_contract(_install_lossless, tuple(_SWAPPED), items)


def _install_lossless(model: PreTrainedModel, route: str) -> PreTrainedModel:
    """`patch` for the contract, which is what `patch` itself may be waiting for."""
    with evaluating(model):
        record = PatchRecord(route, "stock")
        _install_checked(model, record, observe_stock(model))
    record.holders.base = Holder(resolve_recipe("lossless"), route, linears="stock")
    return model


def _asked(
    model: Any, recipe: Any, overrides: dict[str, Any], route: str, check: bool, linears: str
) -> tuple[Any, Holder]:
    """The inner model and what `patch` or `patched` was asked for, or an error."""
    check_transformers(_install_lossless, tuple(_SWAPPED))
    resolved = resolve_recipe(recipe, **overrides)
    if route not in ("auto", "swap", "interface"):
        raise ValueError(f"route is {route!r}; it must be 'auto', 'swap' or 'interface'.")
    if not isinstance(check, bool):
        raise TypeError(f"check is {check!r}; it must be True or False.")
    if linears not in LINEARS:
        raise ValueError(f"linears is {linears!r}; it must be {' or '.join(map(repr, LINEARS))}.")
    inner = unwrap(model)
    if not isinstance(inner, PreTrainedModel):
        check_model(inner)
    return inner, Holder(resolved, route, check, linears)


@contextlib.contextmanager
def _changing(model: PreTrainedModel) -> Iterator[None]:
    """For whoever is going to hold a patch of the model: if that fails, a patch that nobody holds is taken off."""
    with lock_of(model):
        try:
            yield
        except BaseException:
            record = record_of(model)
            if record is not None and not record.holders:
                _uninstall(model, record)
            raise


def _ensure_installed(model: PreTrainedModel, wanted: Holder) -> PatchRecord:
    """The record of a model that is patched as somebody wants it; whoever held its patch before still does."""
    record = record_of(model)
    intact = (
        record is not None
        and _is_intact(model, record)
        and (wanted.route in ("auto", record.route) or record.holders.in_use_elsewhere())
    )
    if not intact:
        check_model(model)
    key_frequencies(model.config, wanted.recipe, layer_windows(model.config))  # refuses now what a cache would later
    if record is not None and intact:
        _set_linears(model, record, wanted)
        return record
    if record is None:
        return _install_anew(model, wanted)
    _uninstall(model, record)
    try:
        new = _install_anew(model, wanted)
    except BaseException:
        if record.holders:
            _install(model, again := PatchRecord(record.route, record.linears))
            again.holders, again.told = record.holders, record.told
        raise
    new.holders, new.told = record.holders, record.told
    return new


def _set_linears(model: PreTrainedModel, record: PatchRecord, wanted: Holder) -> None:
    """Changes what multiplies by the weights, unless other threads are at work with it."""
    if record.holders.in_use_elsewhere():
        return
    record.linears = wanted.linears
    if wanted.linears == "auto":
        take_linears(model)
    else:
        give_back_linears(model)


def _install_anew(model: PreTrainedModel, wanted: Holder) -> PatchRecord:
    """Patches a stock model and checks it. Until somebody holds the patch, `generate` of other threads is stock's."""
    chosen = _choose_route(model, wanted.route)
    with evaluating(model):
        expected = observe_stock(model) if wanted.check else None
        try:
            record = PatchRecord(chosen, wanted.linears)
            _install_checked(model, record, expected)
        except Exception as error:
            if wanted.route != "auto" or chosen == "interface" or is_out_of_memory(error):
                raise
            # The interface needs less of transformers than the swapped modules do.
            record = PatchRecord("interface", wanted.linears)
            _install_checked(model, record, expected)
            logger.warning_once(
                f"{type(model).__name__} goes by the attention interface, because its attention modules could not be "
                f"swapped ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            )
    return record


def _uninstall(model: PreTrainedModel, record: PatchRecord) -> None:
    """Makes the model what it was before, whoever holds the patch. Once begun, an interrupt comes after it."""
    surely(functools.partial(_take_off, model, record))


def _take_off(model: PreTrainedModel, record: PatchRecord) -> None:
    """Undoes what of [`_install`] has been done; may be done again if it breaks off."""
    record.installed = False  # from here on no cache hands out keys
    record.wait_for_attention()
    give_back_linears(model)
    restore_originals(model, record.swapped)
    for config, before, installed in record.implementations:
        # Whatever the user chose in the meantime stays.
        if config._attn_implementation == installed:
            config._attn_implementation_internal = before
    unbind_methods(model, record)
    model.__dict__.pop(RECORD, None)


def _release(model: PreTrainedModel, block: Holder) -> None:
    """What is left to do when a block is left: the model goes the way of those who still hold its patch."""
    block.left = True
    record = record_of(model)
    if record is not None and block in record.holders.blocks:
        record.holders.blocks.remove(block)
    elif block.suspended is not None and (last := block.suspended.newest()) is not None:
        record = _ensure_installed(model, last)
        record.holders.take_back(block.suspended)
    if record is None:
        return
    rest = record.holders.newest()
    if rest is None:
        _uninstall(model, record)
    elif (rest.route, rest.linears) != (record.route, record.linears) and not record.holders.in_use_elsewhere():
        _ensure_installed(model, rest)


def _choose_route(model: PreTrainedModel, route: str) -> str:
    swappable = sum(type(module) in _SWAPPED for module in model.modules())
    if route == "swap" and not swappable:
        names = " or ".join(kind.__name__ for kind in _SWAPPED)
        raise UnsupportedModelError(f'{type(model).__name__} has no {names} to swap; use route="interface" or "auto".')
    if route != "auto":
        return route
    # A model with some layers of another kind, or with layers on other ranks, is the interface's.
    return "swap" if swappable == text_config(model).num_hidden_layers else "interface"


def _install_checked(model: PreTrainedModel, record: PatchRecord, expected: StockNotes | None) -> None:
    """Puts everything in place and compares it with the stock model if asked to; if that fails, all is as it was."""
    _install(model, record)
    try:
        if expected is not None:
            check_dry_run(model, expected)
    except BaseException:
        _uninstall(model, record)
        raise


def _install(model: PreTrainedModel, record: PatchRecord) -> None:
    """Puts everything in place, or nothing."""
    before = [(config, config._attn_implementation) for config in configs_of(model)]
    try:
        _set_implementation(model, record.route)
        record.implementations = [
            (config, old, config._attn_implementation) for config, old in before if config._attn_implementation != old
        ]
        if record.route == "swap":
            record.swapped = paged_views(model, _SWAPPED)
            swap_modules(model, record.swapped)
        if record.linears == "auto":
            take_linears(model)
        bind_methods(model, record)
        model.__dict__[RECORD] = record
    except BaseException:
        for config, old in before:
            config._attn_implementation_internal = old
        _uninstall(model, record)
        raise


def _set_implementation(model: PreTrainedModel, route: str) -> None:
    """Sets the attention implementation that the route needs, for the text part only."""
    if route == "swap":
        set_implementation(model)
        return
    interface.register()
    set_implementation(model, interface.interface_name)


def _is_intact(model: Any, record: PatchRecord) -> bool:
    """Whether nobody has taken parts of the patch away since, for instance by `set_attn_implementation`."""
    present = set(model.modules())
    return (
        has_implementation(model, record.route)
        and all(paged in present for paged, _ in record.swapped)
        and all(config._attn_implementation == installed for config, _, installed in record.implementations)
        and all(name in model.__dict__ for name in record.methods)
    )
