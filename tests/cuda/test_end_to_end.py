"""The whole package on the CUDA backend, for a tiny model, on the CPU: padding, beams, eviction, tiers, statistics."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvcompress_hf as kvc
from kvcompress_hf import kernels


@pytest.fixture(scope="module")
def build_model():
    def build(dtype: torch.dtype, head_dim: int = 64) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=101,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=head_dim,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
            initializer_range=0.5,  # far from uniform, so that tokens tell
        )
        return LlamaForCausalLM(config).eval().to(dtype)

    return build


@pytest.fixture
def on_shim(monkeypatch, shim):
    """Caches made from here on use the CUDA backend."""
    monkeypatch.setattr(kernels, "get_backend", lambda device: shim)
    return shim


def generate(model, **options):
    ids = torch.randint(3, 101, (2, 50), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :9], mask[0, :9] = 0, 0  # left padding
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=24, do_sample=False, return_dict_in_generate=True, **options
        )


@pytest.mark.parametrize(
    "dtype, head_dim, options",
    [
        (torch.float32, 64, {}),
        (torch.float32, 48, {"num_beams": 2}),
        (torch.bfloat16, 64, {}),  # tensor cores; equal here, though rounding may part two near candidates
        (torch.float16, 128, {}),
    ],
    ids=str,
)
def test_lossless_gives_the_tokens_of_the_stock_model(build_model, on_shim, dtype, head_dim, options):
    model = build_model(dtype, head_dim)
    stock = generate(model, **options).sequences
    with kvc.patched(model, "lossless"):
        result = generate(model, **options)
    assert torch.equal(result.sequences, stock)
    assert all(store.backend is on_shim for store in kvc.cache_of(result).inspect().stores)


def test_what_a_step_takes_is_counted_once(build_model, on_shim):
    """The memory of a decode step is that of one layer: they run one after the other."""
    model = build_model(torch.float16)
    with kvc.patched(model, "k8v4"):
        cache = kvc.cache_of(generate(model))
    plans = [plan for store in cache.inspect().stores for plan in store.tensors.plans.values()]
    assert len(plans) == 2 and plans[0].step_nbytes == plans[1].step_nbytes > 0
    with_steps, step = cache.memory(), plans[0].step_nbytes
    for plan in plans:
        plan.step_nbytes = 0
    assert with_steps.tables - cache.memory().tables == with_steps.total - cache.memory().total == step


@pytest.mark.parametrize(
    "preset, changes",
    [
        ("kv-compress", {"budget": 0.5}),
        ("leankv", {}),
        ("roco", {"budget": 24}),
        ("k4v2", {}),
        ("auto", {"budget": 0.3}),
        ("auto", {"budget": 0.3, "evicted": "mean"}),
        ("kvzip", {"budget": 0.5}),  # the largest probabilities
    ],
)
def test_recipes_do_the_same_as_on_the_reference(build_model, monkeypatch, shim, preset, changes):
    model = build_model(torch.float32)
    results = []
    for backend in (shim, kernels.ReferenceBackend()):
        monkeypatch.setattr(kernels, "get_backend", lambda device, backend=backend: backend)
        with kvc.patched(model, preset, **changes):
            results.append(generate(model))
    got, wanted = results
    assert torch.equal(got.sequences, wanted.sequences)
    mine, reference = kvc.cache_of(got).memory(), kvc.cache_of(wanted).memory()
    # The plans of the reference hold nothing of their own; those of the kernels a few words per layer.
    assert 0 <= mine.tables - reference.tables < 1024
    assert replace(mine, tables=0) == replace(reference, tables=0)


@pytest.mark.parametrize(
    "preset, changes",
    [
        ("lossless", {}),
        ("k4v2", {}),
        ("kv-compress", {"budget": 0.5}),
        ("kv-compress", {"budget": 0.5, "evicted": "mean"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_second_turn_on_tensor_cores(build_model, monkeypatch, shim, dtype, preset, changes):
    model = build_model(dtype)
    ids = torch.randint(3, 101, (2, 90), generator=torch.Generator().manual_seed(1))
    started, launch = set(), shim.launcher.launch

    def noting(kernel, *arguments, **options):
        started.add(kernel)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(shim.launcher, "launch", noting)
    recipe = kvc.get_preset(preset).with_overrides(**changes)
    results = []
    for backend in (shim, kernels.ReferenceBackend()):
        monkeypatch.setattr(kernels, "get_backend", lambda device, backend=backend: backend)
        cache = kvc.CompressedPagedCache(model.config, recipe)
        # Without the dry run, which looks at float32 too and starts its kernels.
        with torch.no_grad(), kvc.patched(model, recipe, check=False):
            turns = [model(part, past_key_values=cache).logits for part in ids.split([60, 30], dim=1)]
        results.append(turns[1].float())
    got, wanted = results
    # Probabilities meet native values in their dtype, as in every fused attention; this model makes much of the rest.
    least = 0.999 if dtype is torch.float16 else 0.995
    assert torch.nn.functional.cosine_similarity(got, wanted, dim=-1).min() > least
    name = f"64_{'f16' if dtype is torch.float16 else 'bf16'}"
    assert any(kernel.startswith("kvc_chunk_64_") for kernel in started) and "kvc_chunk" not in started
    assert (f"kvc_scores_{name}" in started) == (preset == "kv-compress") and "kvc_scores" not in started
