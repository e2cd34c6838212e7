"""Answers after compression: ours and a peer's, on the same contexts, against the same full cache, by the same scores.

A peer's program gives logits; they are scored here, as `kvcompress eval` scores ours, against transformers' own cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from environment import BUILD, ROOT, PeerError
from tqdm import tqdm
from worker import Worker

from kvcompress_hf.cli import suites_run as run
from kvcompress_hf.cli.evaluate import choose_form, write
from kvcompress_hf.cli.figures import compare, sum_up, to_text
from kvcompress_hf.cli.generate import load
from kvcompress_hf.cli.models import find_model
from kvcompress_hf.cli.suites import Amounts, Exchange, Sample, make_samples
from kvcompress_hf.cli.texts import find_texts

PROBES = ("needle", "multi-key", "copy", "prose")
BUDGETS = ("1/4", "1/8", "1/16")
RECIPES = "lossless,k8v4,k4v4,auto,auto-kvzip,kvzip,snapkv,ada-snapkv,expected-attention,keydiff"  # ours
PRESSES = (
    "SnapKV",
    "ExpectedAttention",
    "KeyDiff",
    "Compactor",
    "AdaKV(SnapKV)",
    "AdaKV(ExpectedAttention)",
    "KVzip",
)
#: Presses and the share of slots that they keep; no press is the same environment's own cache.
WANTED = [("", ""), *((press, budget) for press in PRESSES for budget in BUDGETS)]


@dataclass(frozen=True)
class Amount:
    """How much is measured."""

    contexts: int = 8
    length: int = 2000
    tokens: int = 128
    seed: int = 0


def measure_kvpress(output: Path, amount: Amount, threads: int, recipes: str = RECIPES) -> None:
    """Measures presses and recipes and writes the figures, in the form of `kvcompress eval`.

    Ours are measured by `kvcompress eval` meanwhile. What was measured before a stop is kept and not measured again.

    Args:
        output: the file.
        amount: how much.
        threads: for both together.
        recipes: ours, as `kvcompress eval` takes them.
    """
    each = max(1, threads // 2)
    BUILD.mkdir(parents=True, exist_ok=True)
    ours_file = BUILD / f"ours_{amount.contexts}x{amount.length}.json"
    ours = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "kvcompress_hf.cli",
            "eval",
            *eval_arguments(amount, recipes),
            "--output",
            str(ours_file),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(each)},
        stdout=subprocess.DEVNULL,
    )
    try:
        about, cells = peer_cells(amount, each)
        if ours.wait():
            raise PeerError(f"kvcompress eval ended with {ours.returncode}")
    finally:
        ours.kill()
    figures = json.loads(ours_file.read_text())
    figures |= {"peer": about, "cells": figures.pop("cells") + cells}  # last in the file: they are long
    compare(figures["cells"], "auto", ["unseen"])
    write(output, to_text(figures))


def eval_arguments(amount: Amount, recipes: str) -> list[str]:
    """For `kvcompress eval`, the same contexts."""
    said = f"--model smollm2 --split dev --modes unseen --contexts {amount.contexts} --context {amount.length}"
    said += f" --tokens {amount.tokens} --seed {amount.seed} --probes {','.join(PROBES)} --recipes {recipes}"
    return [*said.split(), "--budgets", ",".join(BUDGETS), "--add"]


def peer_cells(amount: Amount, threads: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the peer is, and every press at every ratio on every context, as cells of `kvcompress eval`."""
    torch.set_num_threads(threads)
    name = find_model("smollm2")
    model, tokenizer = load(name)
    form, texts = choose_form(tokenizer, "auto"), find_texts(name, "dev")
    amounts = Amounts(amount.tokens, summary=min(amount.tokens, Amounts().summary))
    samples = make_samples(
        tokenizer, texts, form, count=amount.contexts, length=amount.length, amounts=amounts, seed=amount.seed
    )
    rows = []
    worker = Worker("kvpress", "kvpress", "kvpress_answers.py", {"model": name}, threads)
    try:
        about = worker.ask("about")
        for index, sample in enumerate(tqdm(samples, unit="context", desc="kvpress")):
            kept = BUILD / f"kvpress_{amount.length}_{amount.tokens}_{amount.seed}_{index}.json"
            if not kept.exists():
                kept.write_text(json.dumps(sample_rows(worker, model, sample)))
            rows += [{"sample": index, **row} for row in json.loads(kept.read_text())]
    finally:
        worker.close()
    return about, [peer_cell(rows, press, budget, amount.length) for press, budget in WANTED]


def sample_rows(worker: Worker, model: Any, sample: Sample) -> list[dict[str, Any]]:
    """Every press at every ratio on one context."""
    exchanges = [one for one in sample.exchanges if one.probe in PROBES]
    given = [(one.turns[0].given, one.turns[0].answer) for one in exchanges]
    sample_file, logits_file = (BUILD / f"{os.getpid()}{ending}" for ending in (".json", ".pt"))
    sample_file.write_text(json.dumps({"context": sample.context, "exchanges": given}))
    worker.ask("take", path=str(sample_file))
    with torch.inference_mode():
        whole = run.FullCache(model, sample.context)
        outputs = [whole.play(exchange) for exchange in exchanges]
    rows = []
    for press, budget in WANTED:
        removed = 1 - float(Fraction(budget)) if press else 0.0
        taken = worker.ask("measure", press=press, removed=removed, path=str(logits_file))
        got = [run.Outputs(logits) for logits in torch.load(logits_file)]
        rows += [{"press": press, "budget": budget, **taken, **row} for row in scored(exchanges, got, outputs)]
    sample_file.unlink()
    logits_file.unlink()
    return rows


def scored(
    exchanges: Sequence[Exchange], got: Sequence[run.Outputs], wholes: Sequence[run.Outputs]
) -> list[dict[str, Any]]:
    """One row per exchange, as for a recipe of ours."""
    triples = zip(exchanges, got, wholes, strict=True)
    return [{"probe": one.probe, **run.answer_scores(mine, whole, one.turns[0].answer)} for one, mine, whole in triples]


def peer_cell(rows: Sequence[dict[str, Any]], press: str, budget: str, length: int) -> dict[str, Any]:
    """What a press did at one ratio: bytes as they were found in memory, masks counted, and what was predicted."""
    mine = [row for row in rows if (row["press"], row["budget"]) == (press, budget)]
    ratios = [(row["held"] + row["masks"]) / row["dense"] for row in mine]
    return {
        "recipe": f"kvpress {press}" if press else "kvpress, no press",
        "budget": budget,
        "context": length,
        "bytes": {"ratio": round(sum(ratios) / len(ratios), 5), "most": round(max(ratios), 5)},
        "unseen": sum_up(mine),
    }
