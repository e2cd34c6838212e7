"""Model shapes the machine drives caches with: how many layers, which of them slide, and which read another's keys."""

from dataclasses import dataclass, field

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
)

HEAD_DIM, KV_HEADS, Q_HEADS, WINDOW = 16, 2, 4, 12

_BASE = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": Q_HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ALTERNATING = ["sliding_attention", "full_attention"]


@dataclass
class Shape:
    """What a cache is made for.

    Args:
        name (`str`): For people.
        config (`PreTrainedConfig`): Given to the cache.
        windows (`list[int | None]`): Sliding window per layer.
        sources (`list[int]`): Per layer, whose keys and values it reads: its own number, or that of an earlier layer.
    """

    name: str
    config: object
    windows: list
    sources: list
    _models: list = field(default_factory=list)

    @property
    def layers(self):
        return len(self.windows)

    @property
    def slides(self):
        """Whether any layer has a window."""
        return any(window is not None for window in self.windows)

    def model(self):
        """A tiny model of this shape, which `load` asks for; made once."""
        if not self._models:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                self._models.append(AutoModelForCausalLM.from_config(self.config).eval())
        return self._models[0]


def _shape(name, config, shared=0):
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if name == "sliding":
        types = ["sliding_attention"] * config.num_hidden_layers
    windows = [WINDOW if kind == "sliding_attention" else None for kind in types]
    own = len(types) - shared
    sources = [i if i < own else max(j for j in range(own) if types[j] == types[i]) for i in range(len(types))]
    return Shape(name, config, windows, sources)


SHAPES = {
    shape.name: shape
    for shape in (
        _shape("llama", LlamaConfig(**_BASE)),
        _shape("sliding", MistralConfig(**_BASE, sliding_window=WINDOW)),
        _shape(
            "mixed",
            Gemma3TextConfig(**{**_BASE, "num_hidden_layers": 2}, sliding_window=WINDOW, layer_types=_ALTERNATING),
        ),
        _shape(
            "shared",
            Gemma3nTextConfig(
                **{**_BASE, "num_hidden_layers": 4, "intermediate_size": [32] * 4},
                num_kv_shared_layers=2,
                sliding_window=WINDOW,
                layer_types=_ALTERNATING * 2,
                activation_sparsity_pattern=[0.0] * 4,
                vocab_size_per_layer_input=32,
                hidden_size_per_layer_input=8,
                laurel_rank=8,
                altup_num_inputs=2,
            ),
            shared=2,
        ),
    )
}
