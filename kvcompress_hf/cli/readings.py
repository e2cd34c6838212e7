"""What the demonstration reads once, and what it asks about it later."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chat import Form, chat_form
from .facts import PASSKEY_INTRO, sentences

__all__ = ["Inquiry", "Reading", "document_reading", "facts_reading", "find_document"]

DOCUMENT = Path("examples") / "texts" / "the_warden.txt"
_QUIZ = Form(before="", first="\n\nQuestion: ", after="\nAnswer:", between="\n", unbegun="", chat=False)


@dataclass(frozen=True)
class Inquiry:
    """A question that is asked after the document was read.

    Args:
        question: as a person would read it.
        ids: its tokens, with what the model needs around it to answer, and how the answer begins.
        begin: how the answer begins: small models need to be shown what is wanted.
        answer: a regular expression that the rest of a right answer holds; empty where that is not known.
    """

    question: str
    ids: list[int]
    begin: str
    answer: str

    def is_right(self, text: str) -> bool:
        """Whether an answer holds what the document says."""
        return bool(self.answer) and re.search(self.answer, text, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Reading:
    """A document and the questions about it.

    Args:
        title: what the document is.
        ids: tokens of the document, with what stands before it in a chat.
        inquiries: what is asked later.
    """

    title: str
    ids: list[int]
    inquiries: list[Inquiry]


def find_document(text: Path | None) -> Path:
    """The document to read: the given one, or the repository's.

    Raises:
        FileNotFoundError: where there is none.
    """
    for path in [text] if text else [root / DOCUMENT for root in (Path.cwd(), Path(__file__).resolve().parents[2])]:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no document at {text or DOCUMENT}: run this inside a clone, or give one with --text")


def document_reading(tokenizer: Any, path: Path, questions: list[str] | None = None) -> Reading:
    """A text with questions in plain words, as a chat where the model has a chat template.

    Args:
        tokenizer: the model's tokenizer.
        path: a text; its first line is its title. Beside it, `NAME.json` may hold a list of objects with `question`,
            `begin` (of the answer) and `answer` (a regular expression).
        questions: other questions, whose answers are not known.

    Raises:
        ValueError: where there are no questions at all.
    """
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    beside = path.with_suffix(".json")
    if questions:
        asked = [{"question": question, "begin": "", "answer": ""} for question in questions]
    elif beside.is_file():
        asked = json.loads(beside.read_text(encoding="utf-8"))
    else:
        raise ValueError(f"no questions about {path}: give some with --ask, or questions and answers in {beside}")
    form = chat_form(tokenizer) if tokenizer.chat_template else _QUIZ
    before, after = form.before + text + form.first, form.after
    inquiries = [
        Inquiry(ids=tokenizer(one["question"] + after + one["begin"], add_special_tokens=False).input_ids, **one)
        for one in asked
    ]
    ids = tokenizer(before, add_special_tokens=not tokenizer.chat_template).input_ids
    return Reading(text.splitlines()[0], ids, inquiries)


def facts_reading(tokenizer: Any, path: Path, *, tokens: int = 2000, seed: int = 0) -> Reading:
    """Prose with a pass key and a magic number hidden in it: what the repository's small models were trained to find.

    Args:
        tokenizer: the model's tokenizer.
        path: a long text.
        tokens: length of the document, met to within a sentence.
        seed: fixes the facts and the passage.
    """
    rng = random.Random(seed)
    lines = sentences(path.read_text(encoding="utf-8", errors="replace"))
    facts, inquiries = [], []

    def add(fact: str, ask: str, value: str) -> None:
        facts.append(fact.format(value))
        question = ask.format(value)
        ids = tokenizer(f"\n{question}", add_special_tokens=False).input_ids
        inquiries.append(Inquiry(question, ids, begin="", answer=rf"^\s*{value}(?!\d)"))

    value = "".join(rng.choice("0123456789") for _ in range(5))
    add("The pass key is {0}. Remember it. {0} is the pass key.", "What is the pass key? The pass key is", value)
    what = "special magic number for amber-window mentioned in the provided text"
    value = "".join(rng.choice("0123456789") for _ in range(7))
    add("One of the special magic numbers for amber-window is: {0}.", f"What is the {what}? The {what} is", value)
    room = tokens - len(tokenizer(PASSKEY_INTRO + " ".join(facts)).input_ids)
    start, passage = rng.randrange(len(lines)), list[str]()
    while True:
        line = lines[(start + len(passage)) % len(lines)]
        room -= len(tokenizer(" " + line, add_special_tokens=False).input_ids)
        if room < 0:
            break
        passage.append(line)
    for i, fact in enumerate(facts):
        passage.insert(round((i + 0.5) / len(facts) * len(passage)), fact)
    ids = tokenizer(PASSKEY_INTRO + " ".join(passage)).input_ids
    return Reading(f"{len(facts)} facts hidden in a novel ({path.name})", ids, inquiries)
