"""Putting a patch on and taking it off: what changes, what must not, and what is left afterwards."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

from kvcompress_hf import Recipe, get_preset
from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import as_argument, cache_of, find_cache
from kvcompress_hf.errors import UnsupportedModelError
from kvcompress_hf.patches import core, is_patched, patch, patched, unpatch
from kvcompress_hf.patches.families import Family, PagedLlamaAttention
from kvcompress_hf.patches.generation import record_of

ROUTES = [("llama", "swap"), ("llama", "interface"), ("mistral", "swap"), ("gemma2", "interface")]


@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_unpatch_leaves_no_trace(family, route, build_model, run_generate, snapshot):
    model = build_model(family)
    tokens, before = run_generate(model, "padded", 24), snapshot(model)
    assert patch(model, "k8v4", route=route) is model
    assert is_patched(model) and snapshot(model) != before
    run_generate(model, "padded", 24)
    assert unpatch(model) is model
    assert not is_patched(model)
    assert snapshot(model) == before
    assert torch.equal(run_generate(model, "padded", 24), tokens)


def test_unpatch_twice_and_never(build_model, snapshot):
    model = build_model("llama")
    before = snapshot(model)
    unpatch(model)
    patch(model)
    unpatch(model)
    unpatch(model)
    assert snapshot(model) == before


def test_default_recipe_is_the_default_preset(build_model):
    model = patch(build_model("llama"))
    assert record_of(model).recipe == get_preset("k8v4")


def test_routes(build_model):
    for family in ("llama", "granite", "mistral", "mixtral", "qwen2", "qwen2-window", "qwen3", "qwen3-moe"):
        assert record_of(patch(build_model(family))).route == "swap"
    assert record_of(patch(build_model("phi3"))).route == "interface"
    with pytest.raises(UnsupportedModelError, match="swap"):
        patch(build_model("phi3"), route="swap")
    with pytest.raises(ValueError, match="route"):
        patch(build_model("phi3"), route="hook")


def test_swapped_modules_share_everything(build_model):
    model = build_model("llama")
    originals = [layer.self_attn for layer in model.model.layers]
    patch(model)
    for original, layer in zip(originals, model.model.layers, strict=True):
        paged = layer.self_attn
        assert type(paged) is PagedLlamaAttention and isinstance(paged, LlamaAttention)
        assert paged.q_proj is original.q_proj
        for name in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"):
            assert getattr(paged, name) is getattr(original, name)
    unpatch(model)
    assert [layer.self_attn for layer in model.model.layers] == originals


@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_patching_again_replaces_only_the_recipe(family, route, build_model, snapshot):
    model = build_model(family)
    before = snapshot(model)
    patch(model, "lossless", route=route)
    once = snapshot(model)
    patch(model, "kv-compress", budget=1 / 8)
    assert snapshot(model) == once
    recipe = record_of(model).recipe
    assert (recipe.name, recipe.budget.amount) == ("kv-compress", 1 / 8)
    unpatch(model)
    assert snapshot(model) == before


def test_every_form_of_a_recipe(build_model):
    model = build_model("llama")
    recipe = get_preset("kv-compress").with_overrides(budget=0.5)
    for form in (
        recipe,
        recipe.to_dict(),
        {"preset": "kv-compress", "budget": 0.5},
        Recipe.from_json(recipe.to_json()),
    ):
        assert record_of(patch(model, form)).recipe == recipe


def test_what_is_no_choice_is_refused(build_model, snapshot):
    model = build_model("llama")
    before = snapshot(model)
    with pytest.raises(TypeError, match="check is 'no'; it must be True or False"):
        patch(model, check="no")
    with pytest.raises(ValueError, match=r"Recipe\('auto'\) has the name of a preset and none of its parts"):
        patch(model, Recipe("auto"))
    assert snapshot(model) == before
    with pytest.raises(TypeError, match="Family.window is 8"):
        Family("arcee", "ArceeAttention", window=8)
    with pytest.raises(TypeError, match="Family.norms is 'q_norm'"):
        Family("arcee", "ArceeAttention", norms="q_norm")


def test_patched_context_restores_what_was_before(build_model, snapshot):
    model = build_model("llama")
    before = snapshot(model)
    with patched(model, "k8v4") as inside:
        assert inside is model and is_patched(model)
    assert snapshot(model) == before

    patch(model, "lossless")
    outer = snapshot(model)
    with patched(model, "kv-compress", route="interface"):
        assert record_of(model).route == "interface"
        with pytest.raises(RuntimeError, match="stop"), patched(model, "k4v4"):
            assert record_of(model).recipe.name == "k4v4"
            raise RuntimeError("stop")
        assert record_of(model).recipe.name == "kv-compress"
    assert (record_of(model).recipe.name, record_of(model).route) == ("lossless", "swap")
    assert [entry[::2] for entry in snapshot(model)["modules"]] == [entry[::2] for entry in outer["modules"]]

    with patched(model, "k8v4"):
        unpatch(model)
    assert record_of(model).recipe.name == "lossless"
    unpatch(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_training_mode_is_kept(family, route, build_model):
    model = build_model(family).train()
    model.model.layers[0].self_attn.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    patch(model, route=route)
    assert {name: module.training for name, module in model.named_modules()} == modes
    model.eval()
    unpatch(model)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("route", ("swap", "interface"))
def test_deepcopy_is_a_patched_model_of_its_own(route, build_model, run_generate, snapshot):
    model = build_model("llama")
    expected, before = run_generate(model, "padded", 16), snapshot(model)
    patch(model, "lossless", route=route)
    run_generate(model, "padded", 4)
    twin = copy.deepcopy(model)
    assert is_patched(twin) and record_of(twin) is not record_of(model)
    assert record_of(twin).last_run is None
    unpatch(model)
    assert snapshot(model) == before
    with torch.no_grad():
        model.lm_head.weight.zero_()
    out = run_generate(twin, "padded", 16, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert isinstance(cache_of(out), CompressedPagedCache)
    assert record_of(twin).last_run.tokens > 0
    unpatch(twin)
    assert all(type(layer.self_attn) is LlamaAttention for layer in twin.model.layers)
    twin_ids, model_ids = ({id(p) for p in m.parameters()} for m in (twin, model))
    assert not twin_ids & model_ids
    assert torch.equal(run_generate(twin, "padded", 16), expected)
    assert sorted(vars(twin)) == sorted(vars(model))


@pytest.mark.parametrize("route", ("swap", "interface"))
def test_pickled_model_stays_patched(route, build_model, run_generate):
    model = patch(build_model("llama"), "lossless", route=route)
    expected = run_generate(model, "padded", 16)
    again = pickle.loads(pickle.dumps(model))
    out = run_generate(again, "padded", 16, return_dict_in_generate=True)
    assert isinstance(cache_of(out), CompressedPagedCache)
    assert torch.equal(out.sequences, expected)


@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_saved_model_is_the_stock_model(family, route, build_model, run_generate, tmp_path):
    model = build_model(family)
    expected = run_generate(model, "padded", 16)
    keys = set(model.state_dict())
    patch(model, "k8v4", route=route)
    run_generate(model, "padded", 4, kvcompress={"tiers": "k4v4"})
    assert set(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.json"):
        text = path.read_text()
        assert "kvcompress" not in text.lower() and "paged" not in text.lower()
        json.loads(text)
    loaded = type(model).from_pretrained(tmp_path)
    assert not is_patched(loaded)
    assert torch.equal(run_generate(loaded, "padded", 16), expected)


def test_nothing_of_a_cache_stays_on_the_model(build_model, run_generate):
    """The record is the only attribute, and no tensor hangs on it beside the originals' own."""
    model = build_model("llama")
    names = set(vars(model))
    patch(model, "k8v4")
    own = set(vars(model)) - names
    assert own == {
        "_get_candidate_generator",
        "_kvcompress_patch",
        "_prefill",
        "_prepare_cache_for_generation",
        "_prepare_generation_config",
        "_valid_auto_compile_criteria",
        "generate",
        "get_compiled_call",
        "init_continuous_batching",
        "prepare_inputs_for_generation",
    }
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules() if name}
    run_generate(model, "padded", 8)
    assert {name: sorted(vars(module)) for name, module in model.named_modules() if name} == attributes
    record = record_of(model)
    kept = [
        value for value in vars(record.last_run).values() if isinstance(value, (torch.Tensor, CompressedPagedCache))
    ]
    assert kept == []


def test_weights_changed_after_patching_are_seen(build_model, run_generate):
    """Parameters replaced through the patched model (as `.to()` and offloading do) reach the originals."""
    model = patch(build_model("llama"), "lossless")
    model.to(torch.float64)
    attention = model.model.layers[0].self_attn
    attention.q_proj = torch.nn.Linear(*reversed(attention.q_proj.weight.shape), bias=False).to(torch.float64)
    replaced = attention.q_proj
    unpatch(model)
    assert model.model.layers[0].self_attn.q_proj is replaced
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_forward_hooks_see_both_forms(build_model, run_generate):
    model = build_model("llama")
    calls = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append("before"))
    patch(model, "lossless")
    calls.clear()
    run_generate(model, "greedy", 4)
    assert calls.count("before") == 4
    later = model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append("later"))
    unpatch(model)
    run_generate(model, "greedy", 4)
    assert calls.count("later") == 4
    handle.remove(), later.remove()
    calls.clear()
    run_generate(model, "greedy", 2)
    assert calls == []


def test_user_changing_the_attention_implementation(build_model, run_generate):
    """It takes the interface patch apart: patching again repairs it, unpatching keeps the user's choice."""
    model = build_model("phi3")
    expected = run_generate(model, "padded", 16)
    patch(model, "lossless")
    model.set_attn_implementation("eager")
    patch(model, "lossless")
    out = run_generate(model, "padded", 16, return_dict_in_generate=True)
    assert isinstance(cache_of(out), CompressedPagedCache) and torch.equal(out.sequences, expected)
    assert model.config._attn_implementation == "kvcompress|eager"
    model.set_attn_implementation("sdpa")
    unpatch(model)
    assert model.config._attn_implementation == "sdpa"


def test_other_implementations_are_put_back(build_model, run_generate):
    """A model on flex attention gets sdpa while it is patched."""
    for family, inside in (("llama", "sdpa"), ("phi3", "kvcompress|sdpa")):
        model = build_model(family)
        model.config._attn_implementation_internal = "flex_attention"
        # flex attention itself needs a compiler here; only the bookkeeping is of interest.
        patch(model, "lossless", check=False)
        assert model.config._attn_implementation == inside
        unpatch(model)
        assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_failed_dry_run_undoes_everything(family, route, build_model, run_generate, snapshot, monkeypatch):
    model = build_model(family)
    expected, before = run_generate(model, "padded", 16), snapshot(model)
    attend = CompressedPagedCache.attend
    with monkeypatch.context() as context:
        context.setattr(CompressedPagedCache, "attend", lambda *args, **kwargs: attend(*args, **kwargs) + 1)
        with pytest.raises(UnsupportedModelError, match="does not get the same"):
            patch(model, route=route)
    assert snapshot(model) == before
    with monkeypatch.context() as context:
        context.setattr(CompressedPagedCache, "attend", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(UnsupportedModelError, match="ZeroDivisionError"):
            patch(model, route=route)
    assert snapshot(model) == before
    assert torch.equal(run_generate(model, "padded", 16), expected)


def test_failure_while_installing_undoes_everything(build_model, snapshot, monkeypatch):
    for family in ("llama", "phi3"):
        model = build_model(family)
        before = snapshot(model)
        with monkeypatch.context() as context:
            context.setattr(core, "bind_methods", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                patch(model)
        assert snapshot(model) == before


class _Fails:
    """Fails with an error, and counts how often."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self, *_, **__):
        self.calls += 1
        raise self.error


@pytest.mark.parametrize("where", ["stock", "patched"])
@pytest.mark.parametrize("route", ["auto", "swap", "interface"])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no memory"),
        torch.OutOfMemoryError("no memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_running_out_of_memory_says_nothing_about_the_model(error, route, where, build_model, snapshot, monkeypatch):
    """It is neither a reason to refuse the model nor one to try the other route."""
    model = build_model("llama")
    before, fails = snapshot(model), _Fails(error)
    with monkeypatch.context() as context:
        if where == "stock":
            context.setattr(type(model.model.layers[0].mlp), "forward", fails)
        else:
            context.setattr(CompressedPagedCache, "attend", fails)
        with pytest.raises(type(error)) as raised:
            patch(model, route=route)
    assert raised.value is error and fails.calls == 1 and snapshot(model) == before
    patch(model, route=route)


@pytest.mark.parametrize("route", ["auto", "swap", "interface"])
def test_a_native_library_that_does_not_fit_is_no_fault_of_the_model(route, build_model, snapshot, monkeypatch):
    """As after an update without a rebuild: the message must say to install, and not to leave the model unpatched."""
    model = build_model("llama")
    before = snapshot(model)
    with monkeypatch.context() as context:
        context.setattr(CompressedPagedCache, "attend", _Fails(ImportError("reinstall kvcompress_hf")))
        with pytest.raises(ImportError, match="reinstall"):
            patch(model, route=route)
    assert snapshot(model) == before


def test_foreign_forward_is_refused(build_model, snapshot):
    model = build_model("llama")
    model.model.layers[1].self_attn.forward = lambda *args, **kwargs: None
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError):
        patch(model)
    assert snapshot(model) == before


def test_instance_methods_of_others_are_called_and_put_back(build_model, run_generate):
    """Another library's own `_prepare_cache_for_generation` stays in charge of the caches that are not ours."""
    model = build_model("llama")
    calls = []

    def theirs(generation_config, model_kwargs, *args):
        calls.append(generation_config.cache_implementation)
        return type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args)

    model._prepare_cache_for_generation = theirs
    patch(model, "lossless")
    run_generate(model, "greedy", 2)
    assert calls == []
    run_generate(model, "greedy", 2, cache_implementation="dynamic")
    assert calls == ["dynamic"]
    unpatch(model)
    assert model.__dict__["_prepare_cache_for_generation"] is theirs


@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_other_caches_go_the_stock_way(family, route, build_model, run_generate, prompt):
    model = build_model(family)
    expected = run_generate(model, "greedy", 24)
    with torch.no_grad():
        logits = model(prompt(3)).logits
    patch(model, "k2v2", route=route)
    theirs = as_argument(model, DynamicCache(config=model.config))
    out = run_generate(model, "greedy", 24, return_dict_in_generate=True, **theirs)
    assert type(cache_of(out)) is DynamicCache
    assert torch.equal(out.sequences, expected)
    for arguments in ({"cache_implementation": "static"}, {"use_cache": False}, {"cache_implementation": "dynamic"}):
        out = run_generate(model, "greedy", 24, return_dict_in_generate=True, **arguments)
        assert find_cache(out, CompressedPagedCache) is None
        assert torch.equal(out.sequences, expected)
    with torch.no_grad():
        torch.testing.assert_close(model(prompt(3)).logits, logits)
        torch.testing.assert_close(model(prompt(3), use_cache=False).logits, logits)


@pytest.mark.parametrize("kind", ("llava", "gemma3"))
def test_text_part_of_a_composite_model(kind, snapshot, padded):
    """Only the language part is switched; vision towers keep their attention."""
    text = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.2,
    }
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    if kind == "llava":
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**text), vision_config=transformers.CLIPVisionConfig(**vision)
        )
        model = transformers.LlavaForConditionalGeneration(config)
    else:
        text |= {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        model = transformers.Gemma3ForConditionalGeneration(config)
    model.eval()
    arguments = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected, before = model.generate(**padded, **arguments), snapshot(model)
    patch(model, "lossless")
    assert record_of(model).route == ("swap" if kind == "llava" else "interface")
    assert config.vision_config._attn_implementation == "sdpa"
    out = model.generate(**padded, **arguments, return_dict_in_generate=True)
    assert isinstance(cache_of(out), CompressedPagedCache) and torch.equal(out.sequences, expected)
    unpatch(model)
    assert snapshot(model) == before


def test_names_used_of_transformers():
    """The parts of transformers that patching relies on, by name."""
    from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin, PreTrainedModel
    from transformers.cache_utils import Cache

    for owner, names in {
        GenerationMixin: (
            "_prepare_cache_for_generation",
            "_get_candidate_generator",
            "_prepare_generation_config",
            "_supports_default_dynamic_cache",
            "prepare_inputs_for_generation",
        ),
        PreTrainedModel: ("_can_set_attn_implementation", "_is_stateful", "set_attn_implementation"),
        Cache: ("get_mask_sizes", "get_query_offset", "get_seq_length", "activate_past_recording", "crop"),
        AttentionInterface: ("register", "get_interface"),
        AttentionMaskInterface: ("register",),
    }.items():
        for name in names:
            assert hasattr(owner, name), f"{owner.__name__}.{name} is gone"
