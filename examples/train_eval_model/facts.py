"""Wording, key words and the split of the novels: those of examples/train_tiny_model, so that the models compare."""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "train_tiny_model"))

from common import (
    HELD_OUT,
    INSTRUCTIONS,
    Fact,
    digits,
    key_words,
    magic_number,
    make_key,
    random_fact,
    read_novels,
)

__all__ = [
    "HELD_OUT",
    "INSTRUCTIONS",
    "Fact",
    "digits",
    "key_words",
    "magic_number",
    "make_key",
    "random_fact",
    "read_novels",
    "wording",
]


def wording() -> str:
    """The sentences of the tasks once, for the tokenizer to learn their words from."""
    rng = random.Random(0)
    facts = [random_fact(rng, ["amber", "window"]) for _ in range(60)]
    return "".join(INSTRUCTIONS) + "\n".join(fact.sentence + "\n" + fact.question for fact in facts)
