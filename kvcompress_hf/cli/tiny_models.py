"""Tiny random models of any family of transformers, made without a network: what `kvcompress support` tries out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY = 160
LONGEST = 512
#: Most parameters of a model that is still worth trying.
LARGEST = 50_000_000
#: Shorter than a prompt, so that windows and chunks do something.
WINDOW = 24

# What a field of a config is set to, wherever a config has a field of that name.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), LONGEST),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim", "embed_dim", "lru_width"), 64),
    **dict.fromkeys(
        (
            "intermediate_size",
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "moe_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
            "shared_intermediate_size",
            "expert_ffn_hidden_size",
            "ffn_hidden_size",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "ffn_dim",
            "d_inner",
            "dff",
            "dim_ff",
            "feed_forward_size",
            "out_hidden_size",
            "text_hidden_size",
            "merger_intermediate_size",
        ),
        64,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "num_layers",
            "n_layer",
            "n_layers",
            "decoder_layers",
            "encoder_layers",
            "num_decoder_layers",
            "num_encoder_layers",
            "num_blocks",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "swa_num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "attention_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "num_decoder_attention_heads",
            "num_encoder_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(
        (
            "head_dim",
            "swa_head_dim",
            "dim_head",
            "d_head",
            "d_kv",
            "kv_channels",
            "v_head_dim",
            "swa_v_head_dim",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "kv_lora_rank",
            "q_lora_rank",
            "index_head_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_head_dim",
            "rotary_dim",
        ),
        16,
    ),
    **dict.fromkeys(("global_head_dim", "attention_head_dim", "attention_head_size"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "index_n_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "local_attention"), WINDOW),
    **dict.fromkeys(("attention_chunk_size", "attention_window_size", "keep_window_size"), WINDOW),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "index_topk"), 16),
    # Where random weights are drawn this wide, the two largest logits are never close to equal.
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
}
_OTHERS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "sep_token_id": 2,
    "is_decoder": True,
    # Random models with tied embeddings only repeat their last token.
    "tie_word_embeddings": False,
}

# Positions in three parts; the sections make up half of head_dim.
_SECTIONED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_SHARING = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 16,
}
# Where a part of a family's config hangs together in a way no field's name tells.
_FAMILIES: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "cohere_compass_text": {
        "rope_parameters": {
            "sliding_attention": _SECTIONED,
            "full_attention": None,
        }
    },
    "cpmant": {"position_bias_num_buckets": 32},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "dots3_note_text": {
        f"swa_{name}": size
        for name, size in {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "head_dim": 32,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        }.items()
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [64] * 4},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            **{name: _SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")},
            **{name: _SIZES[name] for name in ("num_attention_heads", "num_key_value_heads")},
            "num_hidden_layers": 2,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        },
    },
    "gemma4_text": _SHARING,
    "gemma4_unified_text": _SHARING,
    "gemma4_unified_vision": {"mm_embed_dim": 64, "output_proj_dims": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "glm4v_moe_text": {"rope_parameters": _SECTIONED | {"mrope_section": [2, 1, 1]}},
    "glm4v_text": {"rope_parameters": _SECTIONED},
    "glm_ocr_text": {"rope_parameters": _SECTIONED},
    "paddleocr_vl_text": {"rope_parameters": _SECTIONED},
    "qwen2_5_omni_text": {"rope_parameters": _SECTIONED},
    "qwen2_5_vl_text": {"rope_parameters": _SECTIONED},
    "qwen2_vl_text": {"rope_parameters": _SECTIONED},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 2,
    },
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32)},
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64, "shape_embed_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> dict[str, str]:
    """The families of transformers that write text.

    Returns:
        Model type to class name: all causal language models, then those that read images as well.
    """
    names = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    order = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
    return {
        family: names[family] if isinstance(names[family], str) else names[family][0] for family in dict.fromkeys(order)
    }


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random language model of a family, in evaluation mode.

    Args:
        model_type: One of `families`.
        seed: Seed of the weights.

    Returns:
        The model, in float32 on the CPU.

    Raises:
        ValueError: If the model is larger than `LARGEST`.
        Exception: Whatever else the family's code raises where the shrunk config does not suit it.
    """
    model_class = getattr(transformers, families()[model_type])
    config_class = CONFIG_MAPPING[model_type]
    if model_class.config_class in _parts(config_class).values():
        # The mapping names the composite config, the class wants the part that writes text.
        config_class = model_class.config_class
    config = tiny_config(config_class)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"its parts do not shrink: {size / 1e6:.0f} million parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A config with every size shrunk, and one layer at least of each kind that the family's default has.

    Args:
        config_class: The config class of the family.

    Returns:
        The config, parts of a composite one shrunk alike.
    """
    names = {f.name for f in dataclasses.fields(config_class)}
    default = _defaults(config_class)
    values: dict[str, Any] = {name: size for name, size in (_SIZES | _OTHERS).items() if name in names}
    values |= {name: tiny_config(part) for name, part in _parts(config_class).items()}
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        values["num_key_value_heads"] = 4  # latent attention has no groups
    rope = default.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope and "rope_parameters" in names:
        values["rope_parameters"] = rope | {"mrope_section": _SECTIONED["mrope_section"]}
    values |= _layer_values(default, names)
    return config_class(**(values | _FAMILIES.get(config_class.model_type, {})))


def _layer_values(default: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The number of layers, and every list with an entry per layer, so that each kind of layer is there."""
    layers = default.get("num_hidden_layers", default.get("num_layers"))
    lists = {
        name: list(value)
        for name, value in default.items()
        if name in names and isinstance(value, (list, tuple)) and len(value) == layers and layers > 2
    }
    count = max([2, *(len(set(map(str, value))) for name, value in lists.items() if name == "layer_types")])
    shared = 2 if default.get("num_kv_shared_layers") else 0
    values: dict[str, Any] = {name: count + shared for name in ("num_hidden_layers", "num_layers") if name in names}
    if "num_kv_shared_layers" in names:
        values["num_kv_shared_layers"] = shared
    for name, value in lists.items():
        distinct = list(dict.fromkeys(value))
        values[name] = [distinct[i % len(distinct)] for i in range(count + shared)]
    return values


def _parts(config_class: type[PreTrainedConfig]) -> dict[str, type[PreTrainedConfig]]:
    """The configs inside a composite config; where any family fits, the one that is there by default."""
    parts = dict(config_class.sub_configs)
    for name, spec in (getattr(config_class, "sub_configs_defaults", None) or {}).items():
        if getattr(spec, "model_type", None):
            parts[name] = CONFIG_MAPPING[spec.model_type]
    return {name: part for name, part in parts.items() if hasattr(part, "__dataclass_fields__")}


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    try:
        return dict(vars(config_class()))
    except Exception:  # a default that its own validation refuses
        return {f.name: f.default for f in dataclasses.fields(config_class)}
