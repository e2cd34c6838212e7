"""EasyKV's decoding mode: the prompt stays whole, and the budget is for what is decoded after it."""

import pytest
import torch
from transformers import LlamaConfig

import kvcompress_hf as kvc

PROMPT, STEPS, DIM, HEADS = 70, 90, 32, 2


@pytest.mark.parametrize("budget", [24, 0.3, "24KiB"])
@pytest.mark.parametrize("preset", ["roco", "kv-compress", "ada-snapkv", "leankv", "auto"])
def test_the_prompt_stays_and_the_budget_is_for_the_rest(preset, budget):
    recipe = kvc.get_preset(preset)
    observer = {"decode": True} if preset == "ada-snapkv" else {}
    recipe = recipe.with_overrides(
        observer=observer,
        protect={"sinks": 0, "recent": 8, "prompt": True},
        budget=budget,
        when={"every": 8, "decode": True},
    )
    config = LlamaConfig(
        num_hidden_layers=1,
        hidden_size=DIM * HEADS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
    )
    cache = kvc.CompressedPagedCache(config, recipe)
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, PROMPT + STEPS, DIM, generator=g)
    start = 0
    for count in [40, 30] + [1] * STEPS:
        part = slice(start, start + count)
        chunk = (q[:, :, part], k[:, :, part], v[:, :, part])
        cache.attend(0, *chunk, None, scaling=DIM**-0.5, dense=lambda: torch.zeros(1))
        start += count
    (store,) = cache.inspect().stores
    tail = int(store.tail_lengths.max())
    for row in range(HEADS):
        kept = [store.read_field(t, "position")[row, : int(n)] for t, n in enumerate(store.lengths[:, row])]
        kept = torch.cat(kept)
        assert set(range(PROMPT)) <= set(kept.tolist())
        decoded = int((kept >= PROMPT).sum())
        assert 8 - tail <= decoded
        assert decoded < STEPS - tail or recipe.tiers != ("native",)  # quantised, all may fit
        if budget == 24 and preset == "roco":
            assert decoded == 24
