"""Caches as files: one safetensors file with the pages as they are, checked before anything in it is used."""

from kvcompress_hf.io.identity import (
    ModelIdentity,
    differing_weights,
    layer_devices,
    model_identity,
    weights_fingerprint,
)
from kvcompress_hf.io.reading import LoadedCache, UnreadPages, load_cache
from kvcompress_hf.io.writing import save_cache

__all__ = [
    "LoadedCache",
    "ModelIdentity",
    "UnreadPages",
    "differing_weights",
    "layer_devices",
    "load_cache",
    "model_identity",
    "save_cache",
    "weights_fingerprint",
]
