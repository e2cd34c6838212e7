"""The old name of `kvcompress_hf.plans`, for one release."""

from kvcompress_hf.moved import forward

_MODULES = (
    "base",
    "budget",
    "decide",
    "distortion",
    "histogram",
    "kv_compress",
    "lowest",
    "pages",
    "pressure",
    "rate_distortion",
    "run",
    "thresholds",
)
forward(__name__, "kvcompress_hf.plans", _MODULES)
