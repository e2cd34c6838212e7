"""Whole decode steps in a CUDA graph: the same tokens, and no wait. `tests/cuda/test_whole_graph.py`: on the shim."""

from __future__ import annotations

import warnings

import pytest
import torch

import kvcompress_hf as kvc
from kvcompress_hf.runtime.attention import PagedAttention

pytestmark = pytest.mark.gpu

NEW = 80


@pytest.fixture(scope="module")
def model(tiny_llama):
    sizes = dict(vocab_size=101, head_dim=128, hidden_size=256, initializer_range=0.3, pad_token_id=0, bos_token_id=1)
    return tiny_llama(**sizes).half().cuda()


@pytest.mark.parametrize(
    "preset, changes",
    [
        ("lossless", {}),
        ("k8v4", {}),
        ("k8v4", {"when": {"every": 8}}),
        ("auto", {"budget": 0.3, "protect": {"recent": 8}}),
        ("kv-compress", {"budget": 0.5}),
        ("tova", {"budget": 60}),
    ],
)
def test_replayed_steps_give_the_same_tokens(gpu, model, monkeypatch, preset, changes):
    ids = torch.randint(3, 101, (2, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :9], mask[0, :9] = 0, 0
    waits, replay = [], PagedAttention.replay

    def watched(self, start):
        packings = self.statistics.packings
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as noted:
                warnings.simplefilter("always")
                done = replay(self, start)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if self.statistics.packings == packings:
            waits.extend(str(each.message) for each in noted if "synchroniz" in str(each.message))
        return done

    monkeypatch.setattr(PagedAttention, "replay", watched)
    results = []
    with kvc.patched(model, preset, **changes):
        for replayed in (False, True):
            out = model.generate(
                ids.cuda(),
                attention_mask=mask.cuda(),
                max_new_tokens=NEW,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
                kvcompress={"graph": replayed},
            )
            results.append(out)
    plain, replayed = results
    cache = kvc.cache_of(replayed)
    assert cache.inspect().statistics.replays == NEW - 2 and not waits
    for store in cache.inspect().stores:
        assert torch.equal(store.lengths_on_host(), store.lengths.cpu())
        assert int(store.tail_lengths.max()) == max(layer.tail_used for layer in cache._attention.layers)
    torch.testing.assert_close(torch.stack(replayed.logits), torch.stack(plain.logits), rtol=1e-2, atol=1e-2)
    assert torch.equal(replayed.sequences, plain.sequences)
