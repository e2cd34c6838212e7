"""The folder that prepare.py writes, read again."""

from __future__ import annotations

import json
import lzma
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

#: Special tokens and their ids.
SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2}


class Corpus:
    """Tokens, tokenizer and words of a folder.

    Args:
        folder: written by prepare.py.
    """

    STREAMS = ("train-prose", "train-code", "heldout-prose", "heldout-code")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.words: dict[str, list[str]] = json.loads((folder / "words.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
        files = [folder / f"tokens-{i:02}.xz" for i in range(self.manifest["shards"])]
        with ThreadPoolExecutor() as pool:  # lzma lets other threads run
            shards = list(pool.map(lambda file: lzma.decompress(file.read_bytes()), files))
        tokens = np.frombuffer(b"".join(shards), dtype="<u2")
        self.streams = {name: tokens[a:b] for name, (a, b) in self.manifest["streams"].items()}

    @property
    def vocab(self) -> int:
        return self.manifest["vocab"]
