"""What a cache must have in common with a model to be read by it, and where the model's layers live."""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["ModelIdentity", "differing_weights", "layer_devices", "model_identity", "weights_fingerprint"]

_SAMPLES = 64  # elements of each parameter that are compared
_FEW = 24  # parameters in a fingerprint
_GOLDEN = 0.6180339887498949  # steps of this part of the whole spread evenly, and fall on no period of the layers
_UNKNOWN = -1  # in place of a checksum: the parameter lies on disk or in a form that cannot be sampled
# Of a config: what says nothing about keys and values, or is compared by itself (dtype, rope_parameters).
_IRRELEVANT = frozenset(
    {
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "rope_parameters",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


@dataclass(frozen=True)
class ModelIdentity:
    """What tells one model from another.

    Args:
        config (`dict[str, Any]`): The architecture: the text config without what does not concern keys and values.
        rope (`Any`): Its rotary parameters.
        dtype (`str`, *optional*): The model's dtype, as in `"bfloat16"`; `None` if the model was not at hand.
        weights (`tuple[int, ...]`): A checksum of a sample of each parameter, -1 for one that could not be read; empty
            if the model was not at hand.
        parameters (`int`): Checksum of the parameters' names and shapes; 0 if the model was not at hand.
        layers (`tuple[int, ...]`): Layers with keys of their own in this process; empty if that is not known.
        shards (`int`): Processes that share the heads of each layer.
    """

    config: dict[str, Any]
    rope: Any
    dtype: str | None = None
    weights: tuple[int, ...] = ()
    parameters: int = 0
    layers: tuple[int, ...] = ()
    shards: int = 1

    def shape_difference(self, kv_heads: int, head_dim: int) -> str | None:
        """How the shape of stored keys differs from this model's.

        Args:
            kv_heads (`int`): KV heads stored of a layer.
            head_dim (`int`): Channels of each.

        Returns:
            `str` or `None`: The difference, in words; `None` if there is none, or the config does not say.
        """
        dims, heads = set(_numbers(self.config, "head_dim")), set(_numbers(self.config, "key_value_heads", "kv_heads"))
        width, queries = self.config.get("hidden_size"), self.config.get("num_attention_heads")
        if not dims and isinstance(width, int) and isinstance(queries, int):
            dims = {width // queries}
        if not heads and isinstance(queries, int):
            heads = {queries}
        if self.config.get("multi_query"):
            heads = heads | {1}
        heads |= {max(1, count // self.shards) for count in heads}
        if dims and head_dim not in dims:
            return f"its heads have {' or '.join(map(str, sorted(dims)))} channels, not {head_dim}"
        if heads and kv_heads not in heads:
            return f"its layers have {' or '.join(map(str, sorted(heads)))} KV heads, not {kv_heads}"
        return None

    def difference(self, other: "ModelIdentity") -> str | None:
        """How another model differs.

        Args:
            other (`ModelIdentity`): The other one; parts that only one of the two knows are not compared.

        Returns:
            `str` or `None`: The first difference, in words; `None` if there is none.
        """
        shared = self.config.keys() & other.config.keys()
        for name in sorted(shared, key=lambda name: (name != "model_type", name)):
            if self.config[name] != other.config[name]:
                return f"its {name} is {other.config[name]!r}, not {self.config[name]!r}"
        if self.rope != other.rope:
            return f"its rope parameters are {other.rope!r}, not {self.rope!r}"
        if self.dtype is not None and other.dtype is not None and self.dtype != other.dtype:
            return f"its dtype is {other.dtype}, not {self.dtype}"
        if not self.weights or not other.weights:
            return None
        if self.parameters != other.parameters or len(self.weights) != len(other.weights):
            return "its parameters have other names or shapes (an adapter added or merged, another quantisation?)"
        differing = sum(a != b and _UNKNOWN not in (a, b) for a, b in zip(self.weights, other.weights, strict=True))
        return f"{differing} of its {len(self.weights)} parameters have other values" if differing else None


def model_identity(config: Any, model: nn.Module | None = None) -> ModelIdentity:
    """The identity of a model.

    Args:
        config (`PreTrainedConfig`): Its config; of a composite model the text decoder's part counts.
        model (`nn.Module`, *optional*): The model, for its dtype and weights.

    Returns:
        `ModelIdentity`: The identity; of the weights only a sample is read.
    """
    values = json.loads(config.get_text_config(decoder=True).to_json_string(use_diff=False))
    relevant = {name: value for name, value in values.items() if name not in _IRRELEVANT and name[:1] != "_"}
    rope = values.get("rope_parameters")
    if model is None:
        return ModelIdentity(relevant, rope)
    checksum = 0
    weights = []
    for name, parameter in model.named_parameters():
        checksum = zlib.crc32(f"{name} {tuple(parameter.shape)}".encode(), checksum)
        weights.append(_sample(parameter))
    dtype = str(getattr(model, "dtype", None)).removeprefix("torch.")
    layers, shards = _own_layers(config, model), getattr(model, "tp_size", None) or 1
    return ModelIdentity(relevant, rope, dtype, tuple(weights), checksum, layers, shards)


def _own_layers(config: Any, model: nn.Module) -> tuple[int, ...]:
    """The layers of the model in this process that keep keys and values of their own, where modules tell."""
    text = config.get_text_config(decoder=True)
    if text is not config:  # other parts of a composite model number their layers alike
        return ()
    shared = getattr(text, "kv_sharing_modes", None) or [None] * text.num_hidden_layers
    here = {getattr(module, "layer_idx", None) for module in model.modules()}
    return tuple(i for i, mode in enumerate(shared) if i in here and mode != "reuse")


def _numbers(value: Any, *endings: str) -> Iterator[int]:
    """The positive integers of a config, of its layers too, whose names end so."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if isinstance(inner, int) and inner > 0 and str(name).endswith(endings):
                yield inner
            else:
                yield from _numbers(inner, *endings)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, *endings)


def weights_fingerprint(model: nn.Module) -> tuple[int, ...]:
    """Checksums of a few weights, cheap enough for every `generate` call (about a millisecond).

    Args:
        model (`nn.Module`): The model.

    Returns:
        `tuple[int, ...]`: How many parameters there are, and a checksum of a sample of some of them, -1 for one that
        could not be read.
    """
    parameters = list(model.parameters())
    count = len(parameters)
    chosen = range(count) if count <= _FEW else [int(count * (i * _GOLDEN % 1)) for i in range(_FEW)]
    return (count, *(_sample(parameters[i]) for i in chosen))


def differing_weights(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two fingerprints are of different weights.

    Args:
        one (`tuple[int, ...]`): From [`weights_fingerprint`].
        other (`tuple[int, ...]`): Likewise.

    Returns:
        `bool`: False if they are alike as far as both are known.
    """
    if len(one) != len(other):
        return True
    return any(a != b and _UNKNOWN not in (a, b) for a, b in zip(one, other, strict=True))


def _sample(parameter: torch.Tensor) -> int:
    data: Any = parameter.detach()
    if hasattr(data, "to_local"):  # a shard of a tensor-parallel model
        data = data.to_local()
    if data.device.type == "meta":
        return _UNKNOWN
    try:
        flat = data.flatten()
        chosen = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].contiguous().cpu()
        return zlib.crc32(chosen.view(torch.uint8).numpy().tobytes())
    except (NotImplementedError, RuntimeError, TypeError):
        return _UNKNOWN  # quantised tensors of other libraries may refuse to be cut


def layer_devices(model: nn.Module, layers: int) -> list[torch.device]:
    """Where the keys and values of each layer will arrive.

    Args:
        model (`nn.Module`): The model, with or without accelerate's hooks.
        layers (`int`): How many layers its cache has.

    Returns:
        `list[torch.device]`: The device of each layer's attention.
    """
    found: dict[int, torch.device] = {}
    for module in model.modules():
        layer_idx = getattr(module, "layer_idx", None)
        if isinstance(layer_idx, int) and layer_idx not in found:
            device = _execution_device(module)
            if device is not None:
                found[layer_idx] = device
    default = _execution_device(model) or torch.device("cpu")
    return [found.get(i, default) for i in range(layers)]


def _execution_device(module: nn.Module) -> torch.device | None:
    for part in module.modules():
        device: Any = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    devices: Sequence[torch.device] = [p.device for p in module.parameters() if p.device.type != "meta"]
    return devices[0] if devices else None
