"""Filling a cache with a prompt once, to be used many times."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import as_argument
from kvcompress_hf.patches.core import patched
from kvcompress_hf.patches.generation import record_of
from kvcompress_hf.patches.prompt_chunks import chunk_for
from kvcompress_hf.patches.second_reading import read_again
from kvcompress_hf.patches.support import unwrap
from kvcompress_hf.presets import resolve_rows
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.validation import require_int

__all__ = ["prefill"]


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    recipe: str | Mapping[str, Any] | Recipe | Sequence[Any] | None = None,
    *,
    attention_mask: Tensor | None = None,
    chunk_size: int | None = None,
    **overrides: Any,
) -> CompressedPagedCache:
    """Runs a prompt through a model and returns the filled cache, for `generate(..., kvcompress=cache)`.

    `generate` needs at least one token beyond the cached ones: pass it the prompt with the question appended,
    or only the new tokens together with the attention mask of all of them.

    Args:
        model (`PreTrainedModel`): The model; patched for the length of the call if it is not.
        input_ids (`Tensor`): `[batch, tokens]`, left-padded if the rows differ in length.
        recipe (`str`, `Recipe`, `dict` or a list of these, *optional*): As for [`patch`], or one per row of the
            batch; left out, the recipe the model is patched with.
        attention_mask (`Tensor`, *optional*): `[batch, tokens]`, 0 for padding.
        chunk_size (`int`, *optional*): Tokens per forward pass. Left out, a prompt of more than 8,192 tokens goes
            4,096 at a time where the recipe evicts, so that the cache never holds all of it, and others all at once.
        overrides: Parts of the recipe to change.

    Returns:
        `CompressedPagedCache`: The cache, holding the whole prompt.

    Raises:
        TypeError: If the ids or the mask are no tensors of token ids.
        ValueError: If the ids, the mask or `chunk_size` have no valid shape or value, or the recipe is not
            allowed.
        UnsupportedModelError: If the model cannot be patched.
    """
    for name, given in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if not isinstance(given, Tensor) and not (given is None and name == "attention_mask"):
            raise TypeError(
                f"{name} is a {type(given).__name__}; prefill() takes a tensor [batch, tokens]: with "
                'inputs = tokenizer(text, return_tensors="pt"), prefill(model, **inputs) or prefill(model, '
                "inputs.input_ids)."
            )
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids holds {input_ids.dtype}; token ids are integers, torch.int64.")
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; it must be [batch, tokens] with at least one token."
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it must be that of input_ids, "
            f"{tuple(input_ids.shape)}."
        )
    if chunk_size is not None:
        require_int("", "chunk_size", chunk_size, 1)
    record = record_of(model)
    rows = resolve_rows(recipe, None if record is None or recipe is not None else record.recipe)
    recipes = [row.with_overrides(**overrides) for row in rows]
    tokens = input_ids.shape[1]
    step = chunk_size or chunk_for(recipes, tokens) or tokens
    if attention_mask is None:
        positions = torch.arange(tokens, device=input_ids.device)[None]
    else:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    model = unwrap(model)
    with patched(model, recipes[0]):
        cache = CompressedPagedCache(model.config, recipes, prompt_tokens=tokens)
        cache.belongs_to(model)
        # Only the cache is wanted, not the logits of a whole prompt.
        extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        for start in range(0, tokens, step):
            end = min(start + step, tokens)
            model(
                input_ids=input_ids[:, start:end],
                attention_mask=None if attention_mask is None else attention_mask[:, :end],
                position_ids=positions[:, start:end],
                use_cache=True,
                **as_argument(model, cache),
                **extra,
            )
        if cache.awaits_second_reading:
            read_again(model, cache, input_ids, attention_mask)
    return cache
