"""Perplexity of a text read through a compressed cache."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import as_argument
from kvcompress_hf.patches import patched
from kvcompress_hf.presets import resolve_recipe
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.reports import MemoryReport
from kvcompress_hf.validation import require_int

__all__ = ["PerplexityReport", "perplexity"]


@dataclass(frozen=True)
class PerplexityReport:
    """How well a text is predicted through a cache, and what the cache took.

    Args:
        nll (`float`): Negative log-likelihood in nats per scored token.
        tokens (`int`): Tokens scored, over all sequences.
        memory (`MemoryReport`): Bytes of the cache after the last chunk.
        peak_bytes (`int`): Most bytes the cache ever held.
    """

    nll: float
    tokens: int
    memory: MemoryReport
    peak_bytes: int

    @property
    def perplexity(self) -> float:
        """`float`: `exp(nll)`."""
        return math.exp(self.nll)

    def __str__(self) -> str:
        return f"perplexity {self.perplexity:.4f} over {self.tokens:,} tokens, cache {self.memory.ratio:.1%} of dense"


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    ids: Tensor,
    recipe: str | Mapping[str, Any] | Recipe | None = None,
    *,
    stride: int = 256,
    skip: int = 1,
    **overrides: Any,
) -> PerplexityReport:
    """Reads a text in chunks through a fresh cache and scores every token by what is left of those before it.

    Each chunk sees the compressed past and its own tokens in full; after each chunk the recipe packs and plans. So a
    budget bites from the second chunk on, and the smaller `stride`, the more of the predictions it bears on. Which
    tokens are scored depends on `skip` alone, never on the recipe or the stride. Logits are held for one chunk at most.

    A fraction budget is a fraction of the whole text from its first chunk on, since its length is known here.

    Args:
        model (`PreTrainedModel`): The model; patched for the length of the call.
        ids (`Tensor`): `int64` `[batch, tokens]`, without padding.
        recipe (`str`, `dict` or `Recipe`, *optional*): As for [`patch`]; the default preset when left out.
        stride (`int`): Tokens per chunk. With 1 the text is decoded token by token, and the recipe's `when` decides.
        skip (`int`): First tokens of each sequence that are not scored; at least 1, as nothing predicts the first.
        overrides: Parts of the recipe to change.

    Returns:
        `PerplexityReport`: Loss, tokens scored, and measured bytes.

    Raises:
        ValueError: If the ids have no valid shape, `stride` or `skip` no valid value, or the recipe is not allowed.
        UnsupportedModelError: If the model cannot be patched.

    Example:

    ```python
    >>> import kvcompress_hf as kvc
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    >>> model = LlamaForCausalLM(config).eval()
    >>> report = kvc.perplexity(model, torch.arange(60)[None], "k8v4", stride=16, skip=20)
    >>> report.tokens
    40

    ```
    """
    if ids.ndim != 2 or ids.shape[0] == 0:
        raise ValueError(f"ids has shape {tuple(ids.shape)}; it must be [batch, tokens].")
    batch, tokens = ids.shape
    require_int("", "stride", stride, 1)
    if not 1 <= require_int("", "skip", skip, 1) < tokens:
        raise ValueError(f"skip is {skip}; it must be at least 1 and below the number of tokens, {tokens}.")
    resolved = resolve_recipe(recipe, **overrides)
    total = torch.zeros((), dtype=torch.float64)
    with patched(model, resolved):
        cache = CompressedPagedCache(model.config, resolved, prompt_tokens=tokens)
        # The last token predicts nothing that could be scored, so it is not read.
        for start in range(0, tokens - 1, stride):
            end = min(start + stride, tokens - 1)
            positions = torch.arange(start, end, device=ids.device)
            kept = min(end - start, end + 1 - skip)  # positions whose next token is scored
            extra = {"logits_to_keep": max(kept, 1)} if model._supports_logits_to_keep() else {}  # type: ignore[operator]
            logits = model(
                input_ids=ids[:, start:end],
                position_ids=positions[None],
                use_cache=True,
                **as_argument(model, cache),
                **extra,
            ).logits
            if kept > 0:
                loss = F.cross_entropy(
                    logits[:, -kept:].flatten(0, 1).float(),
                    ids[:, end - kept + 1 : end + 1].flatten().to(logits.device),
                    reduction="none",
                )
                total += loss.double().sum().cpu()
    scored = batch * (tokens - skip)
    return PerplexityReport(float(total) / scored, scored, cache.memory(), cache.run_report.statistics.peak_bytes)
