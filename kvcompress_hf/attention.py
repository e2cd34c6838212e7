"""The old name of `kvcompress_hf.runtime.attention`, for one release."""

from kvcompress_hf.moved import forward
from kvcompress_hf.runtime.attention import AttentionState, PagedAttention, RunStatistics, layout_for

__all__ = ["AttentionState", "PagedAttention", "RunStatistics", "layout_for"]
forward(__name__, "kvcompress_hf.runtime.attention")
