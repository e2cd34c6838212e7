"""What the scripts share: the split of the novels, text cleaning, key words, generated retrieval facts."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Never seen in training; evaluate.py measures on these. The first one is also shipped as haystack.txt.
HELD_OUT = (
    "Doyle_Hound_1902.txt",
    "Chesterton_Napoleon_1904.txt",
    "Conrad_Almayer_1895.txt",
    "Kipling_Captains_1896.txt",
    "Trollope_Warden_1855.txt",
)
# E. M. Forster died in 1970: not yet in the public domain where the term is life plus 70 years, so left out.
EXCLUDED = ("Forster_Angels_1905.txt",)

CITIES = """
Paris London Rome Berlin Madrid Vienna Lisbon Dublin Cairo Delhi Tokyo Lima Oslo Athens Boston Chicago Moscow
Sydney Toronto Naples Geneva Florence Bombay Calcutta York Bath Oxford Bristol Leeds Glasgow
""".split()  # noqa: SIM905
NAMES = """
Tom Mary John Alice Jane Henry Emma Lucy George Arthur Edward Charles Fanny Kate Peter Philip Ralph Rosa Sarah
Walter Clara Harry Hugh Julia Laura
""".split()  # noqa: SIM905
INSTRUCTIONS = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n",
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n",
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n",
    "",
)


def clean(text: str) -> str:
    """Plain quotes and dashes, single spaces, and hard-wrapped lines joined into paragraphs."""
    text = text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")
    for old, new in (("\u2018", "'"), ("\u2019", "'"), ("\u201c", '"'), ("\u201d", '"'), ("\u2014", "--")):
        text = text.replace(old, new)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    lengths = [len(line) for line in text.split("\n") if line]
    if lengths and np.median(lengths) < 80:
        if text.count("\n\n") > 20:
            paragraphs = (p.replace("\n", " ").strip() for p in text.split("\n\n"))
            text = "\n".join(p for p in paragraphs if p)
        else:
            text = text.replace("\n", " ")
    return text


def read_novels(data: Path) -> dict[str, str]:
    """File name -> cleaned text, for every novel but the excluded ones."""
    files = sorted(p for p in data.glob("*.txt") if p.name not in EXCLUDED)
    if not files:
        raise SystemExit(f"no .txt files in {data}")
    return {p.name: clean(p.read_text(encoding="utf-8", errors="replace")) for p in files}


def key_words(train_texts: list[str]) -> tuple[list[str], list[str]]:
    """Words for keys from the training novels' vocabulary: (for training, kept for evaluation), disjoint."""
    counts: Counter[str] = Counter()
    for text in train_texts:
        counts.update(re.findall(r"\b[a-z]{4,9}\b", text))
    words = sorted(w for w, _ in counts.most_common(3000)[200:2800])
    random.Random(11).shuffle(words)
    return sorted(words[400:]), sorted(words[:400])


@dataclass
class Fact:
    """One hidden fact; ``needle`` holds (text, loss weight) pieces that concatenate to natural text."""

    kind: str
    key: str
    needle: list[tuple[str, float]]
    question: str  # asked after a newline, no trailing space
    answer: str  # with its leading space

    @property
    def sentence(self) -> str:
        return "".join(text for text, _ in self.needle)


def digits(rng: random.Random, n: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(n))


def make_key(rng: random.Random, words: list[str]) -> str:
    first = rng.choice(words)
    return f"{first}-{rng.choice(words)}" if rng.random() < 0.6 else first


def passkey(rng: random.Random, n_digits: int = 5) -> Fact:
    v = digits(rng, n_digits)
    needle = [
        (" The pass key is", 0.5),
        (f" {v}", 0.0),
        (". Remember it.", 0.5),
        (f" {v}", 1.0),
        (" is the pass key.", 0.5),
    ]
    return Fact("passkey", "passkey", needle, "What is the pass key? The pass key is", f" {v}")


def magic_number(rng: random.Random, key: str, n_digits: int = 7, short: bool = False) -> Fact:
    v = digits(rng, n_digits)
    tail = "" if short else " mentioned in the provided text"
    what = f"special magic number for {key}{tail}"
    needle = [
        (" One of the special magic numbers for", 0.5),
        (f" {key}", 0.0),
        (" is:", 0.5),
        (f" {v}", 0.0),
        (".", 0.5),
    ]
    return Fact("magic", key, needle, f"What is the {what}? The {what} is", f" {v}")


def random_fact(rng: random.Random, words: list[str]) -> Fact:
    """A fact of a random kind, as the training mix draws them."""
    r = rng.random()
    if r < 0.28:
        return passkey(rng, rng.choice([4, 5, 5, 5, 6, 7]))
    if r < 0.72:
        return magic_number(rng, make_key(rng, words), rng.choice([5, 7, 7]), short=rng.random() < 0.4)
    if r < 0.84:
        k, v = rng.choice(CITIES), rng.choice(words)
        needle = [(f" The secret word of {k} is", 0.3), (f" {v}", 0.0), (".", 0.5)]
        return Fact("word", k, needle, f"What is the secret word of {k}? The secret word of {k} is", f" {v}")
    if r < 0.91:
        k, v = rng.choice(NAMES), rng.choice(CITIES)
        needle = [(f" {k} is now living in", 0.3), (f" {v}", 0.0), (".", 0.5)]
        return Fact("place", k, needle, f"Where is {k} living? {k} is now living in", f" {v}")
    k, v = make_key(rng, words), digits(rng, 5)
    needle = [(" The code of the", 0.3), (f" {k}", 0.0), (" is", 0.3), (f" {v}", 0.0), (".", 0.5)]
    return Fact("code", k, needle, f"What is the code of the {k}? The code of the {k} is", f" {v}")
