"""The old place of paged classes that are now in `kvcompress_hf.patches.families`, for one release."""

from kvcompress_hf.moved import forward
from kvcompress_hf.patches.families import PagedQwen2Attention, PagedQwen3Attention, PagedQwen3MoeAttention

__all__ = ["PagedQwen2Attention", "PagedQwen3Attention", "PagedQwen3MoeAttention"]
forward(__name__, "kvcompress_hf.patches.families")
