"""benchmarks/gpu.py works: on the CPU, in small."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(*arguments: str) -> dict:
        output = tmp_path / "gpu.json"
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cpu", "--json", str(output), *arguments])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return json.loads(output.read_text())

    return run


def test_the_command_runs_and_writes_json(run):
    sizes = "--contexts 200 --batches 1 --model-batches 2 --chunk-queries 3 --kv-heads 2 --head-dim 64 --rounds 1"
    sizes += " --tiers native k8v4"
    report = run(*sizes.split())
    assert report["tests"]["exit_status"] == 0
    assert {row["form"] for row in report["decode"]} >= {"native", "k8v4", "SDPA, enable_gqa"}
    assert {row["form"] for row in report["chunk"]} == {"SDPA, dense past", "native", "k8v4"}
    assert [row["cache"] for row in report["model"]] == ["DynamicCache", "lossless", "k8v4", "k4v2"]
    assert all(row["ms"] > 0 for part in ("decode", "chunk", "prefill", "model") for row in report[part])


def test_throughput_fits_more_sequences_into_the_same_memory(run):
    sizes = "--parts throughput --prompt 400 --new 4 --kv-memory 1MiB --budgets 4 --most-sequences 24"
    report = run(*sizes.split())
    batches = {row["setting"]: row["batch"] for row in report["throughput"]}
    assert list(batches) == ["DynamicCache", "auto", "kv-compress 1/4"]
    assert min(batches["auto"], batches["kv-compress 1/4"]) > 1.5 * batches["DynamicCache"] > 1
    assert all(row["tokens_per_s"] > 0 for row in report["throughput"])
    assert all(row["bytes"] <= 1.1 * 2**20 for row in report["throughput"][1:])
