"""Ours: attention of one decoded token over the pages of a tier, in the shape of onnxruntime_attention.py."""

from __future__ import annotations

import sys
from typing import Any

import torch
from environment import ROOT
from worker import serve, setting, time_steps, versions_of

from kvcompress_hf.kernels import CpuBackend

sys.path.append(str(ROOT / "benchmarks"))
from decode_forms import Form, Setting, dense_forms, tier_form

KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
ROTATE_BYTES = 256 << 20


class Attention:
    """One layer's attention.

    Args:
        tier: of the pages; "torch" for torch's matrix products over dense keys and values.
        threads: how many.
    """

    def __init__(self, tier: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.tier, self.turn = tier, 0
        self.form: Form | None = None

    def about(self) -> dict[str, Any]:
        return {"versions": versions_of("kvcompress-hf", "torch"), "isa": CpuBackend().isa}

    def fill(self, context: int, batch: int) -> dict[str, Any]:
        if batch != 1:
            raise ValueError("one sequence only")
        self.form = None
        torch.manual_seed(0)
        sizes = Setting(KV_HEADS, GROUP, HEAD_DIM, torch.bfloat16, context, ROTATE_BYTES)
        q = torch.randn(1, KV_HEADS * GROUP, 1, HEAD_DIM).bfloat16()
        form = next(iter(dense_forms(q, sizes, gqa=False))) if self.tier == "torch" else None
        assert form is None or isinstance(form, Form)
        self.form = form or tier_form(CpuBackend(), self.tier, q, sizes)
        return {"bytes": self.form.size}

    def step(self) -> None:
        assert self.form
        self.form.run(self.turn)
        self.turn += 1

    def decode(self, seconds: float, most: int) -> dict[str, Any]:
        return time_steps(self.step, seconds, most)

    def free(self) -> dict[str, Any]:
        self.form = None
        return {}


if __name__ == "__main__":
    attention = Attention(**setting())
    serve({"about": attention.about, "fill": attention.fill, "decode": attention.decode, "free": attention.free})
