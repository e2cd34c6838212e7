"""What is checked before a model is touched: everything that the config and the classes tell."""

from typing import Any

from transformers import PreTrainedModel

from kvcompress_hf.compat import (
    PreTrainedConfig,
    generate_argument,
    installed_version,
    outdated_peft,
    unreachable_argument,
)
from kvcompress_hf.errors import UnsupportedModelError

__all__ = [
    "check_adapters",
    "check_model",
    "text_config",
    "unwrap",
]

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the part of a model that writes text.

    Args:
        model (`PreTrainedModel`): The model.

    Returns:
        `PreTrainedConfig`: `model.config` itself for a plain language model.
    """
    return model.config.get_text_config(decoder=True)


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT one, which is what generates.

    Args:
        model (`Any`): Any model.

    Returns:
        `Any`: The model itself where nothing is around it.

    Raises:
        UnsupportedModelError: If a PEFT model brings keys and values of its own (prefix tuning).
    """
    if isinstance(model, PreTrainedModel) or not hasattr(model, "get_base_model"):
        return model
    check_adapters(model)
    return model.get_base_model()


def check_adapters(model: Any) -> None:
    """Refuses PEFT models whose adapters a compressed cache, or the installed peft, gets wrong.

    Args:
        model (`Any`): A PEFT model.

    Raises:
        UnsupportedModelError: If an adapter brings keys and values of its own (prefix tuning), or puts virtual tokens
            before the prompt and peft is too old for the installed transformers.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "peft_type", None) in ("PREFIX_TUNING", "CARTRIDGE"):
            raise UnsupportedModelError(
                f"The adapter {name!r} is a prefix tuning or of its kind, which fills the cache with keys and values "
                "of its own before the prompt; adapters that change weights (LoRA and its kin) or embeddings are fine."
            )
        outdated = outdated_peft() if getattr(config, "is_prompt_learning", False) else None
        if outdated is not None:
            raise UnsupportedModelError(
                f"The adapter {name!r} puts virtual tokens before the prompt, and {outdated} would put them before "
                "every new token too, on the stock model as well: wrong tokens without an error. Install a newer peft "
                "or an older transformers; adapters that change weights (LoRA and its kin) are not affected."
            )


def check_model(model: Any) -> None:
    """Refuses, with the reason, every model whose config shows that its cache cannot be compressed here.

    Args:
        model (`PreTrainedModel`): The model; only looked at.

    Raises:
        TypeError: If it is not a transformers model.
        UnsupportedModelError: If it is not supported; the message says why.
    """
    if not isinstance(model, PreTrainedModel):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(
            f"patch() takes a loaded transformers model (a PreTrainedModel), got {given}; load one with "
            "AutoModelForCausalLM.from_pretrained(...)."
        )
    reason = _reason_against(model)
    if reason is not None:
        raise UnsupportedModelError(f"{type(model).__name__} ({model.config.model_type}) is not supported: {reason}.")


def _reason_against(model: Any) -> str | None:
    config = model.config
    if config.is_encoder_decoder:
        return "it is an encoder-decoder model, and only decoder-only language models have the cache we replace"
    if not model.can_generate():
        return "it has no generate(); give the language-model class (for instance AutoModelForCausalLM)"
    text = text_config(model)
    if not isinstance(getattr(text, "num_hidden_layers", None), int):
        return "its config does not give the number of layers, so it is no plain stack of attention layers"
    if getattr(text, "kv_lora_rank", None):
        return "multi-head latent attention (MLA) caches one latent per token, not keys and values per head"
    if not hasattr(model, "_supports_default_dynamic_cache"):
        return "its generate() is its own and does not use transformers' caches"
    if model._is_stateful or not model._supports_default_dynamic_cache():
        return "it keeps a recurrent state (Mamba, linear or hybrid attention), not only keys and values"
    other = sorted(set(getattr(text, "layer_types", None) or ()) - _ATTENTION_LAYERS)
    if other:
        supported = " and ".join(sorted(_ATTENTION_LAYERS))
        return f"it has layers of type {', '.join(other)}, and only {supported} are supported"
    if getattr(text, "attention_chunk_size", None) and not getattr(text, "layer_types", None):
        return "it attends in chunks, which the compressed cache does not know"
    if getattr(text, "alibi", False) or getattr(text, "position_embedding_type", None) == "alibi":
        return "it adds ALiBi position biases to the attention scores, which need every key in its place"
    if getattr(text, "is_causal", True) is False:
        return "its attention is not causal"
    own_name = unreachable_argument(model)
    if own_name is not None:
        return (
            f"its forward takes the cache as {own_name}, but generate() of transformers {installed_version()} hands it "
            f"over as {generate_argument()}, so that it would be lost and every new token made without a past, on the "
            "stock model too; rename that parameter of forward()"
        )
    # In a composite model only the part that writes text matters; a vision tower may have any attention.
    writers = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is text]
    if not all(part._can_set_attn_implementation() for part in writers or [model]):
        return "its attention does not go through transformers' AttentionInterface, so it cannot be replaced"
    return _reason_against_heads(text)


def _reason_against_heads(text: PreTrainedConfig) -> str | None:
    for layer in text.per_layer_config:
        for name in ("head_dim", "global_head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim"):
            dim = getattr(layer, name, None)
            if dim is None and name == "head_dim":
                heads = getattr(layer, "num_attention_heads", None)
                dim = layer.hidden_size // heads if heads and getattr(layer, "hidden_size", None) else None
            if dim is not None and (dim % 16 or not 0 < dim <= 256):
                return f"its {name} is {dim}; it must be a multiple of 16, at most 256"
        keys, values = getattr(layer, "head_dim", None), getattr(layer, "v_head_dim", None)
        if keys and values and keys != values:
            return f"its keys have {keys} dims and its values {values}; they must be equal"
    return None
