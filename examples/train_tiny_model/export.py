"""Write the trained model as a bf16 checkpoint folder, with the tokenizer and the haystack text beside it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import HELD_OUT, clean
from transformers import AutoTokenizer, LlamaForCausalLM

HAYSTACK_CHARS = 250_000


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--trained", type=Path, required=True, help="folder written by train.py (final)")
    ap.add_argument("--data", type=Path, required=True, help="folder with the novels (*.txt)")
    ap.add_argument("--out", type=Path, required=True)
    args = ap.parse_args()
    model = LlamaForCausalLM.from_pretrained(args.trained, dtype=torch.bfloat16)
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.trained).save_pretrained(args.out)
    text = clean((args.data / HELD_OUT[0]).read_text(encoding="utf-8", errors="replace"))
    text = text[: text.rindex("\n", 0, HAYSTACK_CHARS) + 1]
    (args.out / "haystack.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
