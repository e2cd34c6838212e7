"""The examples around cache files and data-parallel generation, as a person would start them."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def start(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_answer_as_one_does(tmp_path, monkeypatch):
    script = EXAMPLES / "split_between_processes.py"
    arguments = ("--cpu", "--recipe", "lossless", "--prompts", 5, "--new-tokens", 8, "--output")
    launch = ("-m", "accelerate.commands.launch", "--num_processes", 2, "--multi_gpu", "--num_machines", 1)
    plain = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0)
    start(*launch, *plain, script, *arguments, tmp_path / "two")
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments), str(tmp_path / "one")])
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        PartialState._reset_state()  # accelerate remembers for the whole process that it was told to use the CPU
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert [answer["process"] for answer in two] == [0, 0, 0, 1, 1] and len(one) == 5
    assert [answer["tokens"] for answer in two] == [answer["tokens"] for answer in one]
    assert all(str(10007 * (i + 1)) in answer["text"] for i, answer in enumerate(two))


@pytest.mark.slow
def test_the_long_document_is_asked_in_a_new_process():
    text = start(EXAMPLES / "long_document.py", "--tokens", 300, "--tiny-tokens", 600, "--new-tokens", 6)
    for which in ("tiny", "random"):
        assert re.search(rf"^{which} model, [0-9.]+ M parameters, [0-9,]+ tokens, auto at 0.125", text, re.MULTILINE)
        assert re.search(rf"^{which} model, new process: loaded [0-9,]+ tokens in", text, re.MULTILINE)
    stock, ours = re.findall(r"(?:read again|from the file) .*, ([0-9]) of 5 right", text)
    assert "'71432'; stock '71432" in text and 0 <= int(ours) <= int(stock) <= 5
    assert len(re.findall(r"5 questions x 6 tokens in .* of cache", text)) == 4
