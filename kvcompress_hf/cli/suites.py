"""The samples of `kvcompress eval`: contexts of one length, each with several questions, as token ids."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .facts import NUMBER_INTRO, PASSKEY_INTRO, sentences

#: Questions asked about each context.
QUESTIONS = 2
_NUMBERS_INTRO = NUMBER_INTRO.replace("A special magic number is", "Some special magic numbers are").replace(
    "about the number ", "about the numbers "
)
_COPIED = 48  # tokens of a passage that comes again
_CUE = 8  # of them given as the question
_COPY = 4  # of them scored after the cue
_PROSE = 64  # tokens of prose scored after a context


@dataclass(frozen=True)
class Question:
    """What follows a context.

    Args:
        ids: tokens that are given; at least one.
        answer: tokens that are scored.
    """

    ids: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Sample:
    """A context and what is asked about it.

    Args:
        task: one of `TASKS`.
        context: tokens that the cache compresses.
        questions: each is asked on its own.
    """

    task: str
    context: list[int]
    questions: list[Question]


class Material:
    """A text cut into sentences and tokens, from which contexts are put together.

    Args:
        tokenizer: a transformers tokenizer.
        text: a long text that the model was not trained on.
        length: tokens of a context; met to within a sentence or a line, never exceeded.
        rng: decides everything that is random.

    Raises:
        ValueError: where the text is too short for one context.
    """

    def __init__(self, tokenizer: Any, text: str, length: int, rng: random.Random) -> None:
        self.tokenizer, self.length, self.rng = tokenizer, length, rng
        lines = sentences(text)
        self.lines: list[list[int]] = (
            tokenizer([" " + line for line in lines], add_special_tokens=False).input_ids if lines else []
        )
        self.words = sorted(word for word, n in Counter(re.findall(r"\b[a-z]{4,9}\b", text)).items() if n > 3)
        tokens = sum(map(len, self.lines))
        if not self.words or tokens < 2 * length + _PROSE:
            raise ValueError(f"the text has {tokens} tokens; contexts of {length} need at least {2 * length + _PROSE}")
        self.start: list[int] = tokenizer("").input_ids  # the tokenizer's own first tokens, if it has any
        self.start = [token for token in self.start if token != tokenizer.eos_token_id]

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def digits(self, count: int) -> str:
        """A random number as text."""
        return "".join(self.rng.choice("0123456789") for _ in range(count))

    def key(self) -> str:
        """Two random words of the text."""
        return f"{self.rng.choice(self.words)}-{self.rng.choice(self.words)}"

    def prose(self, room: int) -> list[list[int]]:
        """Consecutive sentences of at most `room` tokens together, from a random place."""
        at, passage = self.rng.randrange(len(self.lines)), []
        while room >= len(self.lines[at % len(self.lines)]):
            passage.append(self.lines[at % len(self.lines)])
            room -= len(passage[-1])
            at += 1
        return passage

    def hide(self, intro: str, pieces: list[list[int]]) -> list[int]:
        """A context: an instruction, then prose with the pieces at random places between its sentences.

        Raises:
            ValueError: where the pieces alone are too long.
        """
        head = self.start + (self.encode(intro) if intro else [])
        room = self.length - len(head) - sum(map(len, pieces))
        if room < 0:
            raise ValueError(f"contexts of {self.length} tokens are too short: what they must hold takes {-room} more")
        passage = self.prose(room)
        for piece in pieces:
            passage.insert(self.rng.randint(0, len(passage)), piece)
        return head + [token for piece in passage for token in piece]

    def ask(self, question: str, answer: str) -> Question:
        """A question and its answer, split where the answer's first token that is not a space begins.

        The two are encoded together, as the text would be in one piece; whitespace before the answer is given.
        """
        given, whole = self.encode(question), self.encode(question + answer)
        cut = next((i for i, (a, b) in enumerate(zip(given, whole, strict=False)) if a != b), len(given))
        while cut < len(whole) - 1 and not self.tokenizer.decode(whole[cut : cut + 1]).strip():
            cut += 1
        return Question(whole[:cut], whole[cut:])


def _passkey(material: Material) -> tuple[list[int], Question]:
    value = material.digits(5)
    fact = f" The pass key is {value}. Remember it. {value} is the pass key."
    return material.encode(fact), material.ask("\nWhat is the pass key? The pass key is", f" {value}")


def _number(material: Material) -> tuple[list[int], Question]:
    key, value = material.key(), material.digits(7)
    what = f"special magic number for {key} mentioned in the provided text"
    fact = f" One of the special magic numbers for {key} is: {value}."
    return material.encode(fact), material.ask(f"\nWhat is the {what}? The {what} is", f" {value}")


def _make_passkey(material: Material) -> Sample:
    """A pass key and a magic number, both asked."""
    facts = [_passkey(material), _number(material)]
    return Sample("passkey", material.hide(PASSKEY_INTRO, [f for f, _ in facts]), [q for _, q in facts])


def _make_needles(count: int) -> Callable[[Material], Sample]:
    def make(material: Material) -> Sample:
        facts = [_number(material) for _ in range(count)]
        context = material.hide(_NUMBERS_INTRO, [fact for fact, _ in facts])
        return Sample(f"needles-{count}", context, [q for _, q in material.rng.sample(facts, QUESTIONS)])

    return make


def _make_lines(material: Material) -> Sample:
    """Lines of keys with numbers, two of which are asked again."""
    context = list(material.start)
    lines: list[tuple[str, str]] = []
    while True:
        before, value = f"line {material.key()}: REGISTER_CONTENT is <", material.digits(5)
        line = material.encode(f"{before}{value}>\n")
        if lines and len(context) + len(line) > material.length:
            break
        context += line
        lines.append((before, value))
    asked = material.rng.sample(lines, min(QUESTIONS, len(lines)))
    return Sample("key-value", context, [material.ask(before, value) for before, value in asked])


def _make_copy(material: Material) -> Sample:
    """Passages that come again: their first tokens are the question, those that follow the answer."""
    pieces = []
    for _ in range(QUESTIONS):
        tokens = [token for line in material.prose(2 * _COPIED + 400) for token in line]
        at = material.rng.randrange(max(1, len(tokens) - _COPIED))
        pieces.append(tokens[at : at + _COPIED])
    context = material.hide("", pieces)
    newline = material.encode("\n")
    questions = [Question(newline + piece[:_CUE], piece[_CUE : _CUE + _COPY]) for piece in pieces]
    return Sample("copy", context, questions)


def _make_prose(material: Material) -> Sample:
    """Prose and how it goes on. The last token of the context is given with the question, to predict from."""
    passage = [token for line in material.prose(material.length + _PROSE + 400) for token in line]
    context = material.start + passage[: material.length - len(material.start)]
    rest = passage[material.length - len(material.start) :][:_PROSE]
    return Sample("prose", context[:-1], [Question(context[-1:], rest)])


#: Name of each task and how a sample of it is made.
TASKS: dict[str, Callable[[Material], Sample]] = {
    "passkey": _make_passkey,
    "needles-2": _make_needles(2),
    "needles-4": _make_needles(4),
    "key-value": _make_lines,
    "copy": _make_copy,
    "prose": _make_prose,
}


def make_samples(tokenizer: Any, text: str, *, count: int, length: int, seed: int = 0) -> list[Sample]:
    """Makes the samples of every task.

    Args:
        tokenizer: a transformers tokenizer.
        text: a long text that the model was not trained on.
        count: contexts per task.
        length: tokens of a context.
        seed: fixes passages, keys, numbers and places; a sample does not depend on how many others there are.

    Returns:
        The samples, the tasks in turn.

    Raises:
        ValueError: where the text is too short, or `count` or `length` too small.
    """
    if count < 1 or length < 192:
        raise ValueError(f"{count} contexts of {length} tokens; give at least 1 context of at least 192 tokens")
    material = Material(tokenizer, text, length, random.Random(seed))
    samples = []
    for i in range(count):
        for task, make in TASKS.items():
            material.rng = random.Random(f"{seed} {task} {i}")
            samples.append(make(material))
    return samples
