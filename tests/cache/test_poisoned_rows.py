"""NaN, infinities and numbers beyond float16 in one sequence of a batch leave the others alone, whatever the recipe."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

import kvcompress_hf as kvc

LAYERS, KV_HEADS, GROUP, DIM = 2, 2, 2, 16
CONFIG = LlamaConfig(
    hidden_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=KV_HEADS * GROUP,
    num_key_value_heads=KV_HEADS,
    head_dim=DIM,
)
POISONS = {"nan": float("nan"), "-nan": -float("nan"), "inf": float("inf"), "-inf": float("-inf"), "large": 3e4}


def run(name, poison, where, dtype):
    """A prompt in two chunks and decode steps for two sequences; what the first one attends to, and what it keeps."""
    recipe = kvc.get_preset(name)
    if recipe.observer is not None and recipe.observer.reads_again:
        recipe = recipe.with_overrides(observer=kvc.get_preset("auto").observer, when={"decode": False})
    if recipe.budget is not None:
        recipe = recipe.with_overrides(budget=0.5)
    cache = kvc.CompressedPagedCache(CONFIG, recipe.with_overrides(when={"every": 8}))
    generator = torch.Generator().manual_seed(0)
    heads = {"query": KV_HEADS * GROUP, "key": KV_HEADS, "value": KV_HEADS}
    states = {n: torch.randn(LAYERS, 2, h, 92, DIM, generator=generator).to(dtype) for n, h in heads.items()}
    if poison is not None:
        states[where][:, 1, :, 40] = poison
        states[where][:, 1, :, 75] = poison
    outputs, at = [], 0
    for tokens in [30, 42] + [1] * 20:
        for layer in range(LAYERS):
            q, k, v = (states[n][layer, :, :, at : at + tokens] for n in ("query", "key", "value"))
            keys, values = k.repeat_interleave(GROUP, 1), v.repeat_interleave(GROUP, 1)

            def dense(q=q, keys=keys, values=values):
                return F.scaled_dot_product_attention(q, keys, values, is_causal=True).transpose(1, 2)

            outputs.append(cache.attend(layer, q, k, v, None, scaling=0.25, dense=dense)[0].flatten())
        at += tokens
    return torch.cat(outputs), [slots[0].tolist() for slots in cache.slots()]


@pytest.mark.filterwarnings("ignore:.*beyond fp16's range")
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("name", kvc.presets())
def test_other_rows_are_not_touched(name, where):
    for dtype in (torch.float16, torch.float32):
        expected, kept = run(name, None, where, dtype)
        assert expected.isfinite().all()
        for label in POISONS if dtype == torch.float16 else ("-nan", "large"):
            poison = 3e38 if label == "large" and dtype == torch.float32 else POISONS[label]
            got, still = run(name, poison, where, dtype)
            assert torch.equal(got, expected), f"{label} in {dtype}"
            assert still == kept, f"{label} in {dtype}"
