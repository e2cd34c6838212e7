"""How often the host waits, as PyTorch notes it; `tests/cuda/test_no_waiting.py` counts the same without a GPU."""

from __future__ import annotations

import warnings

import pytest
import torch

import kvcompress_hf as kvc
from kvcompress_hf.kernels import Logits
from kvcompress_hf.runtime.attention import PagedAttention
from kvcompress_hf.runtime.call import AttentionCall

pytestmark = pytest.mark.gpu

LAYERS, BATCH, Q_HEADS, KV_HEADS, HEAD_DIM = 2, 2, 8, 2, 64


def waits_of(step) -> list[str]:
    """What PyTorch says of a step's waits."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(each.message) for each in noted if "synchroniz" in str(each.message)]


@pytest.mark.parametrize(
    "preset, changes, packing, plan",
    [
        ("k8v4", {}, 0, None),
        ("kv-compress", {"budget": 0.5}, None, 2),
        ("leankv", {}, None, 2),
        ("roco", {"budget": 100}, None, 2),
        ("auto", {"budget": 0.3}, 0, 2),
    ],
)
def test_a_step_waits_no_more_than_it_must(gpu, preset, changes, packing, plan):
    torch.manual_seed(0)
    recipe = kvc.get_preset(preset).with_overrides(**changes)
    attention = PagedAttention([recipe], [None] * LAYERS)
    logits = Logits(HEAD_DIM**-0.5)

    def forward(tokens):
        for layer in range(LAYERS):
            q, k, v = (
                torch.randn(BATCH, heads, tokens, HEAD_DIM, dtype=torch.float16, device="cuda")
                for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
            )
            out = torch.zeros(BATCH, tokens, Q_HEADS, HEAD_DIM, dtype=torch.float16, device="cuda")
            attention.attend(layer, AttentionCall(q, k, v, logits), None, lambda out=out: out)

    with torch.no_grad():
        forward(300)
        forward(1)  # kernels are loaded
        for _ in range(70):
            before = attention.statistics.packings, attention.statistics.plans
            waits = waits_of(lambda: forward(1))
            packings, plans = attention.statistics.packings - before[0], attention.statistics.plans - before[1]
            most = plan if plans else packing if packings else 0
            assert most is None or len(waits) <= most, waits
            for store in attention.stores:
                assert torch.equal(store.lengths_on_host(), store.lengths.cpu())
