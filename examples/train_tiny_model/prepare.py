"""Train the 4,096-token byte-level BPE on the training novels and tokenise all novels."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from common import HELD_OUT, INSTRUCTIONS, key_words, read_novels
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB = 4096
MAX_LENGTH = 3072


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE(byte_fallback=False))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=MAX_LENGTH,
    )


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--data", type=Path, required=True, help="folder with the novels (*.txt)")
    ap.add_argument("--work", type=Path, required=True, help="where the token arrays and the tokenizer go")
    args = ap.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    novels = read_novels(args.data)
    missing = [n for n in HELD_OUT if n not in novels]
    if missing:
        raise SystemExit(f"held-out novels not found: {missing}")
    train = {n: t for n, t in novels.items() if n not in HELD_OUT}
    words, words_eval = key_words(list(train.values()))
    # the generated tasks' wording, repeated, so that its words become tokens too
    wording = "".join(INSTRUCTIONS) + " The pass key is the special magic number mentioned in the provided text."
    tok = train_tokenizer([t[:200_000] for t in train.values()] + [wording] * 50)
    tok.save_pretrained(args.work / "tokenizer")

    def encode(text: str) -> np.ndarray:
        return np.array(tok(text, add_special_tokens=False).input_ids, dtype=np.uint16)

    arrays = {n: encode(t) for n, t in novels.items()}
    np.savez(args.work / "train.npz", **{n: arrays[n] for n in train})
    np.savez(args.work / "held.npz", **{n: arrays[n] for n in HELD_OUT})
    (args.work / "words.json").write_text(json.dumps({"train": words, "eval": words_eval}))
    n_train = sum(len(arrays[n]) for n in train)
    n_chars = sum(map(len, train.values()))
    print(f"{len(train)} training novels, {n_train} tokens, {n_chars / n_train:.3f} characters per token")
    print(f"{len(HELD_OUT)} held-out novels, {sum(len(arrays[n]) for n in HELD_OUT)} tokens")


if __name__ == "__main__":
    main()
