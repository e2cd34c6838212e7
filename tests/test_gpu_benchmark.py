"""benchmarks/gpu.py works: on the CPU, in small."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_command_runs_and_writes_json(tmp_path):
    output = tmp_path / "gpu.json"
    sizes = "--contexts 200 --batches 1 --model-batches 2 --kv-heads 2 --head-dim 64 --rounds 1 --tiers native k8v4"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--skip-tests"]
    subprocess.run([*command, "--json", str(output), *sizes.split()], check=True, cwd=tmp_path)
    report = json.loads(output.read_text())
    assert {row["form"] for row in report["decode"]} >= {"native", "k8v4", "SDPA, enable_gqa"}
    assert [row["cache"] for row in report["model"]] == ["DynamicCache", "lossless", "k8v4", "k4v2"]
    assert all(row["ms"] > 0 for part in ("decode", "prefill", "model") for row in report[part])
