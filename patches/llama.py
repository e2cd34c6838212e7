"""Families with the attention of Llama."""

from transformers.models.granite import modeling_granite
from transformers.models.granite.modeling_granite import GraniteAttention
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention

from kvcompress_hf.patches.swap import PagedForward

__all__ = ["PagedGraniteAttention", "PagedLlamaAttention"]


class PagedLlamaAttention(PagedForward, LlamaAttention):  # type: ignore[misc]
    """`LlamaAttention` over a [`CompressedPagedCache`]."""

    rotate = staticmethod(modeling_llama.apply_rotary_pos_emb)
    eager = staticmethod(modeling_llama.eager_attention_forward)


class PagedGraniteAttention(PagedForward, GraniteAttention):  # type: ignore[misc]
    """`GraniteAttention` over a [`CompressedPagedCache`]."""

    rotate = staticmethod(modeling_granite.apply_rotary_pos_emb)
    eager = staticmethod(modeling_granite.eager_attention_forward)
