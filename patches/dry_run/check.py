"""Running the stock and the patched model through the trials, and saying what was found."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from kvcompress_hf.errors import UnsupportedModelError, is_out_of_memory
from kvcompress_hf.patches.dry_run.compare import difference, limit
from kvcompress_hf.patches.dry_run.probe import ProbeCache
from kvcompress_hf.patches.dry_run.stock import Notes, StockCache, behind_a_past, observing
from kvcompress_hf.patches.dry_run.trial import long_past, reading, run_pass
from kvcompress_hf.patches.holders import surely

__all__ = ["StockNotes", "check_dry_run", "evaluating", "observe_stock"]

#: Faults named in a refusal; a model that fails does so in every layer.
_NAMED = 2


class StockNotes(NamedTuple):
    """What the stock model did.

    Args:
        reading (`Notes`): While it read a few tokens.
        long_past (`Notes`, *optional*): Behind a long past, for models with long sliding windows.
    """

    reading: Notes
    long_past: Notes | None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in, and so are random numbers.

    Args:
        model (`nn.Module`): The model.
    """
    training = [name for name, module in model.named_modules() if module.training]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}

    def back_to_training() -> None:
        for name in training:
            # Looked up again: the module under this name may have been replaced meanwhile.
            model.get_submodule(name).training = True

    try:
        if training:  # other threads may be using the model: nothing is written that need not be
            model.eval()
        with torch.no_grad(), torch.random.fork_rng(sorted(devices, key=str)):
            yield
    finally:
        surely(back_to_training)


def observe_stock(model: PreTrainedModel) -> StockNotes:
    """Runs the unpatched model and notes what every attention layer got and gave.

    Args:
        model (`PreTrainedModel`): The model, in evaluation mode.

    Returns:
        `StockNotes`: For [`check_dry_run`]; it can be used more than once.

    Raises:
        UnsupportedModelError: If the model does not run on token ids alone, or its attention cannot be observed.
    """
    names = {id(module): name for name, module in model.named_modules()}
    try:
        with observing(model):
            first = Notes(reading(model), names)
            _run_stock(model, first, StockCache(model.config, first))
            trial, second = long_past(model), None
            if trial is not None and first.shapes:
                second = Notes(trial, names)
                _run_stock(model, second, behind_a_past(model.config, second, first.shapes))
    except UnsupportedModelError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be checked: it does not run on a few token ids alone "
            f"({type(error).__name__}: {error}). If you know that it works, patch(model, check=False) leaves the "
            "check out."
        ) from error
    return StockNotes(first, second)


def check_dry_run(model: PreTrainedModel, stock: StockNotes) -> None:
    """Runs the patched model with the `lossless` recipe and compares, layer by layer.

    Args:
        model (`PreTrainedModel`): The patched model, in evaluation mode.
        stock (`StockNotes`): What [`observe_stock`] returned.

    Raises:
        UnsupportedModelError: If the patched model fails, or a layer does not use the cache, hands it something else
            than stock attention gets, or gets something else from it; the message says which and what to do.
    """
    name = type(model).__name__
    for notes in stock:
        if notes is None:
            continue
        try:
            faults = _run_patched(model, notes)
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, ImportError):  # says nothing about the model
                raise
            raise UnsupportedModelError(
                f"{name} is not supported: with a compressed cache it stops with {type(error).__name__}: {error} "
                "Use the model unpatched, with a stock cache."
            ) from error
        if faults:
            more = len(faults) - _NAMED
            raise UnsupportedModelError(
                f"{name} is not supported: a dry run with the lossless recipe shows that {'; '.join(faults[:_NAMED])}"
                + (f"; and {more} more of this kind" if more > 0 else "")
                + ". Its attention, or something that was changed in it, does more than the compressed cache "
                'reproduces: undo such a change, try another route="swap" or "interface", or use the model unpatched. '
                "If you know that the difference is meant, patch(model, check=False) leaves this check out."
            )


def _run_stock(model: PreTrainedModel, notes: Notes, cache: StockCache) -> None:
    trial = notes.trial
    for step in range(len(trial.parts)):
        notes.step = step
        notes.logits.append(run_pass(model, trial, step, cache))


def _run_patched(model: PreTrainedModel, notes: Notes) -> list[str]:
    trial = notes.trial
    cache = ProbeCache(model.config, notes)
    for step in range(len(trial.parts)):
        cache.step = step
        logits = run_pass(model, trial, step, cache)
        cache.end_pass()
        # All layers went on with the same outputs, so what is left differs only by what comes after attention.
        found, allowed = difference(logits, notes.logits[step]), limit(model.dtype, *_dtypes(notes))
        if found > allowed and not cache.faults:
            cache.faults.append(
                f"its logits differ though all its layers agree (relative difference {found:.2g}, rounding explains "
                f"{allowed:.2g})"
            )
    if not notes.calls:
        cache.faults.append("none of its layers attends to keys and values as the stock cache returns them")
    return cache.faults


def _dtypes(notes: Notes) -> set[torch.dtype]:
    # Under autocast outputs, and so the rounding, are coarser than the model's weights.
    return {observed.output.dtype for observed in notes.calls.values()}
