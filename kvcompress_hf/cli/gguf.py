"""A model in llama.cpp's GGUF file made into an ordinary transformers folder, and a digest of what came out."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import sys
from pathlib import Path

from kvcompress_hf.errors import ModelNotFetchedError

__all__ = ["convert", "need_gguf", "weights_digest"]


def need_gguf() -> None:
    """Checks that GGUF files can be read, before anything is downloaded.

    Raises:
        ModelNotFetchedError: where the package `gguf` is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelNotFetchedError(
            "real models come as GGUF files, and the package `gguf` that reads them is not installed: "
            "pip install gguf, or this package with its extra [models]"
        )


def convert(source: Path, folder: Path) -> None:
    """Write a GGUF file's weights, unpacked to bfloat16, with config and tokenizer as an ordinary model's folder.

    Args:
        source: the GGUF file.
        folder: where `from_pretrained` will find the model; made if it is not there.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from kvcompress_hf.compat import logging

    where, file = str(source.parent), source.name
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    # The bar that the reading of GGUF files draws in any case is only good on a terminal.
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
        with quiet:
            model = AutoModelForCausalLM.from_pretrained(
                where,
                gguf_file=file,
                dtype=torch.bfloat16,
                # Otherwise the weights stay packed, and such a model cannot be saved.
                quantization_config=GgufConfig(dequantize=True, gguf_file=file),
            )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()


def weights_digest(folder: Path) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a folder's weights.

    The file's own digest would also change with the metadata that libraries write into it.

    Args:
        folder: a model's folder with safetensors files.
    """
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    holders = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            holders.update(dict.fromkeys(file.keys(), path))
    for name in sorted(holders):
        with safe_open(holders[name], "pt") as file:
            tensor = file.get_tensor(name).contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
