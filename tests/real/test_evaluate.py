"""`kvcompress eval` on a real model, with one context: chat form, every probe, figures in the right order."""

import json

import pytest

from kvcompress_hf.cli import main
from kvcompress_hf.cli.suites import PROBES


def test_every_probe_ranks_what_differs_much(load, tmp_path):
    load("smollm2", "auto")  # or skips
    path = tmp_path / "eval.json"
    arguments = ["--model", "smollm2", "--suite", "full", "--tokens", "32", "--contexts", "1", "--context", "1000"]
    arguments += ["--recipes", "lossless,k8v4,recency", "--budgets", "1/16", "--against", "k8v4", "--output", str(path)]
    assert main(["eval", *arguments, "--debug"]) == 0
    figures = json.loads(path.read_text())
    assert figures["form"] == "chat" and figures["dtype"] == "bfloat16"
    lossless, k8v4, recency = figures["cells"]
    assert 1 < lossless["bytes"]["ratio"] < 1.1 and k8v4["bytes"]["ratio"] < 0.47 and recency["bytes"]["ratio"] < 0.0625
    for probe in PROBES:
        kl = [cell["unseen"][probe]["kl"]["value"] for cell in (lossless, k8v4, recency)]
        assert kl[0] < 0.01 and kl[1] < 0.05 and kl[2] > 5 * kl[1], probe
        difference = recency["difference"]["unseen"][probe]["kl"]
        assert difference["value"] == pytest.approx(kl[2] - kl[1], abs=1e-5) and difference["low"] is None
    kept = [cell["unseen"]["questions"]["kept"]["value"] for cell in (k8v4, recency)]
    assert figures["full"]["1000"]["unseen"]["questions"]["right"]["value"] >= 0.5 and kept[0] > kept[1]
