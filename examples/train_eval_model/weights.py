"""A model's bf16 weights in a few small files, without loss, for the way back from a machine without network.

bfloat16 numbers of one model share few exponents: the upper bytes (sign and seven bits of the exponent) go through
Huffman coding, which takes them to about a third; the lower bytes are as good as random and stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHARD_BYTES = 15 * 2**20


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> list[Path]:
    """Write `weights.json` and `weights-00.bin` and so on, each of at most 15 MiB.

    Args:
        folder: made if it does not exist; files of an earlier call are replaced.
        tensors: bfloat16, by name.
        facts: what else `weights.json` shall say; JSON.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flat = torch.cat([tensor.detach().cpu().reshape(-1).view(torch.int16) for tensor in tensors.values()])
    numbers = flat.numpy().astype("<u2")
    shards, at = [], 0
    size = int(SHARD_BYTES / 1.5)
    while at < len(numbers):
        data = _pack(numbers[at : at + size])
        if len(data) > SHARD_BYTES:  # a model that did not train yet, say
            size //= 2
            continue
        shards.append(data)
        at += size
    index = {
        **facts,
        "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "shards": len(shards),
        "sha256": hashlib.sha256(numbers.tobytes()).hexdigest(),
    }
    files = []
    for i, data in enumerate(shards):
        files.append(folder / f"weights-{i:02}.bin")
        files[-1].write_bytes(data)
    files.append(folder / "weights.json")
    files[-1].write_text(json.dumps(index, indent=1) + "\n")
    return files


def read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `write_weights` was given: bfloat16 tensors by name, and the facts.

    Raises:
        ValueError: where the files do not belong together or are damaged.
    """
    index = json.loads((folder / "weights.json").read_text())
    shards = [_unpack((folder / f"weights-{i:02}.bin").read_bytes()) for i in range(index.pop("shards"))]
    numbers = np.concatenate(shards)
    if hashlib.sha256(numbers.tobytes()).hexdigest() != index.pop("sha256"):
        raise ValueError(f"the weights in {folder} are damaged or from different checkpoints")
    flat = torch.from_numpy(numbers.view("<i2").astype(np.int16)).view(torch.bfloat16)
    tensors, at = {}, 0
    for name, shape in index.pop("tensors").items():
        size = int(np.prod(shape))
        tensors[name] = flat[at : at + size].reshape(shape)
        at += size
    return tensors, index


def _pack(numbers: np.ndarray) -> bytes:
    coder = zlib.compressobj(level=6, wbits=-15, strategy=zlib.Z_HUFFMAN_ONLY)
    upper = coder.compress((numbers >> 8).astype(np.uint8).tobytes()) + coder.flush()
    return len(numbers).to_bytes(8, "little") + (numbers & 255).astype(np.uint8).tobytes() + upper


def _unpack(data: bytes) -> np.ndarray:
    count = int.from_bytes(data[:8], "little")
    lower = np.frombuffer(data, np.uint8, count, 8)
    upper = np.frombuffer(zlib.decompress(data[8 + count :], wbits=-15), np.uint8)
    return (upper.astype("<u2") << 8) | lower
