"""The old place of paged classes that are now in `kvcompress_hf.patches.families`, for one release."""

from kvcompress_hf.moved import forward
from kvcompress_hf.patches.families import PagedGraniteAttention, PagedLlamaAttention

__all__ = ["PagedGraniteAttention", "PagedLlamaAttention"]
forward(__name__, "kvcompress_hf.patches.families")
