"""Bytes are counted by walking the storages that a cache really holds, never by a setting."""

import gc

import pytest
import torch
from transformers import LlamaConfig

import kvcompress_hf as kvc

HEAD_DIM, KV_HEADS, LAYERS = 128, 2, 2


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(
        initializer_range=0.02,
        num_hidden_layers=LAYERS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=32768,
    ).to(torch.bfloat16)


def dense_bytes(tokens, batch=1):
    return 2 * batch * LAYERS * KV_HEADS * tokens * HEAD_DIM * 2  # bf16


def generate(model, tokens, new, **kwargs):
    ids = torch.randint(0, 64, (1, tokens), generator=torch.Generator().manual_seed(1))
    return model.generate(
        ids, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, **kwargs
    ).past_key_values


@pytest.mark.parametrize(
    ("recipe", "overrides", "most"),
    [("k8v4", {}, 0.42), ("k4v2", {}, 0.225), ("k8v8", {}, 0.55), ("kv-compress", {"budget": 1 / 8}, 0.135)],
)
@pytest.mark.parametrize("new", [1, 257])
def test_4096_tokens_take_their_share_of_the_dense_cache(model, recipe, overrides, most, new, held_bytes):
    with kvc.patched(model, recipe, **overrides):
        cache = generate(model, 4096, new)
    tokens = cache.get_seq_length()
    assert tokens == 4096 + new - 1
    held = held_bytes(cache)
    assert held <= most * dense_bytes(tokens)
    memory = cache.memory()
    assert memory.total == held
    assert memory.dense == dense_bytes(tokens)


def test_the_walk_itself_sees_a_dense_cache(model, held_bytes):
    cache = generate(model, 300, 1)
    assert held_bytes(cache) >= dense_bytes(300)


def test_heads_hold_different_numbers_of_slots(model):
    with kvc.patched(model, "kv-compress", budget=1 / 8):
        cache = generate(model, 2048, 2)
    slots = torch.cat([layer.flatten() for layer in cache.slots()])
    assert slots.unique().numel() > 1
    assert slots.sum() <= 2048 * LAYERS * KV_HEADS / 8


@pytest.mark.parametrize("chunk", [512])
def test_a_long_prompt_in_chunks_never_holds_more_than_budget_and_chunk(model, chunk, held_bytes):
    with kvc.patched(model, "kv-compress", budget=1 / 16):
        cache = generate(model, 16384, 1, prefill_chunk_size=chunk)
        peak = kvc.report(model).statistics.peak_bytes
    assert cache.get_seq_length() == 16384
    assert peak <= 1.1 * (dense_bytes(16384) / 16 + dense_bytes(chunk))
    assert held_bytes(cache) <= dense_bytes(16384) / 16 * 1.05
    assert peak >= held_bytes(cache)


def test_memory_is_returned_when_a_cache_goes_or_is_reset(model, held_bytes):
    with kvc.patched(model, "k8v4"):
        cache = generate(model, 1024, 4)
    cache.reset()
    assert held_bytes(cache) < 4096 and cache.memory().total == 0 and cache.get_seq_length() == 0
    with kvc.patched(model, "k8v4"):
        cache = generate(model, 64, 40)
    slab = cache.inspect().arenas[0].slabs[0]
    import weakref

    gc.disable()
    try:
        alive = weakref.ref(slab.untyped_storage())
        gone = weakref.ref(cache.inspect().stores[0])
        del slab, cache
        assert gone() is None and alive() is None  # without waiting for the garbage collector
    finally:
        gc.enable()


def test_the_report_prints_parts_that_add_up(model):
    with kvc.patched(model, "kv-compress"):
        memory = generate(model, 512, 20).memory()
    text = str(memory)
    assert "payload" in text and "total" in text and "of dense" in text
    parts = ("payload", "metadata", "fields", "tail", "tables", "slack", "free", "forks")
    assert sum(getattr(memory, part) for part in parts) == memory.total


@pytest.mark.parametrize("new", (1, 2, 20, 70))
def test_the_peak_is_never_below_what_is_held(model, new, held_bytes):
    with kvc.patched(model, "lossless"):
        cache = generate(model, 55, new)
    assert cache.run_report.statistics.peak_bytes >= cache.memory().total == held_bytes(cache)


#: Those that evict, but for those that read the prompt a second time, which takes a model.
EVICTING = [name for name in kvc.presets() if kvc.get_preset(name).plan and "kvzip" not in name]


@pytest.mark.parametrize("name", EVICTING)
def test_a_sixteenth_of_1500_tokens_is_kept_and_not_by_protection_alone(name):
    shape = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    recipe = kvc.get_preset(name).with_overrides(budget=1 / 16)
    cache = kvc.CompressedPagedCache(LlamaConfig(num_hidden_layers=2, **shape), recipe)
    g = torch.Generator().manual_seed(0)
    for tokens in (1500, 1):  # with the second the tail is there
        for layer in range(2):
            states = [torch.randn(1, heads, tokens, 64, generator=g).to(torch.bfloat16) for heads in (4, 2, 2)]
            cache.attend(layer, *states, None, scaling=0.125, dense=lambda: torch.zeros(1))
    assert cache.memory().ratio <= 1.005 / 16
    kept = torch.cat([slots.flatten() for slots in cache.slots()]).float().mean()
    assert kept >= recipe.protect.sinks + recipe.protect.recent + 1 + 8  # at least eight are chosen
