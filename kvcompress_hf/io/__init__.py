"""Caches as files: one safetensors file with the pages as they are, checked before anything in it is used."""

from kvcompress_hf.io.file import LoadedCache, UnreadPages, load_cache, save_cache
from kvcompress_hf.io.identity import ModelIdentity, layer_devices, model_identity

__all__ = [
    "LoadedCache",
    "ModelIdentity",
    "UnreadPages",
    "layer_devices",
    "load_cache",
    "model_identity",
    "save_cache",
]
