"""Families with the attention of Qwen 2 and 3: windows by layer, and norms on the heads in the latter."""

from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from kvcompress_hf.patches.swap import PagedForward

__all__ = ["PagedQwen2Attention", "PagedQwen3Attention", "PagedQwen3MoeAttention"]


class PagedQwen2Attention(PagedForward, Qwen2Attention):
    """`Qwen2Attention` over a [`CompressedPagedCache`]."""

    rotate = staticmethod(modeling_qwen2.apply_rotary_pos_emb)
    eager = staticmethod(modeling_qwen2.eager_attention_forward)

    def window(self) -> int | None:
        """Each layer has a window or none; see [`PagedForward.window`]."""
        return self.sliding_window


class PagedQwen3Attention(PagedForward, Qwen3Attention):
    """`Qwen3Attention` over a [`CompressedPagedCache`]."""

    rotate = staticmethod(modeling_qwen3.apply_rotary_pos_emb)
    eager = staticmethod(modeling_qwen3.eager_attention_forward)
    norms = ("q_norm", "k_norm")

    def window(self) -> int | None:
        """Each layer has a window or none; see [`PagedForward.window`]."""
        return self.sliding_window


class PagedQwen3MoeAttention(PagedForward, Qwen3MoeAttention):
    """`Qwen3MoeAttention` over a [`CompressedPagedCache`]."""

    rotate = staticmethod(modeling_qwen3_moe.apply_rotary_pos_emb)
    eager = staticmethod(modeling_qwen3_moe.eager_attention_forward)
    norms = ("q_norm", "k_norm")

    def window(self) -> int | None:
        """Each layer has a window or none; see [`PagedForward.window`]."""
        return self.sliding_window
