"""Reading a prompt a second time, for recipes that judge slots by reconstruction."""

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import as_argument
from kvcompress_hf.errors import UnsupportedFeatureError

__all__ = ["read_again"]

_LEAD = 8  # tokens before a chunk that lead it in: the model then knows what it is to write again


@torch.no_grad()
def read_again(
    model: PreTrainedModel, cache: CompressedPagedCache, input_ids: Tensor, attention_mask: Tensor | None = None
) -> None:
    """Lets a patched model read the newest tokens of a cache again, after which the cache is compressed.

    Args:
        model (`PreTrainedModel`): The patched model.
        cache (`CompressedPagedCache`): A cache that awaits its second reading.
        input_ids (`Tensor`): `[batch, tokens]`, the tokens that came last.
        attention_mask (`Tensor`, *optional*): `[batch, tokens of the cache]`, 0 for padding.

    Raises:
        UnsupportedFeatureError: If there are no token ids, as with `inputs_embeds`.
    """
    recipe = cache.recipe
    step = None if recipe.observer is None else recipe.observer.reads_again
    if step is None:
        return
    tokens = input_ids.shape[1]
    if not tokens:
        raise UnsupportedFeatureError(
            f"The recipe {recipe.name!r} reads the prompt a second time and needs its token ids, but there are none: "
            "pass input_ids instead of inputs_embeds, or take a recipe with another observer, such as 'auto'."
        )
    seen = cache.get_seq_length()
    # Only what attention looks at is wanted, not the logits.
    extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    real = None if attention_mask is None else attention_mask[:, :seen]
    known = seen if real is None else real.sum(-1, keepdim=True)
    with cache.second_reading():
        for start in range(0, tokens, step):
            part = slice(max(0, start - _LEAD), min(start + step, tokens))
            ids = input_ids[:, part]
            mask = None
            if real is None:
                positions = torch.arange(seen, seen + ids.shape[1], device=ids.device)[None]
            else:
                again = real[:, seen - tokens :][:, part]
                mask = torch.cat([real, again], dim=1)
                positions = known + (again.long().cumsum(-1) - 1).clamp(min=0)
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **as_argument(model, cache),
                **extra,
            )
