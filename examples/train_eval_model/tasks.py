"""Sequences to train on: windows of text, and tasks generated from a seed.

A sequence has one loss weight per token: 1 for text, 0 for what nobody can know (random keys and values, when they are
first named), more for answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from corpus import SPECIAL, Corpus
from facts import INSTRUCTIONS, Fact, digits, magic_number, make_key, random_fact
from recipe import Recipe

TEXT, RANDOM, ANSWER = 1.0, 0.0, 4.0
KINDS = ("prose", "code", "tasks")

Pieces = list[tuple[str, float]]


class Row:
    """A sequence under construction.

    Args:
        size: tokens it must have in the end; more are cut off.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.ids: list[int] = [SPECIAL["<s>"]]
        self.weights: list[float] = [RANDOM]

    @property
    def room(self) -> int:
        return self.size - len(self.ids)

    def add(self, ids: list[int], weights: list[float]) -> None:
        self.ids += ids
        self.weights += weights

    def end_document(self) -> None:
        self.add([SPECIAL["</s>"]], [TEXT])


class Maker:
    """Makes sequences out of one split of a corpus.

    Args:
        corpus: tokens, tokenizer and words.
        split: `"train"` or `"heldout"`: which text, and which words keys are made of.
        recipe: the mixture.
        seed: with a step's number it fixes that step's sequences.
    """

    def __init__(self, corpus: Corpus, split: str, recipe: Recipe, seed: int = 0) -> None:
        self.tokenizer, self.recipe, self.seed, self.split = corpus.tokenizer, recipe, seed, split
        self.words = corpus.words[split]
        self.text = {kind: corpus.streams[f"{split}-{kind}"] for kind in ("prose", "code")}
        pieces = [corpus.tokenizer.id_to_token(i) or "" for i in range(corpus.vocab)]
        # Facts go between sentences of prose, and between lines of code. Ċ and Ġ are byte-level newline and space.
        self.ends_line = np.array([piece.endswith("Ċ") for piece in pieces])
        self.ends_sentence = np.array([piece in (".", "!", "?") for piece in pieces])
        self.begins_word = np.array([piece.startswith("Ġ") for piece in pieces])

    def batch(self, step: int, kind: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The sequences of a step: a function of the seed and the step alone.

        Args:
            step: counted from 0.
            kind: one of `KINDS` for all sequences; by default the recipe's mixture.

        Returns:
            Token ids int64 `[rows, length + 1]`, loss weights float32 of the same shape, and the rows' kinds as
            indices into `KINDS`, int64 `[rows]`.
        """
        length = self.recipe.length(step)
        rng = random.Random(f"{self.seed} {self.split} {kind} {step}")
        prose, tasks = self.recipe.prose_share, self.recipe.task_share(step)
        shares = (prose, 1 - prose - tasks, tasks)
        rows, kinds = [], []
        for _ in range(self.recipe.tokens_per_step // length):
            chosen = kind or rng.choices(KINDS, shares)[0]
            row = Row(length + 1)
            if chosen == "tasks":
                self._fill_with_tasks(row, rng)
            else:
                self._fill_with_text(row, rng, chosen)
            rows.append(row)
            kinds.append(KINDS.index(chosen))
        ids = np.array([row.ids[: length + 1] for row in rows], dtype=np.int64)
        weights = np.array([row.weights[: length + 1] for row in rows], dtype=np.float32)
        return ids, weights, np.array(kinds)

    def window(self, rng: random.Random, kind: str, size: int) -> np.ndarray:
        """Consecutive tokens from a random place."""
        stream = self.text[kind]
        start = rng.randrange(max(1, len(stream) - size))
        return stream[start : start + size]

    def encode(self, pieces: Pieces) -> tuple[list[int], list[float]]:
        """Tokens of the pieces in one text, and the weight of the piece that each token ends in."""
        encoding = self.tokenizer.encode("".join(text for text, _ in pieces), add_special_tokens=False)
        ends = np.cumsum([len(text) for text, _ in pieces])
        last = np.array([end for _, end in encoding.offsets]) - 1
        owners = np.searchsorted(ends, last, side="right")
        return encoding.ids, [pieces[owner][1] for owner in owners]

    def _fill_with_text(self, row: Row, rng: random.Random, kind: str) -> None:
        ids = self.window(rng, kind, row.room).tolist()
        row.add(ids, [TEXT] * len(ids))
        self._pad(row)

    def _pad(self, row: Row) -> None:
        missing = max(0, row.room)
        row.add([SPECIAL["<pad>"]] * missing, [RANDOM] * missing)

    def _fill_with_tasks(self, row: Row, rng: random.Random) -> None:
        # One time in two a task takes all the room there is; else it is shorter, and others follow.
        while row.room >= 64:
            room = row.room if rng.random() < 0.5 else rng.randint(64, row.room)
            task = rng.choices([t for t, _ in TASKS], [share for _, share in TASKS])[0]
            task(self, row, rng, room - 1)
            row.end_document()
        if row.room > 0:
            self._fill_with_text(row, rng, "prose")

    def hide(
        self, row: Row, rng: random.Random, room: int, facts: list[Pieces], kind: str = "prose", intro: str = ""
    ) -> None:
        """Adds an instruction and text with facts between its sentences or lines.

        Args:
            row: gets up to `room` tokens more.
            rng: decides text and places.
            room: for all together.
            facts: what is hidden, each to follow a sentence's end.
            kind: of the text.
            intro: the instruction.
        """
        if intro:
            ids, weights = self.encode([(intro, TEXT)])
            row.add(ids, weights)
            room -= len(ids)
        if kind == "code":  # as comments
            facts = [[("# " + fact[0][0].lstrip(), fact[0][1]), *fact[1:], ("\n", TEXT)] for fact in facts]
        encoded = [self.encode(fact) for fact in facts]
        room = max(0, room - sum(len(ids) for ids, _ in encoded))
        text = self.window(rng, kind, room)
        if kind == "code":
            places = np.flatnonzero(self.ends_line[text]) + 1
        else:
            places = np.flatnonzero(self.ends_sentence[text[:-1]] & self.begins_word[text[1:]]) + 1
        if not len(places):
            places = np.arange(len(text) + 1)
        chosen = sorted(rng.choices(places.tolist(), k=len(facts)))
        last = 0
        for place, (ids, weights) in zip(chosen, encoded, strict=True):
            row.add(text[last:place].tolist(), [TEXT] * (place - last))
            row.add(ids, weights)
            last = place
        row.add(text[last:].tolist(), [TEXT] * (len(text) - last))

    def draw_facts(self, rng: random.Random, count: int, alike: bool) -> list[Fact]:
        """Facts that can be told apart: magic numbers under different keys, or of all kinds."""
        facts: dict[str, Fact] = {}
        while len(facts) < count:
            if alike:
                fact = magic_number(rng, make_key(rng, self.words), rng.choice([5, 7, 7]), short=rng.random() < 0.3)
            else:
                fact = random_fact(rng, self.words)
            facts.setdefault(f"{fact.kind} {fact.key}", fact)
        return list(facts.values())


def question(fact: Fact) -> Pieces:
    """A question with its answer, to follow a context."""
    return [("\n" + fact.question, TEXT), (fact.answer, ANSWER), (".", TEXT)]


def _needles(maker: Maker, row: Row, rng: random.Random, room: int) -> None:
    most = max(1, min(16, room // 90))
    count = min(most, rng.choice([1, 2, 3, 4, 6, 8, 8, 12, 16]))
    facts = maker.draw_facts(rng, count, alike=rng.random() < 0.6)
    asked = [maker.encode(question(fact)) for fact in rng.sample(facts, min(count, 8))]
    room -= sum(len(ids) for ids, _ in asked)
    kind = rng.choice(["prose", "code"])
    maker.hide(row, rng, room, [fact.needle for fact in facts], kind, rng.choice(INSTRUCTIONS))
    for ids, weights in asked:
        row.add(ids, weights)


_LINES = (
    ("line ", ": REGISTER_CONTENT is <", ">\n"),
    ("", " = ", "\n"),
    ('    "', '": ', ",\n"),
    ("", ": ", "\n"),
    ("- ", " -> ", ";\n"),
)


def _key_values(maker: Maker, row: Row, rng: random.Random, room: int) -> None:
    before, between, after = rng.choice(_LINES)
    size = rng.choice([3, 5, 5, 7])
    share = rng.uniform(0.4, 0.75)
    values: dict[str, str] = {}
    end = len(row.ids) + room
    room = int(room * share)

    def line(key: str, weight: float) -> tuple[list[int], list[float]]:
        pieces = [(before, TEXT), (key, RANDOM), (between, TEXT), (values[key], weight), (after, TEXT)]
        return maker.encode([piece for piece in pieces if piece[0]])

    while room > 0:
        key = make_key(rng, maker.words)
        if key not in values:
            values[key] = digits(rng, size)
            ids, weights = line(key, RANDOM)
            row.add(ids, weights)
            room -= len(ids)
    for key in rng.sample(list(values), len(values)):
        ids, weights = line(key, ANSWER)
        if len(row.ids) + len(ids) > end:
            break
        row.add(ids, weights)


def _variables(maker: Maker, row: Row, rng: random.Random, room: int) -> None:
    """Chains of assignments, in order, in text; the value of every variable is asked."""
    chains = rng.randint(1, max(1, min(6, room // 200)))
    names = iter(rng.sample(maker.words, min(len(maker.words), 5 * chains)))
    statements: list[list[Pieces]] = []
    values: dict[str, str] = {}
    for _ in range(chains):
        value, previous, chain = digits(rng, 5), "", []
        for name in [n for _, n in zip(range(rng.randint(2, 5)), names, strict=False)]:
            assigned = f" VAR {previous}" if previous else f" {value}"
            chain.append([(" VAR", TEXT), (f" {name}", RANDOM), (" =", TEXT), (assigned, RANDOM), (".", TEXT)])
            values[name], previous = value, name
        statements.append(chain)
    # A random interleaving that keeps every chain in its order.
    order = [i for i, chain in enumerate(statements) for _ in chain]
    rng.shuffle(order)
    hidden = [statements[i].pop(0) for i in order]
    asked = [
        maker.encode([(f"\nThe value of VAR {name} is", TEXT), (f" {values[name]}", ANSWER), (".", TEXT)])
        for name in rng.sample(list(values), len(values))
    ]
    maker.hide(row, rng, room - sum(len(ids) for ids, _ in asked), hidden)
    for ids, weights in asked:
        row.add(ids, weights)


def _sorting(maker: Maker, row: Row, rng: random.Random, room: int) -> None:
    for _ in range(max(1, room // 256)):
        count = rng.randint(3, max(3, min(16, room // 24)))
        if rng.random() < 0.5:
            items = rng.sample(maker.words, count)
            given, ordered = items, sorted(items)
        else:
            numbers = [rng.randrange(1000) for _ in range(count)]
            given, ordered = [str(n) for n in numbers], [str(n) for n in sorted(numbers)]
        pieces = [("Sort:", TEXT), (" " + " ".join(given), RANDOM), ("\nSorted:", TEXT)]
        row.add(*maker.encode([*pieces, (" " + " ".join(ordered), ANSWER), (".\n", TEXT)]))


def _counting(maker: Maker, row: Row, rng: random.Random, room: int) -> None:
    for _ in range(max(1, room // 256)):
        kinds = rng.sample(maker.words, rng.randint(2, 5))
        items = rng.choices(kinds, k=rng.randint(4, max(4, min(40, room // 4))))
        pieces: Pieces = [("Words:", TEXT), (" " + " ".join(items), RANDOM), (".\n", TEXT)]
        for kind in kinds:
            count = (f" {items.count(kind)}", ANSWER)
            pieces += [("Occurrences of", TEXT), (f" {kind}", RANDOM), (":", TEXT), count, ("\n", TEXT)]
        row.add(*maker.encode(pieces))


def _repetition(maker: Maker, row: Row, rng: random.Random, room: int) -> None:
    """A passage that comes again, in its order or with its tokens shuffled, after other text."""
    size = rng.randint(16, max(16, room // 3))
    kind = rng.choice(["prose", "code"])
    passage = maker.window(rng, kind, size).tolist()
    shuffled = rng.random() < 0.4
    if shuffled:
        rng.shuffle(passage)
    row.add(passage, [RANDOM if shuffled else TEXT] * len(passage))
    gap = maker.window(rng, kind, rng.randint(0, max(0, room - 2 * size))).tolist()
    row.add(gap, [TEXT] * len(gap))
    # Where it begins again cannot be known.
    row.add(passage, [RANDOM] * min(2, len(passage)) + [TEXT] * max(0, len(passage) - 2))


TASKS: tuple[tuple[Callable[[Maker, Row, random.Random, int], None], float], ...] = (
    (_needles, 0.42),
    (_key_values, 0.25),
    (_repetition, 0.13),
    (_variables, 0.1),
    (_sorting, 0.05),
    (_counting, 0.05),
)
