"""Decode steps of `generate` replayed from a graph of the device: what may be captured, and what stands in for a pass.

A replayed step costs the host one call in place of a pass through the model in Python. What differs from step to step
is copied to where the graph reads it; sampling, and whatever else `generate` does, comes after as ever.
"""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.modules import module as modules
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import Cache, GenerationMode
from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.kernels.cuda.capture import CudaCapturer
from kvcompress_hf.patches.passes import Patch, check_implementation
from kvcompress_hf.patches.support import text_config
from kvcompress_hf.runtime.replay import Capturer

__all__ = ["GraphSteps", "capturer_for", "start_graphs", "take_option"]

_OPTION = "graph"
#: What a step takes that differs from the last one's.
_CHANGING = ("input_ids", "position_ids", "attention_mask")
#: Rotary embeddings that look at positions on the host.
_HOST_ROPES = ("dynamic", "longrope")


class HookedPatch(Patch, Protocol):
    """What is needed of a patch record."""

    hooks: list[RemovableHandle]


def take_option(option: Any) -> tuple[Any, bool]:
    """Takes `graph` out of what a call of `generate` was given as `kvcompress`.

    Args:
        option: A recipe in any form, or a list of such.

    Returns:
        `tuple[Any, bool]`: The recipe that is left, `None` if nothing is; and whether steps are to be replayed.

    Raises:
        ValueError: If a row of a list has it.
        TypeError: If it is neither true nor false.
    """
    if isinstance(option, (list, tuple)) and any(isinstance(row, Mapping) and _OPTION in row for row in option):
        raise ValueError(
            'kvcompress has "graph" in one of its rows, but a step is one for all of them. Give the rows to '
            'CompressedPagedCache(model.config, rows), and pass that cache beside kvcompress={"graph": True}.'
        )
    if not isinstance(option, Mapping) or _OPTION not in option:
        return option, False
    graph = option[_OPTION]
    if not isinstance(graph, bool):
        raise TypeError(f'kvcompress["graph"] is {graph!r}; it must be True or False.')
    return {name: value for name, value in option.items() if name != _OPTION} or None, graph


def capturer_for(device: torch.device) -> Capturer | None:
    """What captures and replays steps on a device.

    Args:
        device (`torch.device`): Where the model is.

    Returns:
        `Capturer` or `None`: `None` where there is nothing of the kind.
    """
    return CudaCapturer(device) if device.type == "cuda" else None


def start_graphs(
    model: PreTrainedModel,
    record: HookedPatch,
    cache: CompressedPagedCache,
    generation_config: GenerationConfig,
    mode: GenerationMode | None,
) -> None:
    """Lets the decode steps of one call of `generate` be replayed, or says once why they are not.

    Stock `generate` has a place for another call in place of the model's, that of a compiled one, which goes by
    `compile_config`. It is used for ours; nothing is compiled.

    Args:
        model (`PreTrainedModel`): The patched model.
        record (`PatchRecord`): Its patch record.
        cache (`CompressedPagedCache`): The cache of this call.
        generation_config (`GenerationConfig`): The config of this call alone.
        mode (`GenerationMode`, *optional*): How tokens are chosen.

    Raises:
        ValueError: If the call is to be compiled as well.
    """
    if generation_config.compile_config is not None:
        raise ValueError('kvcompress={"graph": True} and compile_config contradict each other; leave one of them out.')
    why = _obstacle_of_mode(mode) or _obstacle_of_model(model, record)
    if why is not None:
        _tell(record, why)
        return
    capturer = capturer_for(model.device)
    if capturer is None:
        _tell(record, f"there are no graphs on a {model.device.type} device")
        return
    generation_config.compile_config = GraphSteps(model, record, cache, capturer)


class GraphSteps:
    """Stands in for the model in the decoding loop of one call of `generate`.

    Args:
        model (`PreTrainedModel`): The patched model.
        record (`PatchRecord`): Its patch record.
        cache (`CompressedPagedCache`): The cache of this call.
        capturer (`Capturer`): Records and replays.
    """

    def __init__(
        self, model: PreTrainedModel, record: HookedPatch, cache: CompressedPagedCache, capturer: Capturer
    ) -> None:
        self._model, self._record, self._cache, self._capturer = model, record, cache, capturer
        self._steps = cache.step_replay(capturer)
        self._warm = False  # once a step has been run: kernels are loaded, and plans made
        self._constants: dict[str, Any] | None = None  # what the captured step was called with, besides these two:
        self._ids = self._positions = torch.zeros((0, 1), dtype=torch.int64)

    def __call__(self, **inputs: Any) -> Any:
        """As the model: what `generate` has prepared for a forward pass, and what comes of it.

        Args:
            inputs: Arguments of the model by name.

        Returns:
            `ModelOutput`: As from the model, in memory of its own.
        """
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1 or not self._cache.is_initialized:
            return self._model(**inputs)  # a chunk of the prompt
        why = self._obstacle(inputs, ids)
        if why is None and self._warm:
            return self._replayed(inputs, ids)
        if why is not None:
            _tell(self._record, why)
        outputs = self._model(**inputs)
        self._warm = True
        return outputs

    def _obstacle(self, inputs: Mapping[str, Any], ids: Tensor) -> str | None:
        """Why this step cannot be replayed."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled(ids.device.type):
            return "autograd or autocast is on"
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                if name not in _CHANGING:
                    return f"the model is given the tensor {name} at every step"
            elif value is not self._cache and not isinstance(value, (bool, int, float, str, type(None))):
                return f"the model is given {name}, a {type(value).__name__}, at every step"
        for name in ("output_attentions", "output_hidden_states"):
            if inputs.get(name):
                return f"{name}=True was asked for"
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        # The column of a new token is ones, whoever is padded before; so the mask says nothing of this step.
        if mask is not None and mask.shape != (ids.shape[0], self._cache.get_seq_length() + 1):
            return f"attention_mask has shape {tuple(mask.shape)}"
        if positions is not None and (positions.dim() != 2 or positions.shape[1] != 1):
            return f"position_ids have shape {tuple(positions.shape)}"
        return self._steps.obstacle() if self._warm else None

    def _replayed(self, inputs: Mapping[str, Any], ids: Tensor) -> Any:
        check_implementation(self._model, self._record)
        constants = {name: value for name, value in inputs.items() if name not in _CHANGING}
        positions = inputs.get("position_ids")
        if positions is None:  # as the model would make them, from a number on the host
            positions = torch.full((1, 1), self._cache.get_seq_length(), device=ids.device)
        if constants != self._constants or _form(ids, positions) != _form(self._ids, self._positions):
            self._constants, self._ids, self._positions = constants, ids.clone(), positions.clone()
            self._steps = self._cache.step_replay(self._capturer)
        else:
            self._ids.copy_(ids)
            self._positions.copy_(positions)
        result = self._steps.step(self._pass)
        # The graph writes to the same memory at the next step, and who called may keep what it got.
        return type(result)(
            **{name: value.clone() if isinstance(value, Tensor) else value for name, value in result.items()}
        )

    def _pass(self) -> Any:
        result = self._model(input_ids=self._ids, position_ids=self._positions, **(self._constants or {}))
        for name, value in result.items():
            if not isinstance(value, (Tensor, Cache)):
                raise UnsupportedFeatureError(f"its output {name} is a {type(value).__name__}")
        return result


def _form(*tensors: Tensor) -> list[tuple[Any, ...]]:
    return [(each.shape, each.dtype, each.device) for each in tensors]


# -- what stands in the way --------------------------------------------------------------------------------------------


def _tell(record: Patch, why: str) -> None:
    """Warns, once per model and reason, that steps are run as without."""
    what = f"graph: {why}"
    if what not in record.told:
        record.told.add(what)
        warnings.warn(
            f'kvcompress={{"graph": True}} does nothing here, and steps are run one by one: {why}.',
            UserWarning,
            stacklevel=4,
        )


def _obstacle_of_mode(mode: GenerationMode | None) -> str | None:
    if mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return None
    told = "this way of decoding" if mode is None else mode.value.replace("_", " ")
    return f"steps of {told} are not replayed, only those of greedy search and sampling"


def _obstacle_of_model(model: PreTrainedModel, record: HookedPatch) -> str | None:
    """Why steps of a model cannot be replayed, whatever they are given."""
    name = type(model).__name__
    if record.route != "swap":
        return f"{name} is not of the families of Llama's shape whose attention is swapped"
    if model.training:
        return f"{name} is in training mode"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "several processes work together"
    if any("_hf_hook" in part.__dict__ for part in model.modules()):
        return f"parts of {name} are moved or offloaded by accelerate"
    ropes = [rope for rope in _rope_types(model) if rope in _HOST_ROPES]
    if ropes:
        return f"a rotary embedding of type {ropes[0]!r} changes with the length"
    update = "_update_model_kwargs_for_generation"
    own = getattr(type(model), update) is not getattr(GenerationMixin, update) or update in model.__dict__
    if own or "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{name} makes positions and masks of its steps in its own way"
    return _obstacle_of_hooks(model, record)


def _rope_types(model: PreTrainedModel) -> list[str]:
    parameters = getattr(text_config(model), "rope_parameters", None) or {}
    ropes = [parameters, *(each for each in parameters.values() if isinstance(each, Mapping))]
    return [str(rope["rope_type"]) for rope in ropes if "rope_type" in rope]


def _obstacle_of_hooks(model: PreTrainedModel, record: HookedPatch) -> str | None:
    """Hooks would run at captures alone; ours and those by which transformers collects outputs do no harm."""
    if modules._global_forward_hooks or modules._global_forward_pre_hooks:
        return "there are hooks on all modules of the process"
    mine = {handle.id for handle in record.hooks}
    for part in model.modules():
        for number, hook in (*part._forward_hooks.items(), *part._forward_pre_hooks.items()):
            if number not in mine and not getattr(hook, "__module__", "").startswith("transformers."):
                return f"there is a hook on a {type(part).__name__}"
    return None
