"""The texts that `kvcompress eval` takes its contexts from, with other authors for each split."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SPLITS", "Text", "find_texts", "pieces_of"]

FOLDER = Path("examples") / "texts" / "evaluation"
#: Settings are chosen on the first; the second is looked at once, after a default has changed.
SPLITS = ("dev", "test")
#: Ends of sentences, with a closing quotation mark, and beginnings of paragraphs.
_BREAKS = re.compile(r"(?<=[.!?])(?=\s)|(?<=[.!?][\"'])(?=\s)|(?=\n\n)")


@dataclass(frozen=True)
class Text:
    """One long text.

    Args:
        name: of its file, without the ending.
        text: as it is written.
    """

    name: str
    text: str


def find_texts(model: str, split: str, given: Path | None = None) -> list[Text]:
    """The texts of a split, each of another author.

    Args:
        model: folder or hub id of the model. A folder with a `haystack.txt` is of a model that has read most novels of
            the repository, but not this one: its first half is `dev`, its second `test`.
        split: one of `SPLITS`.
        given: a text, or a folder of `.txt` files, that is taken whole instead.

    Raises:
        FileNotFoundError: where there is none.
    """
    if given is not None:
        files = sorted(given.glob("*.txt")) if given.is_dir() else [given]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"no long text at {given}: give a text, or a folder of .txt files, with --text")
        return [_read(file) for file in files]
    beside = Path(model) / "haystack.txt"
    if beside.is_file():
        whole = _read(beside)
        middle = whole.text.find(". ", len(whole.text) // 2) + 1
        return [Text(whole.name, whole.text[:middle] if split == SPLITS[0] else whole.text[middle:])]
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / FOLDER / split).is_dir():
            return [_read(file) for file in sorted((root / FOLDER / split).glob("*.txt"))]
    raise FileNotFoundError(f"no long texts at {FOLDER / split}: run this inside a clone, or give one with --text")


def _read(path: Path) -> Text:
    return Text(path.stem, path.read_text(encoding="utf-8", errors="replace"))


def pieces_of(text: str) -> list[str]:
    """A text's sentences, each with the space or the empty line before it: joined, they are the text.

    Lines that are only wrapped are put together, and marks that small vocabularies lack become plain ones.
    """
    text = text.replace("\ufeff", "").replace("\r\n", "\n")
    for fancy, plain in (("’", "'"), ("‘", "'"), ("“", '"'), ("”", '"'), ("—", "--")):
        text = text.replace(fancy, plain)
    text = re.sub(r"[ \t]*\n[ \t]*", "\n", text)
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()
    return [piece for piece in _BREAKS.split(text) if piece.strip()]
