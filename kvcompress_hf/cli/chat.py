"""How a document and questions about it are put to a model: through its chat template, or as plain text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Form", "chat_form", "plain_form"]

_DOCUMENT, _ANSWER, _NEXT = "THE DOCUMENT COMES HERE", "THE ANSWER COMES HERE", "THE NEXT QUESTION COMES HERE"


@dataclass(frozen=True)
class Form:
    """What stands around a document, questions and answers.

    Args:
        before: ahead of the document.
        first: between the document and the first question.
        after: between a question and its answer.
        between: between an answer and the next question.
        unbegun: how an answer begins that nothing else begins; base models need to be shown that one is wanted.
        chat: whether it is a chat template's.
    """

    before: str
    first: str
    after: str
    between: str
    unbegun: str
    chat: bool

    def ask(self, question: str, begin: str = "", *, later: bool = False) -> str:
        """The text from the end of the document, or of an answer, to where the answer goes on.

        Args:
            question: in plain words.
            begin: how the answer begins.
            later: it follows an answer.
        """
        return (self.between if later else self.first) + question + self.after + (begin or self.unbegun)


def plain_form() -> Form:
    """For base models."""
    return Form(before="", first="\n", after=" ", between="\n", unbegun="Answer:", chat=False)


def chat_form(tokenizer: Any) -> Form:
    """As the tokenizer's chat template has it: the document and the first question are one message of the user.

    Raises:
        ValueError: where the tokenizer has no template, or its template rewrites what it is given.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: use plain text")
    chat = [
        {"role": "user", "content": _DOCUMENT},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _NEXT},
    ]
    whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    if any(whole.count(mark) != 1 for mark in (_DOCUMENT, _ANSWER, _NEXT)):
        raise ValueError("the tokenizer's chat template leaves out or repeats what it is given: use plain text")
    before, rest = whole.split(_DOCUMENT)
    _, rest = rest.split(_ANSWER)
    between, after = rest.split(_NEXT)
    return Form(before=before, first="\n\n", after=after, between=between, unbegun="", chat=True)
