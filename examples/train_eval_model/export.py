"""Turn what train.py wrote into a model folder: safetensors shards, configuration, tokenizer, haystack, model card."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from card import write_card
from corpus import Corpus
from recipe import RECIPES
from train import make_model
from transformers import AutoTokenizer, GenerationConfig
from weights import read_weights

SHARD = "14MB"


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--weights", type=Path, required=True, help="folder with weights.json (train.py's --out)")
    ap.add_argument("--data", type=Path, required=True, help="folder written by prepare.py")
    ap.add_argument("--figures", type=Path, help="figures.json, where prove.py ran on another machine")
    ap.add_argument("--out", type=Path, required=True, help="the model folder")
    args = ap.parse_args(argv)

    tensors, facts = read_weights(args.weights)
    corpus = Corpus(args.data)
    model = make_model(RECIPES[facts["recipe"]], corpus.vocab)
    model.load_state_dict(tensors, strict=False)  # the output matrix is the embedding
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(args.out, max_shard_size=SHARD)
    AutoTokenizer.from_pretrained(args.data / "tokenizer").save_pretrained(args.out)
    shutil.copy(args.data / "haystack.txt", args.out / "haystack.txt")
    training = args.out / "training"
    training.mkdir(exist_ok=True)
    shutil.copy(args.data / "manifest.json", training / "manifest.json")
    shutil.copy(args.weights / "train_log.jsonl", training / "train_log.jsonl")
    (training / "run.json").write_text(json.dumps(facts, indent=1) + "\n")
    if args.figures:
        shutil.copy(args.figures, args.out / "figures.json")
    write_card(args.out)
    size = sum(file.stat().st_size for file in args.out.glob("*.safetensors"))
    print(f"{args.out}: {model.num_parameters() / 1e6:.1f} M parameters, {size / 2**20:.1f} MiB of weights")


if __name__ == "__main__":
    main()
