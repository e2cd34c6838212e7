"""Weights of any kind: adapters, quantised, tied, half precision, compiled; and what is saved is the stock model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import cache_of, outdated_peft
from kvcompress_hf.errors import UnsupportedModelError
from kvcompress_hf.patches import is_patched, last_run_report, patch, prefill, unpatch

ROUTES = [("llama", "swap"), ("llama", "interface"), ("qwen3", "interface")]


def _check(model, run_generate, expected, new_tokens=16):
    out = run_generate(model, "padded", new_tokens, return_dict_in_generate=True)
    assert isinstance(cache_of(out), CompressedPagedCache)
    assert torch.equal(out.sequences, expected)


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora():
    peft = pytest.importorskip("peft")

    def wrap(model, **changes):
        # Random adapters, or they would change nothing.
        settings = {"target_modules": ["q_proj", "v_proj", "o_proj"], "init_lora_weights": False, "r": 4} | changes
        torch.manual_seed(3)
        return peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()

    return wrap


@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_adapters_before_the_patch(family, route, build_model, run_generate, lora, snapshot, prompt):
    plain = run_generate(build_model(family), "padded", 16)
    model = lora(build_model(family))
    expected, before = run_generate(model, "padded", 16), snapshot(model.get_base_model())
    assert not torch.equal(expected, plain)
    assert patch(model, "lossless", route=route) is model and is_patched(model)
    _check(model, run_generate, expected)
    assert last_run_report(model).tokens == 55
    with model.disable_adapter():
        _check(model, run_generate, plain)
    cache = prefill(model, prompt(), "k8v4")
    assert cache.get_seq_length() == 40 and model.get_base_model()._kvcompress_patch.recipe.name == "lossless"
    unpatch(model)
    assert not is_patched(model) and snapshot(model.get_base_model()) == before


@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_adapters_on_a_patched_model(family, route, build_model, run_generate, lora):
    expected = run_generate(lora(build_model(family)), "padded", 16)
    base = patch(build_model(family), "lossless", route=route)
    model = lora(base)
    _check(model, run_generate, expected)
    unpatch(base)
    assert torch.equal(run_generate(model, "padded", 16), expected)
    patch(model, "lossless", route=route)
    merged = model.merge_and_unload()
    assert merged is base and is_patched(merged)
    _check(merged, run_generate, expected)


@pytest.mark.parametrize("first", ["adapter", "patch"])
@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_adapters_added_to_the_model_itself(family, route, first, build_model, run_generate, monkeypatch):
    """`model.add_adapter` puts peft's layers into the model without a PEFT model around it."""
    peft = pytest.importorskip("peft")
    # transformers 5.24 asks for a peft that is newer than any on the index.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", peft.__version__)

    def add(model, name="default"):
        torch.manual_seed(3 if name == "default" else 4)
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=4), name)
        return model.eval()

    plain = run_generate(build_model(family), "padded", 16)
    stock = add(build_model(family))
    expected = run_generate(stock, "padded", 16)
    other = run_generate(add(stock, "other"), "padded", 16)
    assert not torch.equal(expected, plain) and not torch.equal(other, expected)
    model = build_model(family)
    if first == "adapter":
        patch(add(model), "lossless", route=route)
    else:
        add(patch(model, "lossless", route=route))
    _check(model, run_generate, expected)
    cache = prefill(model, torch.arange(3, 20)[None], "lossless")
    _check(add(model, "other"), run_generate, other)
    with pytest.raises(ValueError, match="other weights"):  # filled with another adapter
        model.generate(torch.arange(3, 30)[None], past_key_values=cache, max_new_tokens=2)
    model.set_adapter("default")
    _check(model, run_generate, expected)
    model.disable_adapters()
    _check(model, run_generate, plain)
    model.enable_adapters()
    model.delete_adapter("default")
    model.set_adapter("other")
    _check(model, run_generate, other)
    unpatch(model)
    assert torch.equal(run_generate(model, "padded", 16), other)


def test_prefix_tuning_is_refused(build_model):
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(build_model("llama"), config)
    with pytest.raises(UnsupportedModelError, match="prefix tuning"):
        patch(model)


def test_prefix_tuning_on_a_patched_model_is_refused(build_model, prompt):
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(patch(build_model("llama"), "lossless"), config)
    with pytest.raises(UnsupportedModelError, match="prefix tuning"):
        model.generate(input_ids=prompt(), max_new_tokens=2)


@pytest.mark.parametrize("first", ("patch", "adapter"))
@pytest.mark.parametrize("route", ("swap", "interface"))
def test_prompt_tuning(route, first, build_model, prompt):
    """As a loop without any cache, or refused where the installed peft gets it wrong on the stock model too."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    torch.manual_seed(3)
    base = build_model("llama")
    model = peft.get_peft_model(base, config).eval()
    expected = prompt()
    with torch.no_grad():
        for _ in range(6):
            logits = model(expected, attention_mask=torch.ones_like(expected), use_cache=False).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    outdated = outdated_peft()
    if outdated is None:
        patch(base if first == "patch" else model, "lossless", route=route)
        assert torch.equal(model.generate(input_ids=prompt(), max_new_tokens=6, do_sample=False), expected)
        return
    with pytest.raises(UnsupportedModelError, match=f"virtual tokens.*{outdated.split(' (')[0]}"):
        patch(base if first == "patch" else model, "lossless", route=route)
        model.generate(input_ids=prompt(), max_new_tokens=6, do_sample=False)
    assert is_patched(base) == (first == "patch")
    assert base.generate(prompt(), max_new_tokens=6, do_sample=False).shape == expected.shape  # the base is unharmed


# -- quantised weights -------------------------------------------------------------------------------------------------


def _int8(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def _int4(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4))


@pytest.mark.parametrize("quantise", (_int8, _int4), ids=("int8", "int4"))
@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_torchao_weights(family, route, quantise, build_model, run_generate):
    plain = run_generate(build_model(family), "padded", 16)
    model = build_model(family)
    quantise(model)
    assert type(model.model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    expected = run_generate(model, "padded", 16)
    assert not torch.equal(expected, plain)
    patch(model, "lossless", route=route)
    _check(model, run_generate, expected)
    unpatch(model)
    later = patch(build_model(family), "lossless", route=route)
    quantise(later)
    _check(later, run_generate, expected)


@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize(("family", "route"), [("llama", "swap"), ("qwen3", "interface")])
def test_bitsandbytes_weights(family, route, bits, build_model, run_generate, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    build_model(family, intermediate_size=128).save_pretrained(tmp_path)
    settings = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu"
    ).eval()
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == f"Linear{bits}bit" + ("Lt" if bits == 8 else "")
    expected = run_generate(model, "padded", 12)
    patch(model, "lossless", route=route)
    _check(model, run_generate, expected, 12)


def test_quanto_weights(build_model, run_generate, tmp_path):
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    build_model("qwen3").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8")).eval()
    expected = run_generate(model, "padded", 16)
    patch(model, "lossless")
    _check(model, run_generate, expected)


# -- dtypes, tied weights, compiling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_half_precision_from_a_folder(family, route, dtype, build_model, run_generate, tmp_path):
    build_model(family).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    expected = run_generate(model, "greedy", 6)
    patch(model, "lossless", route=route)
    out = run_generate(model, "greedy", 6, return_dict_in_generate=True)
    assert cache_of(out).dtypes == {dtype}
    # Both round differently; that logits agree within half precision is tested elsewhere.
    assert (out.sequences == expected).float().mean() > 0.9


@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_tied_weights_stay_tied(family, route, build_model, run_generate, tmp_path):
    model = build_model(family, tie_word_embeddings=True)
    expected = run_generate(model, "padded", 16)
    patch(model, "lossless", route=route)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    _check(model, run_generate, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight and not is_patched(loaded)
    assert torch.equal(run_generate(loaded, "padded", 16), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "route"), [("llama", "swap"), ("qwen3", "interface")])
def test_compiled_forward(family, route, build_model, run_generate):
    model = build_model(family, num_hidden_layers=2)
    expected = run_generate(model, "padded", 5)
    patch(model, "lossless", route=route)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    try:
        _check(model, run_generate, expected, 5)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("family", ("qwen3", "gemma2", "gemma3n", "gpt-oss"))
def test_saved_model_is_the_stock_model(family, build_model, run_generate, tmp_path):
    """What `test_patch.py` tests of Llama and Mistral, for configs that carry more."""
    model = build_model(family)
    expected = run_generate(model, "padded", 12)
    patch(model, "k8v4").save_pretrained(tmp_path / "patched")
    unpatch(model).save_pretrained(tmp_path / "stock")
    for path in (tmp_path / "stock").glob("*.json"):
        assert (tmp_path / "patched" / path.name).read_text() == path.read_text()
    loaded = type(model).from_pretrained(tmp_path / "patched")
    assert torch.equal(run_generate(loaded, "padded", 12), expected)
