"""Layers that are not plain attention: windows keep only their window, sharing layers keep nothing."""

import pytest
import torch

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import cache_of
from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.layers import layer_sharing
from kvcompress_hf.patches import patch, prefill

WINDOW = 24
#: Family: layers with a window.
WINDOWED = {
    "mistral": (0, 1, 2),
    "qwen2-window": (1, 2),
    "gemma2": (0,),
    "gemma3": (0,),
    "gpt-oss": (0,),
    "cohere2": (0,),
    "exaone4": (0,),
}


@pytest.mark.parametrize("chunk_size", (None, 70))
@pytest.mark.parametrize("family", WINDOWED)
def test_window_layers_keep_only_their_window(family, chunk_size, build_model, prompt):
    """Slots and bytes of a window layer do not depend on how long the prompt was; those of a full layer do."""
    model, every = patch(build_model(family), "lossless"), 32
    bytes_of = {}
    for tokens in (200, 600):
        cache = prefill(model, prompt(tokens=tokens), chunk_size=chunk_size, when={"every": every})
        for _ in range(2 * every):  # and so it stays while decoding
            with torch.no_grad():
                model(prompt(tokens=1), past_key_values=cache)
        slots = cache.slots()
        for layer, counts in enumerate(slots):
            if layer in WINDOWED[family]:
                assert int(counts.min()) >= WINDOW - 1 and int(counts.max()) <= WINDOW + every
            else:
                assert int(counts.min()) == int(counts.max()) == tokens + 2 * every
        rows = [row for row in cache.rows() if row.layer in WINDOWED[family]]
        bytes_of[tokens] = sum(row.nbytes for row in rows)
    assert bytes_of[200] == bytes_of[600] > 0
    if len(WINDOWED[family]) == len(slots):
        assert cache.memory().total < 0.4 * 2 * 2 * 16 * 4 * len(slots) * 600  # of all keys and values in float32


def test_windows_are_dropped_from_quantised_layers_too(build_model, prompt):
    cache = prefill(patch(build_model("gemma2"), "k8v4"), prompt(tokens=400), chunk_size=100)
    windowed, full = cache.slots()
    assert int(windowed.max()) < WINDOW + 1 and int(full.min()) == 400


SHARING = ("gemma3n", "gemma4")


@pytest.mark.parametrize("family", SHARING)
def test_sharing_layers_store_nothing(family, build_model, prompt):
    model = patch(build_model(family), "lossless")
    assert layer_sharing(model.config) == ["store", "store", "reuse", "reuse"]
    cache = prefill(model, prompt(tokens=100))
    windowed, full, *others = cache.slots()
    assert int(windowed.max()) <= WINDOW and int(full.min()) == 100
    assert [layer.numel() for layer in others] == [0, 0]
    assert {row.layer for row in cache.rows()} == {0, 1}
    assert not any(layer.get_seq_length() != 100 for layer in cache.layers)


@pytest.mark.parametrize("preset", ("k8v4", "kv-compress", "h2o", "auto"))
@pytest.mark.parametrize("family", SHARING)
def test_sharing_layers_with_recipes_that_lose(family, preset, build_model, run_generate):
    model = patch(build_model(family), preset)
    for mode in ("chunked", "lookup"):
        first, second = (run_generate(model, mode, 20, return_dict_in_generate=True) for _ in range(2))
        assert torch.equal(first.sequences, second.sequences)
        assert cache_of(first).slots()[2].numel() == 0


@pytest.mark.parametrize("family", SHARING)
def test_sharing_layers_read_what_is_stored(family, build_model, prompt):
    """Queries of a sharing layer see the pages of the layer it shares: they change when those do."""
    model = patch(build_model(family), "lossless")
    with torch.no_grad():
        said = []
        for preset in ("lossless", "k8v8", "k2v2"):
            cache = prefill(model, prompt(tokens=60), preset)
            seen = []
            hook = model.model.layers[3].self_attn.register_forward_hook(
                lambda _, __, out, seen=seen: seen.append(out[0])
            )
            model(prompt(tokens=1, seed=4), past_key_values=cache)
            hook.remove()
            said.append(seen[0])
    exact, close, far = said
    assert 0 < (close - exact).norm() < 0.1 * exact.norm() < (far - exact).norm()


@pytest.mark.parametrize("family", SHARING)
def test_sharing_layers_in_a_saved_cache(family, build_model, prompt, tmp_path):
    model = patch(build_model(family), "k8v4")
    ids = prompt(tokens=50)
    cache = prefill(model, ids[:, :40])
    cache.save(tmp_path / "cache.safetensors")
    loaded = CompressedPagedCache.load(tmp_path / "cache.safetensors", model)
    expected = model.generate(ids, kvcompress=cache, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, kvcompress=loaded, max_new_tokens=12, do_sample=False), expected)


def test_keys_attended_to_twice_are_refused_where_nobody_shares(build_model):
    """A layer that attends twice to the same new keys would otherwise store them twice."""
    model = patch(build_model("qwen3"), "lossless")
    cache = CompressedPagedCache(model.config, "lossless")
    key, value = cache.update(torch.randn(1, 2, 5, 32), torch.randn(1, 2, 5, 32), 0)
    attend = {"query": torch.randn(1, 4, 5, 32), "key": key, "value": value, "attention_mask": None}
    settings = {"scaling": 0.1, "dense": lambda: torch.zeros(1, 5, 4, 32)}
    assert cache.is_awaited(0)
    cache.attend(0, *attend.values(), **settings)
    assert not cache.is_awaited(0)
    with pytest.raises(UnsupportedFeatureError, match="kv_sharing_modes"):
        cache.attend_shared(1, 0, *attend.values(), **settings)


@torch.no_grad()
def test_mask_of_another_width_for_a_sharing_layer(build_model, prompt):
    model = patch(build_model("gemma3n"), "lossless")
    cache = prefill(model, prompt(tokens=8))
    with pytest.raises(UnsupportedFeatureError, match="mask"):
        cache.attend_shared(
            2,
            0,
            torch.randn(1, 4, 1, 16),
            torch.randn(1, 2, 1, 16),
            torch.randn(1, 2, 1, 16),
            torch.ones(1, 1, 1, 9, dtype=torch.bool),
            scaling=1.0,
            dense=lambda: torch.zeros(1, 1, 4, 16),
        )
