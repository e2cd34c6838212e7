"""The rotary embedding of a model, as far as stored keys can be turned on to other positions."""

import torch

from kvcompress_hf.compat import ROPE_INIT_FUNCTIONS, PreTrainedConfig
from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.recipe import Recipe

__all__ = ["key_frequencies"]

# Families whose keys are turned in pairs of channels half of the rotary part apart, in every layer, and by nothing but
# this; each of them is tested against the stock model with positions re-indexed.
_FAMILIES = frozenset({"arcee", "gemma", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo", "olmo2", "phi"})
_FAMILIES |= {"phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "stablelm", "starcoder2"}
# Those of them with a partial_rotary_factor.
_PARTIAL = frozenset({"gpt_neox", "phi", "phi3", "stablelm"})
_TYPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies are the same at every length


def key_frequencies(config: PreTrainedConfig, recipe: Recipe, windows: list[int | None]) -> torch.Tensor | None:
    """What a cache must know of a model's rotary embedding.

    Args:
        config (`PreTrainedConfig`): The model's config; of a composite model the text decoder's part counts.
        recipe (`Recipe`): How to compress.
        windows (`list[int | None]`): Sliding window of each layer, `None` for full attention.

    Returns:
        `torch.Tensor` or `None`: Radians per position of each pair of channels, float32 `[pairs]`; `None` unless the
        recipe re-indexes positions.

    Raises:
        UnsupportedFeatureError: If the recipe re-indexes positions and this model does not allow it.
    """
    if recipe.positions != "reindexed":
        return None
    found = _frequencies(config)
    if isinstance(found, str):
        raise _refusal(found)
    if any(window is not None for window in windows):
        raise _refusal("this model has layers with a sliding window, which is counted in absolute positions")
    return found


def _frequencies(config: PreTrainedConfig) -> torch.Tensor | str:
    """The frequencies of a model, or why there are none that are all that another position does to a key."""
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    family, kind = text.model_type, rope.get("rope_type")
    if family not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        return f"it has not been tested with {family} models, only with {known}"
    if kind not in _TYPES:
        return f"the rope_type of this model is {kind!r}; it must be one of {', '.join(_TYPES)}"
    if rope.get("mrope_section"):
        return "this model has a rotary embedding of several axes (mrope_section)"
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](text)[0].float()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    channels = int(head_dim * rope.get("partial_rotary_factor", 1.0)) if family in _PARTIAL else head_dim
    return 1.0 / rope["rope_theta"] ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)


def _refusal(reason: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(f"positions='reindexed' is not available: {reason}. Use positions='absolute'.")
