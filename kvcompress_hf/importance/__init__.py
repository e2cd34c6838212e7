"""The old name of `kvcompress_hf.observers`, for one release."""

from kvcompress_hf.moved import forward

_MODULES = (
    "attention_seen",
    "base",
    "expected",
    "non_causal",
    "per_query",
    "reconstruction",
    "running",
    "simple",
    "window",
)
forward(__name__, "kvcompress_hf.observers", _MODULES)
