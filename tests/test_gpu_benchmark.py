"""benchmarks/gpu.py works: on the CPU and on the kernels under the host shim, in small; a crash costs one item."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvcompress_hf import kernels
from kvcompress_hf.kernels.cuda import CudaBackend
from kvcompress_hf.kernels.host_shim import ShimError, build_shim, shim_backend
from kvcompress_hf.kernels.host_shim.recording import RecordingLauncher, TapeCapturer

FOLDER = Path(__file__).parents[1] / "benchmarks"
SHIM_DIR = Path(__file__).parents[1] / "build" / "host_shim"


def run(out: Path, *arguments: str, status: int = 0) -> dict[str, dict]:
    command = [sys.executable, str(FOLDER / "gpu.py"), "--device", "cpu", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr + out.with_suffix(".log").read_text()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {row["item"]: row for row in rows if "item" in row}


def test_the_command_runs_and_writes_a_line_per_item(tmp_path):
    sizes = "--contexts 200 --batches 1 --model-batches 2 --chunk-queries 3 --kv-heads 2 --head-dim 64 --rounds 1"
    sizes += " --tiers native k8v4"
    found = run(tmp_path / "gpu.jsonl", *sizes.split())
    assert found["tests"]["exit_status"] == 0
    for tier in ("native", "k8v4"):
        decode = found[f"decode {tier} 200 b1"]
        assert decode["copies"] * decode["bytes"] >= 5 * 2**20 or decode["copies"] == 64  # more than caches hold
        assert decode["times_best_dense"] == min(decode["dense_ms"].values()) / decode["ms"]
        assert decode["host_us"] > 0 and decode["error"] < 0.02
    assert found["statistics k8v4 200"]["ms"] > 0
    assert {"SDPA, causal, enable_gqa", "native", "k8v4"} <= found["chunk 3 after 200"]["ms"].keys()
    assert [row["cache"] for row in found.values() if "cache" in row] == ["DynamicCache", "lossless", "k8v4", "k4v2"]


def test_throughput_fits_more_sequences_into_the_same_memory(tmp_path):
    sizes = "--parts throughput --prompt 400 --new 4 --kv-memory 1MiB --budgets 4 --most-sequences 24"
    found = run(tmp_path / "gpu.jsonl", *sizes.split())
    rows = {row["setting"]: row for row in found.values() if "setting" in row}
    assert list(rows) == ["DynamicCache", "auto", "kv-compress 1/4"]
    batches = {name: row["batch"] for name, row in rows.items()}
    assert min(batches["auto"], batches["kv-compress 1/4"]) > 1.5 * batches["DynamicCache"] > 1
    assert all(row["tokens_per_s"] > 0 for row in rows.values())
    assert all(rows[name]["bytes"] <= 1.1 * 2**20 for name in ("auto", "kv-compress 1/4"))


CHILD = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
from gpu_runner import Log, run_items

def refuse(text):
    raise RuntimeError(text)

items = dict(
    good=lambda: dict(us=1.0),
    wrong=lambda: refuse("a wrong shape"),
    broken=lambda: refuse("CUDA error: an illegal memory access"),
    dead=lambda: os.abort(),
    hung=lambda: time.sleep(60),
    last=lambda: dict(us=2.0),
)
sys.exit(run_items(items, Log(Path(sys.argv[1])), lambda error: "CUDA error" in str(error)))
"""


@pytest.fixture
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def test_a_crash_or_a_hang_costs_one_item(tmp_path, on_path):
    from gpu_runner import Log, supervise

    script = tmp_path / "child.py"
    script.write_text(CHILD.format(folder=str(FOLDER)))
    log = Log(tmp_path / "out.jsonl")
    supervise([sys.executable, str(script), str(log.path)], log, limit=60, stall=3)
    rows = {row["item"]: row for row in log.rows() if "item" in row}
    assert [name for name in rows if "failed" not in rows[name]] == ["good", "last"]
    assert "a wrong shape" in rows["wrong"]["failed"] and "illegal" in rows["broken"]["failed"]
    assert rows["dead"]["failed"] == "the process ended with status -6"
    assert rows["hung"]["failed"] == "nothing for 3 s"
    assert log.path.read_text().count('"begin": "good"') == 1  # what is there is not measured again


def test_a_command_that_does_not_start_says_so(tmp_path, on_path):
    from gpu_runner import Log, supervise

    log = Log(tmp_path / "out.jsonl")
    supervise([sys.executable, "-c", "raise SystemExit(2)"], log, limit=10, stall=5)
    assert [row["failed"] for row in log.rows()] == ["it ended with status 2 before the first item"]


def test_replayed_steps_of_a_model_are_measured(on_path, monkeypatch):
    import gpu_models

    try:
        launcher = RecordingLauncher(build_shim(SHIM_DIR))
    except ShimError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(kernels, "get_backend", lambda device: CudaBackend(launcher))
    monkeypatch.setattr(gpu_models, "capturer_for", lambda device: TapeCapturer(launcher))
    args = argparse.Namespace(device=torch.device("cpu"), dtype=torch.float32, rounds=1)
    row = gpu_models.step_item(args, "k8v4", 70, 2, graph=True)
    assert row["graph"] and row["ms"] > 0 and row["mean_ms"] > 0
    assert row["captures"] == 3  # one before each packing, one after the second


@pytest.mark.parametrize("item", ["decode", "statistics", "chunk"])
def test_layers_are_measured_on_the_cuda_kernels(on_path, monkeypatch, item):
    import gpu_items

    try:
        backend = shim_backend(build_shim(SHIM_DIR))
    except ShimError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(gpu_items, "get_backend", lambda device: backend)
    monkeypatch.setattr(gpu_items, "copies_for", lambda size, device: 2)
    args = argparse.Namespace(
        device=torch.device("cpu"), dtype=torch.float16, kv_heads=2, group=4, head_dim=64, rounds=1, tiers=["k4v2"]
    )
    if item == "chunk":
        assert gpu_items.chunk_item(args, 3, 70)["ms"]["k4v2"] > 0
        return
    row = gpu_items.decode_item(args, "k4v2", 70, 2, field="sum" if item == "statistics" else None)
    assert (
        row["error"] < 1e-3 and row["copies"] == 2 and row["dense_ms"].keys() == {"SDPA, enable_gqa", "SDPA, grouped"}
    )
