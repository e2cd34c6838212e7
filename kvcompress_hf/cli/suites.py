"""What `kvcompress eval` puts to a model: contexts of one length, each with every probe, as token ids."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .chat import Form
from .facts import NUMBER_INTRO
from .texts import Text, pieces_of

__all__ = ["ASKED", "PROBES", "Amounts", "Exchange", "Sample", "Turn", "make_samples"]

#: Questions with one right answer.
ASKED = ("needle", "multi-key")
PROBES = (*ASKED, "copy", "prose", "summary", "generation", "conversation")
_KEYS = 4  # magic numbers hidden in a context
_ASKED_KEYS = 3  # of them asked
_INTRO = NUMBER_INTRO.replace("A special magic number is", "A pass key and some special magic numbers are").replace(
    "about the number ", "about them "
)
_SUMMARY = ("Summarise the text in a few sentences.", "In short,")
_STORY = ("Go on with the story from where the text ends.", "")
_CONVERSATION = (
    "Who are the people in this text?",
    "Where does it take place?",
    "What happens at the beginning?",
    "Describe one of the people in a sentence.",
    "What does that person want?",
    "Which words of the text show it?",
    "What is the mood of the text?",
    "What was my first question?",
    "How does the text end?",
    "Give the text a title.",
)


@dataclass(frozen=True)
class Amounts:
    """How many tokens are scored.

    Args:
        tokens: of prose that goes on, and at most of a long generation.
        summary: at most of a summary.
        turn: at most of an answer in a conversation.
        copies: passages of a context that are begun again.
        cue: tokens of such a passage that are given.
        copied: tokens of it that are scored after them.
    """

    tokens: int = 256
    summary: int = 96
    turn: int = 24
    copies: int = 3
    cue: int = 12
    copied: int = 32


@dataclass(frozen=True)
class Turn:
    """What is given, and what comes next.

    Args:
        given: tokens; at least one.
        answer: tokens that are scored, each predicted from the right ones before it; empty where the full cache is to
            write them.
    """

    given: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Exchange:
    """One use of a context.

    Args:
        probe: one of `PROBES`.
        turns: one after the other, on the same cache.
        write: most tokens that the full cache writes for an answer that is not known.
        grows: the cache compresses what it is given on the way; otherwise only the context is compressed.
    """

    probe: str
    turns: tuple[Turn, ...]
    write: int = 0
    grows: bool = False


@dataclass(frozen=True)
class Sample:
    """A context and how it is used.

    Args:
        text: where it is from.
        context: tokens that the cache compresses. The token after them begins what every exchange gives.
        exchanges: each begins from the context alone.
    """

    text: str
    context: list[int]
    exchanges: list[Exchange]


class Material:
    """A text cut into sentences and tokens, from which contexts are put together.

    Args:
        tokenizer: a transformers tokenizer.
        text: a long text that the model was not trained on.
        form: how documents and questions are put to the model.
        length: tokens of a context; met to within a sentence, never exceeded.
        amounts: how much is scored.

    Raises:
        ValueError: where the text is too short for one context.
    """

    def __init__(self, tokenizer: Any, text: Text, form: Form, length: int, amounts: Amounts) -> None:
        self.tokenizer, self.form, self.length, self.amounts, self.name = tokenizer, form, length, amounts, text.name
        self.pieces: list[list[int]] = [self.encode(piece) for piece in pieces_of(text.text)]
        self.words = sorted(word for word, n in Counter(re.findall(r"\b[a-z]{4,9}\b", text.text)).items() if n > 3)
        self.tokens, self.need = sum(map(len, self.pieces)), length + amounts.tokens
        if not self.words or self.tokens < self.need:
            raise ValueError(
                f"the text {text.name} has {self.tokens} tokens; a context of {length} and what comes after it need "
                f"{self.need}"
            )
        start = [] if form.chat else [token for token in tokenizer("").input_ids if token != tokenizer.eos_token_id]
        self.head = start + self.encode(form.before + _INTRO)
        self.newline = self.encode("\n\n")
        self.rng = random.Random()

    def encode(self, text: str) -> list[int]:
        """Token ids, without those that a tokenizer adds by itself."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def digits(self, count: int) -> str:
        """A random number as text."""
        return "".join(self.rng.choice("0123456789") for _ in range(count))

    def place(self, turn: int, seed: int) -> int:
        """The piece where a context begins: one after the other through the text, from a place that the seed gives."""
        room = self.tokens - self.need
        at = (turn * self.need + random.Random(f"{seed} {self.name}").randrange(room + 1)) % (room + 1)
        for index, piece in enumerate(self.pieces):
            if at < len(piece):
                return index
            at -= len(piece)
        raise AssertionError("a place beyond the text")

    def ask(self, question: str, begin: str, answer: str) -> Turn:
        """A question and its answer, split where the answer's first token that is not a space begins.

        The two are encoded together, as the text would be in one piece; whitespace before the answer is given.
        """
        before = self.form.ask(question, begin)
        given, whole = self.encode(before), self.encode(before + answer)
        cut = next((i for i, (a, b) in enumerate(zip(given, whole, strict=False)) if a != b), len(given))
        while cut < len(whole) - 1 and not self.tokenizer.decode(whole[cut : cut + 1]).strip():
            cut += 1
        return Turn(whole[:cut], whole[cut:])

    def pass_key(self) -> tuple[list[int], Turn]:
        """A sentence that tells a number, and the question for it."""
        value = self.digits(5)
        fact = self.encode(f" The pass key is {value}. Remember it. {value} is the pass key.")
        return fact, self.ask("What is the pass key?", "The pass key is", f" {value}")

    def magic_number(self) -> tuple[list[int], Turn]:
        """One of several sentences that differ in a key of two words."""
        key, value = f"{self.rng.choice(self.words)}-{self.rng.choice(self.words)}", self.digits(7)
        what = f"special magic number for {key} mentioned in the provided text"
        fact = self.encode(f" One of the special magic numbers for {key} is: {value}.")
        return fact, self.ask(f"What is the {what}?", f"The {what} is", f" {value}")

    def sample(self, turn: int, seed: int) -> Sample:
        """A context of consecutive prose with facts at random places between its sentences, and every exchange.

        Raises:
            ValueError: where the facts alone are too long.
        """
        self.rng = random.Random(f"{seed} {self.name} {turn}")
        key, numbers = self.pass_key(), [self.magic_number() for _ in range(_KEYS)]
        facts = [key[0], *(fact for fact, _ in numbers)]
        at, prose = self.place(turn, seed), list[list[int]]()
        room = self.length - len(self.head) - sum(map(len, facts))
        # Of the passages that are copied, each is in a stretch of its own.
        least = self.amounts.copies * (self.amounts.cue + self.amounts.copied)
        if room < least:
            raise ValueError(
                f"contexts of {self.length} tokens are too short: give at least {self.length - room + least}"
            )
        while at < len(self.pieces) and len(self.pieces[at]) <= room:
            prose.append(self.pieces[at])
            room -= len(prose[-1])
            at += 1
        rest = [token for piece in self.pieces[at:] for token in piece][: self.amounts.tokens]
        for fact in facts:
            prose.insert(self.rng.randint(1, max(1, len(prose) - 1)), fact)  # between two sentences
        document = [token for piece in prose for token in piece]
        context = self.head + document
        asked = [Exchange("needle", (key[1],))]
        asked += [Exchange("multi-key", (question,)) for _, question in self.rng.sample(numbers, _ASKED_KEYS)]
        exchanges = [*asked, *self.passages(document), Exchange("prose", (Turn([], rest),)), *self.written()]
        return Sample(self.name, context[:-1], [_after(context[-1], exchange) for exchange in exchanges])

    def passages(self, document: list[int]) -> list[Exchange]:
        """Passages that are begun again, from equal stretches of the document."""
        cue, whole = self.amounts.cue, self.amounts.cue + self.amounts.copied
        stretch, copies = len(document) // self.amounts.copies, []
        for i in range(self.amounts.copies):
            at = i * stretch + self.rng.randrange(max(1, stretch - whole))
            passage = document[at : at + whole]
            copies.append(Exchange("copy", (Turn(self.newline + passage[:cue], passage[cue:]),)))
        return copies

    def written(self) -> list[Exchange]:
        """What the full cache answers itself: a summary, the story's next part, a conversation of ten turns."""
        questions = [self.form.ask(question, later=i > 0) for i, question in enumerate(_CONVERSATION)]
        summary = self.form.ask(_SUMMARY[0], "" if self.form.chat else _SUMMARY[1])
        # A base model goes on with the text as it is.
        story = self.encode(self.form.ask(*_STORY)) if self.form.chat else []
        return [
            Exchange("summary", (Turn(self.encode(summary), []),), self.amounts.summary),
            Exchange("generation", (Turn(story, []),), self.amounts.tokens, grows=True),
            Exchange(
                "conversation", tuple(Turn(self.encode(one), []) for one in questions), self.amounts.turn, grows=True
            ),
        ]


def _after(token: int, exchange: Exchange) -> Exchange:
    """The same exchange with a token ahead of what it gives first."""
    first = exchange.turns[0]
    turns = (Turn([token, *first.given], first.answer), *exchange.turns[1:])
    return Exchange(exchange.probe, turns, exchange.write, exchange.grows)


def make_samples(
    tokenizer: Any, texts: Sequence[Text], form: Form, *, count: int, length: int, amounts: Amounts, seed: int = 0
) -> list[Sample]:
    """Makes contexts, from each text in turn.

    Args:
        tokenizer: a transformers tokenizer.
        texts: long texts that the model was not trained on, of different authors.
        form: how documents and questions are put to the model.
        count: how many.
        length: tokens of a context.
        amounts: how much is scored.
        seed: fixes places, keys and numbers; a sample does not depend on how many others there are.

    Raises:
        ValueError: where a text is too short, or `count` or `length` too small.
    """
    if count < 1 or length < 192:
        raise ValueError(f"{count} contexts of {length} tokens; give at least 1 context of at least 192 tokens")
    materials = [Material(tokenizer, text, form, length, amounts) for text in texts[:count]]
    return [materials[i % len(materials)].sample(i // len(materials), seed) for i in range(count)]
