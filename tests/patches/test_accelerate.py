"""Models that accelerate has placed, before or after patching."""

import copy

import pytest
import torch

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import cache_of
from kvcompress_hf.patches import patch, unpatch

accelerate = pytest.importorskip("accelerate")

# Hooks on a whole layer, and on an attention module itself.
DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1.self_attn": "disk",
    "model.layers.1.mlp": "cpu",
    "model.layers.1.input_layernorm": "cpu",
    "model.layers.1.post_attention_layernorm": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}


@pytest.fixture
def dispatch(tmp_path):
    def place(model):
        return accelerate.dispatch_model(
            model, DEVICE_MAP, main_device="cpu", offload_dir=tmp_path, skip_keys=model._skip_keys_device_placement
        )

    return place


def _check(model, run_generate, expected):
    out = run_generate(model, "padded", 24, return_dict_in_generate=True)
    assert isinstance(cache_of(out), CompressedPagedCache)
    assert torch.equal(out.sequences, expected)


@pytest.mark.parametrize(("family", "route"), [("llama", "swap"), ("llama", "interface"), ("mistral", "swap")])
def test_dispatched_before_patching(family, route, build_model, run_generate, dispatch):
    model = build_model(family)
    expected = run_generate(model, "padded", 24)
    dispatch(model)
    hooked = {name: sorted(vars(module)) for name, module in model.named_modules()}
    hook = model.model.layers[1].self_attn._hf_hook
    patch(model, "lossless", route=route)
    assert model.model.layers[1].self_attn._hf_hook is hook
    _check(model, run_generate, expected)
    unpatch(model)
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == hooked
    assert torch.equal(run_generate(model, "padded", 24), expected)
    assert model.model.layers[1].self_attn.q_proj.weight.device.type == "meta"


@pytest.mark.parametrize(("family", "route"), [("llama", "swap"), ("llama", "interface"), ("mistral", "swap")])
def test_dispatched_after_patching(family, route, build_model, run_generate, dispatch):
    model = build_model(family)
    expected = run_generate(model, "padded", 24)
    original = model.model.layers[1].self_attn
    patch(model, "lossless", route=route)
    dispatch(model)
    _check(model, run_generate, expected)
    unpatch(model)
    assert model.model.layers[1].self_attn is original
    assert original._hf_hook is not None and original.forward.args == (original,)
    assert torch.equal(run_generate(model, "padded", 24), expected)
    # and back again, with the hooks carried over
    patch(model, "lossless", route=route)
    _check(model, run_generate, expected)


@pytest.mark.parametrize("family", ("llama", "qwen3"))
def test_everything_on_disk(family, build_model, run_generate, tmp_path):
    """No weight is anywhere but on disk when the model is patched."""
    model = build_model(family)
    expected = run_generate(model, "padded", 24)
    accelerate.cpu_offload(model) if family == "qwen3" else accelerate.disk_offload(model, tmp_path)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    patch(model, "lossless")
    _check(model, run_generate, expected)


def test_hooks_removed_while_patched(build_model, run_generate, dispatch):
    model = build_model("llama")
    expected = run_generate(model, "padded", 24)
    attention = model.model.layers[0].self_attn
    accelerate.hooks.add_hook_to_module(attention, accelerate.hooks.ModelHook())
    patch(model, "lossless")
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    _check(model, run_generate, expected)
    unpatch(model)
    assert model.model.layers[0].self_attn is attention
    assert not hasattr(attention, "_hf_hook")
    assert torch.equal(run_generate(model, "padded", 24), expected)
    # What accelerate leaves on a module it has let go of does not stand in the way.
    patch(model, "lossless")
    _check(model, run_generate, expected)


def test_deepcopy_of_a_hooked_patched_model(build_model, run_generate):
    model = build_model("llama")
    expected = run_generate(model, "padded", 24)
    for layer in model.model.layers:
        accelerate.hooks.add_hook_to_module(layer.self_attn, accelerate.hooks.ModelHook())
    patch(model, "lossless")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    _check(twin, run_generate, expected)
    unpatch(twin)
    attention = twin.model.layers[0].self_attn
    assert attention.forward.args == (attention,)
    assert torch.equal(run_generate(twin, "padded", 24), expected)


@pytest.mark.parametrize("mixed_precision", ("no", "bf16"))
@pytest.mark.parametrize("patched_first", (False, True))
@pytest.mark.parametrize(("family", "route"), [("llama", "swap"), ("qwen3", "interface")])
def test_prepared_by_an_accelerator(family, route, patched_first, mixed_precision, build_model, run_generate):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
    expected = run_generate(accelerator.prepare(build_model(family)), "padded", 12)
    model = build_model(family)
    if patched_first:
        model = accelerator.prepare(patch(model, "lossless", route=route))
    else:
        model = patch(accelerator.prepare(model), "lossless", route=route)
    out = run_generate(model, "padded", 12, return_dict_in_generate=True)
    assert isinstance(cache_of(out), CompressedPagedCache)
    if mixed_precision == "no":
        assert torch.equal(out.sequences, expected)
    else:  # the cache holds what autocast made of keys and values, and rounds elsewhere
        assert cache_of(out).dtypes == {torch.bfloat16}
        assert torch.equal(out.sequences[:, :42], expected[:, :42])
    assert torch.equal(run_generate(unpatch(model), "padded", 12), expected)


@pytest.mark.parametrize(("family", "route"), [("llama", "swap"), ("qwen3", "interface"), ("gemma3n", "interface")])
def test_device_map_of_a_folder(family, route, build_model, run_generate, tmp_path):
    """Layers on the cpu and on disk, as `device_map` places them; the hooks never try to move the cache."""
    model = build_model(family)
    expected = run_generate(model, "padded", 16)
    model.save_pretrained(tmp_path / "model")
    places = {name: "cpu" for name, child in model.model.named_children() if name != "layers"}
    layers = len(model.model.layers)
    places = {f"model.{name}": place for name, place in places.items()}
    places |= {f"model.layers.{i}": "disk" if i == layers - 1 else "cpu" for i in range(layers)} | {"lm_head": "cpu"}
    model = type(model).from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    patch(model, "lossless", route=route)
    assert not hasattr(CompressedPagedCache, "to")
    out = run_generate(model, "padded", 16, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert {arena.device.type for arena in cache_of(out).inspect().arenas} == {"cpu"}
    unpatch(model)
    assert torch.equal(run_generate(model, "padded", 16), expected)


def test_hooks_do_not_move_the_cache(build_model, run_generate, dispatch, monkeypatch):
    """accelerate moves whatever has a `to`; a cache that had one would be copied at every layer."""
    calls = []
    monkeypatch.setattr(CompressedPagedCache, "to", lambda self, *args, **kwargs: calls.append(args), raising=False)
    model = build_model("llama")
    expected = run_generate(model, "padded", 8)
    dispatch(model)
    patch(model, "lossless")
    _check(model, lambda model, *_, **kwargs: run_generate(model, "padded", 8, **kwargs), expected)
    assert calls == []
