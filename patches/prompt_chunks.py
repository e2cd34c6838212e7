"""Long prompts are read in chunks, so that a cache that evicts never holds the whole of one."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from kvcompress_hf.recipe import Recipe

__all__ = ["CHUNK", "LONG", "chunk_for", "set_chunk"]

#: Tokens of a chunk where nobody says.
CHUNK = 4096
#: Longer prompts are read in chunks.
LONG = 8192

#: Tensors of a call that stock `generate` splits with the tokens.
_SPLIT = {"attention_mask", "position_ids"}


def chunk_for(recipes: Sequence[Recipe], tokens: int | None) -> int | None:
    """In how many tokens at a time a prompt is read if nobody says.

    Args:
        recipes (`Sequence[Recipe]`): Recipes of the rows.
        tokens (`int`, *optional*): Length of the prompt, if known.

    Returns:
        `int` or `None`: Tokens of a chunk; `None` for all at once: short prompts, and recipes that evict nothing before
        the whole prompt has been read.
    """
    if tokens is None or tokens <= LONG:
        return None
    return CHUNK if any(_evicts_early(recipe) for recipe in recipes) else None


def _evicts_early(recipe: Recipe) -> bool:
    again = recipe.observer is not None and recipe.observer.reads_again is not None
    return recipe.evicts and recipe.when.prefill and not again


def set_chunk(
    generation_config: GenerationConfig,
    model_kwargs: Mapping[str, Any],
    assisted: bool,
    recipes: Sequence[Recipe],
    tokens: int | None,
) -> None:
    """Lets one call of `generate` read a long prompt in chunks, unless it says itself in how many tokens.

    Calls with anything that stock `generate` does not split with the tokens (images, embeddings) and assisted ones are
    left alone.

    Args:
        generation_config (`GenerationConfig`): The config of this call alone.
        model_kwargs (`Mapping[str, Any]`): The call's other arguments.
        assisted (`bool`): Whether drafts are verified.
        recipes (`Sequence[Recipe]`): Recipes of the rows.
        tokens (`int`, *optional*): Length of the prompt, if known.
    """
    unsplit = {name for name, value in model_kwargs.items() if isinstance(value, Tensor)} - _SPLIT
    if generation_config.prefill_chunk_size is None and not assisted and not unsplit:
        generation_config.prefill_chunk_size = chunk_for(recipes, tokens)
