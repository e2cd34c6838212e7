"""Families with the attention of Mistral: as Llama, with one sliding window for all layers."""

from transformers.models.mistral import modeling_mistral
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.mixtral import modeling_mixtral
from transformers.models.mixtral.modeling_mixtral import MixtralAttention

from kvcompress_hf.patches.swap import PagedForward

__all__ = ["PagedMistralAttention", "PagedMixtralAttention"]


class PagedMistralAttention(PagedForward, MistralAttention):
    """`MistralAttention` over a [`CompressedPagedCache`]."""

    rotate = staticmethod(modeling_mistral.apply_rotary_pos_emb)
    eager = staticmethod(modeling_mistral.eager_attention_forward)

    def window(self) -> int | None:
        """One window for all layers; see [`PagedForward.window`]."""
        return getattr(self.config, "sliding_window", None)


class PagedMixtralAttention(PagedForward, MixtralAttention):
    """`MixtralAttention` over a [`CompressedPagedCache`]."""

    rotate = staticmethod(modeling_mixtral.apply_rotary_pos_emb)
    eager = staticmethod(modeling_mixtral.eager_attention_forward)

    def window(self) -> int | None:
        """One window for all layers; see [`PagedForward.window`]."""
        return getattr(self.config, "sliding_window", None)
