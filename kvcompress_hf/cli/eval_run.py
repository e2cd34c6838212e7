"""Recipes measured on contexts: each context is read once, and every recipe's cache is filled from that."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import kvcompress_hf as kvc

from . import suites_run as run
from .figures import sum_up
from .models import tell
from .suites import ASKED, Exchange, Sample, Turn

if TYPE_CHECKING:
    from .evaluate import Cell

__all__ = ["Run"]

#: What is found of one context: per mode, of the full cache or of one recipe.
Rows = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Run:
    """Measures recipes on contexts.

    Args:
        model: the model, not patched.
        probes: what is measured.
        modes: `"unseen"` compresses the context before any question is known, each exchange on its own fork; `"seen"`
            compresses context and question together, but for the question's last token, from which the answer starts.
            A question that is seen costs another reading, so that one of each kind is asked.
        seed: fixes what recipes leave to chance.
        watch: also compare the outputs of every attention module.
    """

    model: Any
    probes: Sequence[str]
    modes: Sequence[str]
    seed: int = 0
    watch: bool = False

    def measure(
        self, samples: Sequence[Sample], cells: Sequence[Cell], length: int
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Measures every cell on every sample.

        Args:
            samples: contexts and what is done with them.
            cells: recipes and budgets.
            length: of the contexts, as it was asked for.

        Returns:
            The figures of the full cache per mode, and those of each cell.
        """
        full: Rows = {mode: [] for mode in self.modes}
        found: list[Rows] = [{mode: [] for mode in self.modes} for _ in cells]
        loud = sys.stderr.isatty()
        rounds = ("unseen" in self.modes) + len(set(ASKED) & set(self.probes)) * ("seen" in self.modes)
        total = len(samples) * len(cells) * rounds
        with torch.inference_mode(), tqdm(total=total, unit="cell", disable=not loud) as bar:
            for index, sample in enumerate(samples):
                began = time.perf_counter()
                with kvc.patched(self.model, "lossless"):
                    wholes, rows = self._sample(sample, cells, bar.update)
                for mode in self.modes:
                    full[mode] += [{"sample": index, **row} for row in wholes[mode]]
                    for mine, new in zip(found, rows, strict=True):
                        mine[mode] += [{"sample": index, **row} for row in new[mode]]
                if not loud:
                    took = time.perf_counter() - began
                    tell(f"context {index + 1} of {len(samples)}, {length:,} tokens of {sample.text}: {took:.0f} s")
        results = [self._cell(cell, rows, length) for cell, rows in zip(cells, found, strict=True)]
        return {mode: sum_up(full[mode]) for mode in self.modes if full[mode]}, results

    def _cell(self, cell: Cell, rows: Rows, length: int) -> dict[str, Any]:
        ratios = [row["ratio"] for mode in self.modes for row in rows[mode]]
        grown = [row["grown"] for mode in self.modes for row in rows[mode] if "grown" in row]
        taken = {"ratio": sum(ratios) / len(ratios), "most": max(ratios)}
        if grown:
            taken |= {"grown": sum(grown) / len(grown), "grown_most": max(grown)}
        figures = {mode: sum_up(rows[mode]) for mode in self.modes if rows[mode]}
        return {
            "recipe": cell.name,
            "budget": cell.budget,
            "context": length,
            "bytes": {name: round(value, 5) for name, value in taken.items()},
            **figures,
            "definition": cell.recipe.to_dict(),
        }

    def _sample(self, sample: Sample, cells: Sequence[Cell], tick: Callable[[], Any]) -> tuple[Rows, list[Rows]]:
        """One context: what the full cache does with it, and what each cell does; the model is patched."""
        full: Rows = {mode: [] for mode in self.modes}
        found: list[Rows] = [{mode: [] for mode in self.modes} for _ in cells]
        whole, prompt = run.FullCache(self.model, sample.context), run.Prompt(self.model, sample.context)
        probes = [probe for probe in self.probes if "unseen" in self.modes or probe in ASKED]
        exchanges = [self._written(prompt, one) for one in sample.exchanges if one.probe in probes]
        outputs = [whole.play(exchange, watch=self.watch) for exchange in exchanges]
        if "unseen" in self.modes:
            full["unseen"] = [self._score(*pair, pair[1]) for pair in zip(exchanges, outputs, strict=True)]
            for cell, mine in zip(cells, found, strict=True):
                mine["unseen"] = self._rows(prompt, cell, exchanges, outputs)
                tick()
        del whole, prompt
        for at in self._seen(exchanges):
            question, output = exchanges[at], outputs[at]
            full["seen"].append(self._score(question, output, output))
            first = question.turns[0]
            seen = run.Prompt(self.model, sample.context + first.given[:-1])
            rest = Exchange(question.probe, (Turn(first.given[-1:], first.answer),))
            for cell, mine in zip(cells, found, strict=True):
                mine["seen"] += self._rows(seen, cell, [rest], [output])
                tick()
        return full, found

    def _seen(self, exchanges: Sequence[Exchange]) -> list[int]:
        """Which questions are asked where compression sees them: the first of each kind."""
        if "seen" not in self.modes:
            return []
        probes = [exchange.probe for exchange in exchanges]
        return [probes.index(probe) for probe in ASKED if probe in probes]

    def _written(self, prompt: run.Prompt, exchange: Exchange) -> Exchange:
        """The exchange with all its answers; those that are not known come from a lossless cache."""
        if not exchange.write:
            return exchange
        return run.write_answers(self.model, prompt.fill(kvc.get_preset("lossless")), exchange)

    def _rows(
        self, prompt: run.Prompt, cell: Cell, exchanges: Sequence[Exchange], outputs: Sequence[run.Outputs]
    ) -> list[dict[str, Any]]:
        """One row per exchange, each on a fork of the recipe's cache."""
        cache = prompt.fill(cell.recipe, self.seed)
        ratio = run.ratio_while_decoding(self.model, cache)
        rows = []
        for exchange, whole in zip(exchanges, outputs, strict=True):
            mine = cache.fork()
            got = run.play(self.model, mine, exchange, watch=self.watch)
            row = {**self._score(exchange, whole, got), "ratio": ratio}
            if exchange.grows:
                memory = mine.memory()  # pages that only the context's cache uses are not this one's
                row["grown"] = (memory.total - memory.forks) / memory.dense
            rows.append(row)
        return rows

    def _score(self, exchange: Exchange, whole: run.Outputs, got: run.Outputs) -> dict[str, Any]:
        answer = [token for turn in exchange.turns for token in turn.answer]
        row = {"probe": exchange.probe, **run.answer_scores(got, whole, answer)}
        return row | run.output_errors(got, whole) if self.watch else row
