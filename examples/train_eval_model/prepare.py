"""Collect text, train the tokenizer on it, and write everything that train.py needs into one small folder.

The folder holds xz-compressed 16-bit tokens, the tokenizer, the words of the generated tasks and manifest.json, which
names every source with its licence.
"""

from __future__ import annotations

import argparse
import json
import lzma
import platform
import random
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from corpus import SPECIAL, Corpus
from facts import HELD_OUT, key_words, read_novels, wording
from sources import Source, library_source, package_sources
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HAYSTACK_CHARS = 250_000
SHARD_TOKENS = 8_000_000
TOKENIZER_CHARS = 30_000_000


def novel_sources(folder: Path) -> list[Source]:
    """One source per novel. Those that examples/train_tiny_model keeps for evaluation are kept out here too."""
    texts = read_novels(folder)
    if not set(HELD_OUT) & set(texts):
        raise SystemExit(f"{folder} has none of the novels that are held out: {', '.join(HELD_OUT)}")
    return [Source(n.removesuffix(".txt"), "prose", "public domain", n in HELD_OUT, [t]) for n, t in texts.items()]


def train_tokenizer(sources: list[Source], vocab: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, every digit a token, on training text: as much prose as code."""
    tok = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tok.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(_tokenizer_texts(sources), trainer)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIAL["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=context
    )


def _tokenizer_texts(sources: list[Source]) -> Iterator[str]:
    rng = random.Random(0)
    for kind in ("prose", "code"):
        texts = [text for s in sources if s.kind == kind and not s.held_out for text in s.texts]
        rng.shuffle(texts)
        left = TOKENIZER_CHARS // 2
        for text in texts:
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break
    yield from [wording()] * 200


def encode(tok: Tokenizer, texts: list[str]) -> np.ndarray:
    """uint16 tokens of the texts, each ended by `</s>`. Offsets are not needed, so long texts go in pieces of lines."""
    out: list[int] = []
    for text in texts:
        lines = iter(text.splitlines(keepends=True))
        while piece := "".join(islice(lines, 2000)):
            out += tok.encode(piece, add_special_tokens=False).ids
        out.append(SPECIAL["</s>"])
    return np.array(out, dtype="<u2")


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--novels", type=Path, required=True, help="folder with novels (*.txt)")
    ap.add_argument("--packages", type=Path, nargs="+", help="site-packages folders (default: this Python's)")
    ap.add_argument("--library", type=Path, help="a standard library (default: this Python's)")
    ap.add_argument("--vocab", type=int, default=8192)
    ap.add_argument("--context", type=int, default=4096, help="written into the tokenizer (default: %(default)s)")
    ap.add_argument("--package-mb", type=float, default=28, help="millions of characters of one package, at most")
    ap.add_argument("--max-mib", type=float, default=46, help="refuse to write more than this (default: %(default)s)")
    ap.add_argument("--out", type=Path, required=True)
    args = ap.parse_args(argv)

    packages = args.packages or [Path(sysconfig.get_path("purelib"))]
    library = args.library or Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    sources = novel_sources(args.novels)
    sources.append(library_source(library, platform.python_version(), seen))
    sources += package_sources(packages, seen)
    sources = [cut(source, int(args.package_mb * 1e6)) for source in sources]
    print(f"{len(sources)} sources, {sum(len(t) for s in sources for t in s.texts) / 1e6:.1f} M characters", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(sources, args.vocab, args.context)
    tokenizer.save_pretrained(args.out / "tokenizer")
    print(f"tokenizer of {len(tokenizer)} entries", flush=True)

    entries, parts, streams, at = [], [], {}, 0
    for stream in Corpus.STREAMS:
        begin = at
        for source in sources:
            if stream != f"{'heldout' if source.held_out else 'train'}-{source.kind}":
                continue
            tokens = encode(tokenizer.backend_tokenizer, source.texts)
            entry = {"name": source.name, "stream": stream, "licence": source.licence, "files": len(source.texts)}
            entries.append({**entry, "characters": sum(map(len, source.texts)), "tokens": len(tokens)})
            parts.append(tokens)
            at += len(tokens)
        streams[stream] = [begin, at]
    tokens = np.concatenate(parts)
    shards = [tokens[i : i + SHARD_TOKENS].tobytes() for i in range(0, len(tokens), SHARD_TOKENS)]
    with ThreadPoolExecutor() as pool:  # lzma lets other threads run
        packed = list(pool.map(lzma.compress, shards))
    if sum(map(len, packed)) > args.max_mib * 2**20:
        size = sum(map(len, packed)) / 2**20
        raise SystemExit(f"{size:.1f} MiB of tokens, more than {args.max_mib} MiB: give a smaller --package-mb")
    for i, data in enumerate(packed):
        (args.out / f"tokens-{i:02}.xz").write_bytes(data)

    train_novels = [s.texts[0] for s in sources if s.kind == "prose" and not s.held_out]
    train_words, eval_words = key_words(train_novels)
    manifest = {"vocab": len(tokenizer), "streams": streams, "shards": len(shards), "sources": entries}
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    (args.out / "words.json").write_text(json.dumps({"train": train_words, "heldout": eval_words}))
    haystack = next(s.texts[0] for s in sources if s.kind == "prose" and s.held_out)
    (args.out / "haystack.txt").write_text(haystack[:HAYSTACK_CHARS].rpartition("\n")[0] + "\n", encoding="utf-8")
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print("tokens: " + ", ".join(f"{name} {(b - a) / 1e6:.2f} M" for name, (a, b) in streams.items()))
    print(f"{args.out}: {size / 2**20:.1f} MiB")


def cut(source: Source, characters: int) -> Source:
    """The source with whole files left out at random until it has at most so many characters."""
    texts = list(enumerate(source.texts))
    random.Random(source.name).shuffle(texts)
    kept, left = [], characters
    for i, text in texts:
        if len(text) <= left:
            kept.append((i, text))
            left -= len(text)
    return Source(source.name, source.kind, source.licence, source.held_out, [text for _, text in sorted(kept)])


if __name__ == "__main__":
    main()
