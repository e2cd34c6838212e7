"""One document under one cache: read, asked, saved, loaded, asked again, and measured."""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument

from .measure import PARTS, Method, Stopwatch, dense_bytes
from .readings import Inquiry, Reading

__all__ = ["METHODS", "Answer", "Bench", "Outcome"]

METHODS = [
    Method("stock", stock=True),
    Method("lossless", "lossless"),
    Method("k8v4 (default)"),
    Method("auto, 1/4", "auto", {"budget": 1 / 4}),
    Method("auto, 1/8", "auto", {"budget": 1 / 8}),
    Method("auto, 1/16", "auto", {"budget": 1 / 16}),
]


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Args:
        text: in one line.
        right: whether it holds what the document says.
        tokens: how many.
        first_seconds: to the first token.
        seconds: in all.
    """

    text: str
    right: bool
    tokens: int
    first_seconds: float
    seconds: float


@dataclass
class Outcome:
    """What one cache did.

    Args:
        title: the cache.
        evicts: whether its recipe leaves tokens out.
        tokens: of the document.
        memory: bytes after reading, by part.
        total: of them, all.
        dense: what the stock cache takes for the same tokens.
        read_seconds: reading the document, compression included.
        answers: one per question.
        tiers: per layer and KV head, how many of the document's tokens lie in each tier (`"tail"`: not packed yet).
        second_first: from nothing but the model to the second answer's first token: the document is read again, or
            loaded from a file.
        second_seconds: likewise to the answer's end.
        load_seconds: of that, loading the file.
        file_bytes: size of the file; `None` for the stock cache.
    """

    title: str
    evicts: bool
    tokens: int
    memory: dict[str, int]
    total: int
    dense: int
    read_seconds: float
    answers: list[Answer] = field(default_factory=list)
    tiers: list[list[dict[str, int]]] = field(default_factory=list)
    second_first: float = 0.0
    second_seconds: float = 0.0
    load_seconds: float = 0.0
    file_bytes: int | None = None

    @property
    def read_speed(self) -> float:
        """Tokens of the document per second."""
        return self.tokens / self.read_seconds

    @property
    def write_speed(self) -> float:
        """Tokens of answers per second, the first of each left out."""
        seconds = sum(answer.seconds - answer.first_seconds for answer in self.answers)
        return sum(answer.tokens - 1 for answer in self.answers) / seconds if seconds else 0.0

    def kept(self) -> torch.Tensor:
        """Share of the document's tokens that each head kept, `[layers, kv_heads]`."""
        return torch.tensor([[sum(head.values()) / self.tokens for head in layer] for layer in self.tiers])

    def to_dict(self, stock: Outcome) -> dict[str, Any]:
        """Every figure, ready for JSON."""
        figures = asdict(self)
        figures["right"] = sum(answer.right for answer in self.answers)
        figures["same_text"] = sum(a.text == b.text for a, b in zip(self.answers, stock.answers, strict=True))
        figures["ratio"] = self.total / self.dense
        figures["read_tokens_per_second"] = self.read_speed
        figures["write_tokens_per_second"] = self.write_speed
        return figures


class Bench:
    """A model, a document and its questions.

    Args:
        model: a causal language model, not patched.
        tokenizer: its tokenizer.
        reading: document and questions.
        new_tokens: most tokens of an answer.
    """

    def __init__(self, model: Any, tokenizer: Any, reading: Reading, new_tokens: int) -> None:
        self.model, self.tokenizer, self.reading, self.new_tokens = model, tokenizer, reading, new_tokens
        self.ids = torch.tensor([reading.ids], device=model.device)

    def run(self, method: Method) -> Outcome:
        """Read the document under one cache, ask every question, and the second once more from the start."""
        with torch.inference_mode():
            return self._stock(method) if method.stock else self._ours(method)

    def _stock(self, method: Method) -> Outcome:
        self.model(self.ids[:, :64], logits_to_keep=1)  # the first calls are slower: not counted
        began = self._now()
        out = self.model(self.ids, use_cache=True, logits_to_keep=1)
        seconds = self._now() - began
        cache: Any = kvc.cache_of(out)
        total = dense_bytes(cache)
        memory = dict.fromkeys(PARTS, 0) | {"payload": total}
        outcome = Outcome(method.title, False, self.ids.shape[1], memory, total, total, seconds)
        outcome.answers = [self.ask(inquiry, copy.deepcopy(cache)) for inquiry in self.reading.inquiries]
        del cache, out
        again = self.ask(self.reading.inquiries[1], None)
        outcome.second_first, outcome.second_seconds = again.first_seconds, again.seconds
        return outcome

    def _ours(self, method: Method) -> Outcome:
        with kvc.patched(self.model, method.recipe, **method.overrides):
            kvc.prefill(self.model, self.ids[:, :64])
            began = self._now()
            cache = kvc.prefill(self.model, self.ids)
            seconds = self._now() - began
            report = cache.memory()
            memory = {part: int(getattr(report, part)) for part in PARTS}
            outcome = Outcome(
                method.title, cache.recipe.evicts, self.ids.shape[1], memory, report.total, report.dense, seconds
            )
            outcome.tiers = tiers_of(cache)
            outcome.answers = [self.ask(inquiry, cache.fork()) for inquiry in self.reading.inquiries]
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "document.kvc.safetensors"
                cache.save(path)
                del cache
                outcome.file_bytes = path.stat().st_size
                began = self._now()
                loaded = kvc.CompressedPagedCache.load(path, self.model)
                outcome.load_seconds = self._now() - began
                again = self.ask(self.reading.inquiries[1], loaded)
                outcome.second_first = outcome.load_seconds + again.first_seconds
                outcome.second_seconds = outcome.load_seconds + again.seconds
        return outcome

    def ask(self, inquiry: Inquiry, cache: Any) -> Answer:
        """One question, answered greedily.

        Args:
            inquiry: the question.
            cache: holds the document and is changed by the call; `None` reads the document again.
        """
        ids = torch.cat([self.ids, torch.tensor([inquiry.ids], device=self.ids.device)], 1)
        watch = Stopwatch()
        began = self._now()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([watch]),
            **as_argument(self.model, cache),
        )
        new = out[0, ids.shape[1] :]
        text = " ".join(self.tokenizer.decode(new, skip_special_tokens=True).split())
        return Answer(text, inquiry.is_right(text), len(new), watch.times[0] - began, watch.times[-1] - began)

    def _now(self) -> float:
        if self.ids.is_cuda:
            torch.cuda.synchronize(self.ids.device)
        return time.perf_counter()


def tiers_of(cache: kvc.CompressedPagedCache) -> list[list[dict[str, int]]]:
    """Slots by tier, and in the tail, for each layer and KV head of the only sequence of a cache."""
    layers: dict[int, list[dict[str, int]]] = {}
    for row in cache.rows():
        layers.setdefault(row.layer, []).append({**row.slots, "tail": row.tail})
    return [layers[layer] for layer in sorted(layers)]
