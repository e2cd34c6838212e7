"""Recipes that lose something, through whole models: both routes agree, every way of generating runs, bytes shrink."""

import pytest
import torch

from kvcompress_hf import presets
from kvcompress_hf.compat import cache_of
from kvcompress_hf.patches import patch, patched

MODES = ("greedy", "padded", "chunked", "beams", "sampling", "lookup")


@pytest.fixture(scope="module")
def model(build_model):
    return build_model("llama")


@pytest.mark.parametrize("preset", sorted(presets()))
def test_both_routes_compress_alike(preset, model, run_generate):
    tokens = []
    for route in ("swap", "interface"):
        with patched(model, preset, route=route):
            tokens.append(run_generate(model, "padded", 48))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("preset", ("k8v4", "k2v2", "kv-compress"))
def test_every_way_of_generating(preset, mode, model, run_generate):
    """The same call twice gives the same tokens, and the cache has seen every one of them."""
    changes = {"budget": 0.5, "protect": {"recent": 8}} if preset == "kv-compress" else {}
    with patched(model, preset, **changes):
        first, second = (run_generate(model, mode, 48, return_dict_in_generate=True) for _ in range(2))
    assert torch.equal(first.sequences, second.sequences)
    cache = cache_of(first)
    # Speculation may stop with the last token verified already.
    assert cache.get_seq_length() in (first.sequences.shape[1] - 1, first.sequences.shape[1])
    assert all(int(layer.max()) <= cache.get_seq_length() for layer in cache.slots())


@pytest.mark.parametrize("family", ("mistral", "gemma2", "gpt-oss", "phi3-longrope"))
@pytest.mark.parametrize("preset", ("k8v4", "kv-compress"))
def test_families_with_windows_caps_and_sinks(family, preset, build_model, run_generate):
    model = patch(build_model(family), preset)
    for mode in ("padded", "chunked"):
        assert run_generate(model, mode, 48).shape == (3, 88)


def test_eight_bits_change_little(build_model, prompt):
    """Teacher-forced logits with 8-bit keys and values stay close; with 2 bits they do not."""
    model = build_model("llama", initializer_range=0.05)
    ids = prompt(tokens=160)
    errors = {}
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        for preset in ("lossless", "k8v8", "k8v4", "k2v2"):
            with patched(model, preset):
                out = model.generate(
                    ids[:, :-1],
                    max_new_tokens=1,
                    prefill_chunk_size=32,
                    return_dict_in_generate=True,
                )
                last = model(ids[:, -1:], cache=cache_of(out)).logits[:, -1]
            errors[preset] = float((last - expected).norm() / expected.norm())
    assert errors["lossless"] < 1e-5
    assert errors["k8v8"] < 0.02 and errors["k2v2"] > 0.2
    assert errors["k8v8"] <= errors["k8v4"] <= errors["k2v2"]


def test_bytes_shrink(build_model, prompt):
    """Measured bytes of a long prompt, tail, tables and slack counted."""
    model = build_model("llama", num_hidden_layers=2, max_position_embeddings=4096).to(torch.bfloat16)
    ratios = {}
    for preset, changes in (("lossless", {}), ("k8v4", {}), ("k4v2", {}), ("kv-compress", {"budget": 0.25})):
        patch(model, preset, **changes)
        out = model.generate(
            prompt(tokens=3000), max_new_tokens=8, prefill_chunk_size=1000, return_dict_in_generate=True
        )
        ratios[preset] = cache_of(out).memory().ratio
    assert ratios["k4v2"] < ratios["k8v4"] < 0.55 < ratios["lossless"] < 1.1
    assert ratios["kv-compress"] < 0.3
