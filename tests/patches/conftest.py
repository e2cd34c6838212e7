"""Tiny random models of many families, and the ways of generating that every one of them must get right."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import as_argument
from kvcompress_hf.patches import is_patched, prefill

WINDOW = 24
PROMPT = 40

_BASE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    # Wide enough that the two largest logits are never close to equal.
    "initializer_range": 0.2,
}
_ALTERNATING = ["sliding_attention", "full_attention"]

# Family name: class prefix, changes to the base config.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 64, "hidden_size": 128, "num_hidden_layers": 3}),
    "llama-mha": ("Llama", {"head_dim": 32, "num_key_value_heads": 4, "attention_bias": True}),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": WINDOW, "num_hidden_layers": 3}),
    "mistral-full": ("Mistral", {"head_dim": 16, "sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "sliding_window": WINDOW, "layer_types": _ALTERNATING, "attn_logit_softcapping": 2.0},
    ),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "phi3-longrope": (
        "Phi3",
        {
            "original_max_position_embeddings": PROMPT + 10,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [1.5] * 8,
                "original_max_position_embeddings": PROMPT + 10,
            },
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
    "phimoe": ("Phimoe", {"sliding_window": WINDOW, "num_local_experts": 2}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": WINDOW, "layer_types": _ALTERNATING}),
    "cohere2": ("Cohere2", {"head_dim": 16, "sliding_window": WINDOW, "layer_types": _ALTERNATING}),
    "starcoder2": ("Starcoder2", {"sliding_window": WINDOW}),
    "mixtral": ("Mixtral", {"num_local_experts": 2, "sliding_window": WINDOW}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1}),
    "granite": ("Granite", {}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "stablelm": ("StableLm", {}),
    "gpt-neox": ("GPTNeoX", {"num_key_value_heads": None}),
    "exaone4": ("Exaone4", {"sliding_window": WINDOW, "layer_types": _ALTERNATING}),
    "gemma3n": (
        "Gemma3n",
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING * 2,
            "intermediate_size": [96] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
            "vocab_size_per_layer_input": 160,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
        },
    ),
    "gemma4": (
        "Gemma4",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING * 2,
            "vocab_size_per_layer_input": 160,
            "hidden_size_per_layer_input": 16,
        },
    ),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}),
}


def _build(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    prefix, own = FAMILIES[family]
    values = {k: v for k, v in {**_BASE, **own, **changes}.items() if k != "num_key_value_heads" or v}
    if prefix == "GPT2":
        values = {k: values[k] for k in values if k in ("vocab_size", "initializer_range") or "token" in k or "n_" in k}
    text = "TextConfig" if hasattr(transformers, f"{prefix}TextConfig") else "Config"
    config = getattr(transformers, prefix + text)(**values)
    torch.manual_seed(seed)
    return getattr(transformers, prefix + ("LMHeadModel" if prefix == "GPT2" else "ForCausalLM"))(config).eval()


@pytest.fixture(scope="session")
def build_model() -> Callable[..., PreTrainedModel]:
    """`build_model(family, seed=0, **config_changes)`: a new tiny random model in evaluation mode."""
    return _build


def prompt_ids(batch: int = 1, tokens: int = PROMPT, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 160, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padded_inputs() -> dict[str, torch.Tensor]:
    """Three rows, left-padded by 0, 7 and 29 tokens: the last one's padding is longer than the window."""
    ids, mask = prompt_ids(3), torch.ones(3, PROMPT, dtype=torch.long)
    for row, pads in enumerate((0, 7, 29)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _run(model: PreTrainedModel, mode: str = "greedy", new_tokens: int = 64, **kwargs: Any) -> Any:
    torch.manual_seed(7)
    arguments = {"max_new_tokens": new_tokens, "do_sample": False} | kwargs
    return MODES[mode](model, arguments)


def _with(inputs: Callable[[], dict[str, torch.Tensor]], **changes: Any) -> Callable[..., Any]:
    return lambda model, arguments: model.generate(**(inputs() | changes | arguments))


def _one_prompt() -> dict[str, torch.Tensor]:
    return {"input_ids": prompt_ids()}


def _repeating_prompt() -> dict[str, torch.Tensor]:
    """So that some of the looked-up tokens are taken and others rolled back."""
    return {"input_ids": prompt_ids(tokens=PROMPT // 4).repeat(1, 4)}


def _sampling(**changes: Any) -> Callable[..., Any]:
    settings = {"do_sample": True, "temperature": 0.9, "top_k": 20, **changes}
    return lambda model, arguments: model.generate(**padded_inputs(), **(arguments | settings))


@functools.cache
def _draft() -> PreTrainedModel:
    return _build("qwen3", seed=3, num_hidden_layers=1)


def _assisted(model: PreTrainedModel, arguments: dict[str, Any]) -> Any:
    # Another model for a draft is nearly always wrong, the model itself always right; both kinds of round must do.
    wrong = model.generate(prompt_ids(), assistant_model=_draft(), **(arguments | {"max_new_tokens": 8}))
    right = model.generate(prompt_ids(seed=2), assistant_model=model, **arguments)
    return torch.cat([wrong, right], 1)


class _Streamed(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.flatten())

    def end(self) -> None:
        self.tokens.append(torch.tensor([-1]))


def _streaming(model: PreTrainedModel, arguments: dict[str, Any]) -> torch.Tensor:
    streamer = _Streamed()
    model.generate(prompt_ids(), streamer=streamer, **arguments)
    return torch.cat(streamer.tokens)


class _OddSum(StoppingCriteria):
    """Each row stops for itself, at a place that depends on what it said."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return (input_ids[:, PROMPT:].sum(1) % 5 == 0) & (input_ids.shape[1] > PROMPT + 3)


def _embeddings(model: PreTrainedModel, arguments: dict[str, Any]) -> Any:
    inputs = padded_inputs()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    return model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **arguments)


def _continued(only_new: bool) -> Callable[..., Any]:
    """A second turn in the cache of the first; the stock model gets everything at once, if that is the same.

    With only the new tokens, long-rope models do not notice where their factors change: then stock has its own cache.
    """

    def run(model: PreTrainedModel, arguments: dict[str, Any]) -> torch.Tensor:
        cache: Any = DynamicCache(config=model.config) if only_new else None
        if is_patched(model):
            cache = CompressedPagedCache(model.config, "lossless")
        past = as_argument(model, cache)
        first = model.generate(prompt_ids(tokens=30), **past, **(arguments | {"max_new_tokens": 5}))
        whole = torch.cat([first, prompt_ids(tokens=7, seed=3)], 1)
        new = whole[:, cache.get_seq_length() :] if only_new else whole
        out = model.generate(new, attention_mask=torch.ones_like(whole), **past, **arguments)
        return out[:, new.shape[1] :]

    return run


def _prefix_for_beams(model: PreTrainedModel, arguments: dict[str, Any]) -> Any:
    """One prefix, read once, for three beams."""
    ids, cache = prompt_ids(), None
    if is_patched(model):
        cache = prefill(model, ids[:, :25])
        cache.batch_repeat_interleave(3)
    return model.generate(ids, num_beams=3, num_return_sequences=2, **as_argument(model, cache), **arguments)


#: Every way of generating, as a function of the model and of further arguments for `generate`.
MODES: dict[str, Callable[[PreTrainedModel, dict[str, Any]], Any]] = {
    "greedy": _with(_one_prompt),
    "padded": _with(padded_inputs),
    "chunked": _with(padded_inputs, prefill_chunk_size=11),
    "beams": _with(padded_inputs, num_beams=3),
    "sampling": _sampling(),
    "returned": _sampling(num_return_sequences=3),
    "lookup": _with(_repeating_prompt, prompt_lookup_num_tokens=3),
    "assisted": _assisted,
    "early-exit": _with(_repeating_prompt, assistant_early_exit=1),
    "streamed": _streaming,
    "stopped": _with(padded_inputs, stopping_criteria=StoppingCriteriaList([_OddSum()])),
    "guided": _with(_one_prompt, guidance_scale=1.5, negative_prompt_ids=prompt_ids(tokens=9, seed=6)),
    "embeddings": _embeddings,
    "continued": _continued(only_new=False),
    "continued-new": _continued(only_new=True),
    "prefix-beams": _prefix_for_beams,
}


@pytest.fixture(scope="session")
def run_generate() -> Callable[..., Any]:
    """`run_generate(model, mode, new_tokens)`: one of `MODES`, always on the same input."""
    return _run


@pytest.fixture(scope="session")
def modes() -> tuple[str, ...]:
    """Names of the ways of generating that `run_generate` knows."""
    return tuple(MODES)


@pytest.fixture(scope="session")
def prompt() -> Callable[..., torch.Tensor]:
    """`prompt(batch=1, tokens=40, seed=1)`: random token ids `[batch, tokens]`."""
    return prompt_ids


@pytest.fixture(scope="session")
def padded() -> dict[str, torch.Tensor]:
    """A left-padded batch of three as `input_ids` and `attention_mask`."""
    return padded_inputs()


@pytest.fixture(scope="session")
def snapshot() -> Callable[[PreTrainedModel], dict[str, Any]]:
    """`snapshot(model)`: everything about a model that patching must not leave changed."""

    def take(model: PreTrainedModel) -> dict[str, Any]:
        return {
            "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
            "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
            "training": {name: module.training for name, module in model.named_modules()},
            "hooks": {
                name: (len(module._forward_hooks), len(module._forward_pre_hooks))
                for name, module in model.named_modules()
            },
            "tensors": {name: id(tensor) for name, tensor in model.named_parameters()},
            "class": type(model),
            "config": model.config.to_json_string(),
            "implementations": {
                name: module.config._attn_implementation
                for name, module in model.named_modules()
                if isinstance(module, PreTrainedModel)
            },
            "generation_config": model.generation_config.to_json_string() if model.can_generate() else None,
        }

    return take
