"""Tensor, pipeline and data parallelism over two processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
    ),
]


@pytest.mark.parametrize("split", ("tp_size", "pp_size", "prompts"))
def test_split_model(split, build_model, padded, tmp_path):
    model = build_model("llama", num_hidden_layers=2)
    arguments = {"max_new_tokens": 16, "do_sample": False}
    model.save_pretrained(tmp_path)
    tokens = model.generate(**padded, **arguments)
    torch.save({"inputs": padded, "arguments": arguments, "tokens": tokens}, tmp_path / "expected.pt")
    worker = Path(__file__).with_name("distributed_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(worker), str(tmp_path), split],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-4000:]
