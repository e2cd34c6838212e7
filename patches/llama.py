"""Llama-shaped families: the attention module itself is replaced by one that talks to the cache."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.patches.swap import paged_attention

__all__ = ["PagedLlamaAttention"]


class PagedLlamaAttention(LlamaAttention):
    """`LlamaAttention` that talks to a [`CompressedPagedCache`] directly; other caches go the stock way.

    Made by [`patch`] over the state of a stock module, never from a config.
    """

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `LlamaAttention.forward`.

        Args:
            hidden_states (`Tensor`): `[batch, tokens, hidden]`.
            position_embeddings (`tuple[Tensor, Tensor]`): cos and sin, `[batch, tokens, head_dim]`.
            attention_mask (`Tensor`, *optional*): Mask as made by transformers.
            past_key_values (`Cache`, *optional*): The cache.
            kwargs: Passed on to the stock attention.

        Returns:
            `tuple[Tensor, Tensor | None]`: `[batch, tokens, hidden]`, and the attention weights if the stock
                path
            returns them.
        """
        if not isinstance(past_key_values, CompressedPagedCache):
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return paged_attention(
            self,
            past_key_values,
            hidden_states,
            position_embeddings,
            attention_mask,
            apply_rotary_pos_emb,
            eager_attention_forward,
            None,
            kwargs,
        )
