"""Facts hidden in a long text, and the questions that ask for them."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

PASSKEY_INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
NUMBER_INTRO = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n"
)


@dataclass(frozen=True)
class Question:
    """One long prompt that ends in a question.

    Args:
        kind: `"passkey"` or `"magic number"`.
        prompt: instruction, text with the fact hidden in it, question.
        answer: the digits that must follow, without spaces.
        depth: where the fact stands: 0 = at the beginning of the text, 1 = at its end.
    """

    kind: str
    prompt: str
    answer: str
    depth: float

    def is_right(self, continuation: str) -> bool:
        """Whether a decoded continuation begins with the answer and the number ends there."""
        return re.match(rf"\s*{self.answer}(?!\d)", continuation) is not None


def sentences(text: str) -> list[str]:
    """The sentences of a text on single lines; very short and very long ones are left out."""
    text = re.sub(r"\s+", " ", text.replace("\ufeff", ""))
    for fancy, plain in (("’", "'"), ("‘", "'"), ("“", '"'), ("”", '"'), ("—", "--")):
        text = text.replace(fancy, plain)
    return [s for s in re.split(r"(?<=[.!?])\s+", text) if 20 < len(s) < 400]


def make_questions(tokenizer: Any, text: str, *, count: int, prompt_tokens: int, seed: int = 0) -> list[Question]:
    """Hide one fact in each of several passages of a text and ask for it.

    Args:
        tokenizer: a transformers tokenizer; it only counts tokens here.
        text: a long text, many times `prompt_tokens`; each question takes its own passage of it.
        count: how many questions; passkeys and magic numbers in turn, at depths spread over the passage.
        prompt_tokens: length of a prompt; it is met to within a sentence and never exceeded.
        seed: fixes passages, keys and numbers.

    Returns:
        One question per passage, `count` in all.

    Raises:
        ValueError: where the text is too short for one prompt.
    """
    rng = random.Random(seed)
    lines = sentences(text)
    lengths = [len(ids) for ids in tokenizer([" " + line for line in lines], add_special_tokens=False).input_ids]
    words = sorted(w for w, n in Counter(re.findall(r"\b[a-z]{4,9}\b", text)).items() if n > 3)
    if not words or sum(lengths) < prompt_tokens:
        raise ValueError(f"the text has {sum(lengths)} tokens; a prompt of {prompt_tokens} needs more")

    def digits(n: int) -> str:
        return "".join(rng.choice("0123456789") for _ in range(n))

    questions = []
    for i in range(count):
        if i % 2 == 0:
            kind, intro, answer = "passkey", PASSKEY_INTRO, digits(5)
            fact = f"The pass key is {answer}. Remember it. {answer} is the pass key."
            ask = "\nWhat is the pass key? The pass key is"
        else:
            kind, intro, answer = "magic number", NUMBER_INTRO, digits(7)
            key = f"{rng.choice(words)}-{rng.choice(words)}"
            what = f"special magic number for {key} mentioned in the provided text"
            fact = f"One of the special magic numbers for {key} is: {answer}."
            ask = f"\nWhat is the {what}? The {what} is"
        room = prompt_tokens - len(tokenizer(intro + " " + fact + ask).input_ids) - 2
        start = rng.randrange(len(lines))
        passage: list[str] = []
        while True:
            at = (start + len(passage)) % len(lines)
            room -= lengths[at]
            if room < 0 or len(passage) == len(lines):
                break
            passage.append(lines[at])
        depth = (i // 2 + 0.5) / ((count + 1) // 2)
        passage.insert(round(depth * len(passage)), fact)
        questions.append(Question(kind, intro + " ".join(passage) + ask, answer, depth))
    rng.shuffle(questions)
    return questions
