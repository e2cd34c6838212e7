"""What figures were taken on."""

from __future__ import annotations

import datetime
import os
import platform

import torch
import transformers

import kvcompress_hf
from kvcompress_hf.cli.info import processor
from kvcompress_hf.kernels import CpuBackend


def machine() -> dict[str, object]:
    """Processor, versions and date, for the head of a result file."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "isa": CpuBackend().isa,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvcompress_hf": kvcompress_hf.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
