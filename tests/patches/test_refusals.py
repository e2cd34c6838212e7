"""What is refused: the right class of error, a message that says why, and nothing else harmed."""

import pytest
import torch
import transformers
from torch import nn

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import as_argument
from kvcompress_hf.errors import UnsupportedFeatureError, UnsupportedModelError
from kvcompress_hf.layers import KVHandle
from kvcompress_hf.patches import interface, is_patched, patch
from kvcompress_hf.patches.call import check_call

_SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
}
_GPTJ = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 16}
_BLOOM = {"vocab_size": 64, "hidden_size": 64, "n_layer": 2, "n_head": 4}
_MPT = {"vocab_size": 64, "d_model": 64, "n_layers": 2, "n_heads": 4}
_MAMBA = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
_BART = {
    "vocab_size": 64,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
_DEEPSEEK = _SMALL | {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_JAMBA = _SMALL | {
    "num_key_value_heads": 2,
    "use_mamba_kernels": False,
    "num_experts": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
_LLAMA4 = _SMALL | {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 1,
    "intermediate_size_mlp": 64,
    "attention_chunk_size": 16,
}

# Name: model class, config class, config, what the message must say.
UNSUPPORTED = {
    "falcon": ("FalconForCausalLM", "FalconConfig", _SMALL, "AttentionInterface"),
    "bloom": ("BloomForCausalLM", "BloomConfig", _BLOOM, "AttentionInterface"),
    "mpt": ("MptForCausalLM", "MptConfig", _MPT, "AttentionInterface"),
    "deepseek-v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _DEEPSEEK, "MLA"),
    "mamba": ("MambaForCausalLM", "MambaConfig", _MAMBA, "recurrent"),
    "jamba": ("JambaForCausalLM", "JambaConfig", _JAMBA, "recurrent"),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5, "encoder-decoder"),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART, "encoder-decoder"),
    "bert": ("BertForSequenceClassification", "BertConfig", _SMALL, "generate"),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", _LLAMA4, "chunk"),
}


if not transformers.GPTJForCausalLM._can_set_attn_implementation():  # rewritten in 5.24
    UNSUPPORTED["gptj"] = ("GPTJForCausalLM", "GPTJConfig", _GPTJ, "AttentionInterface")


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_model(name, snapshot):
    class_name, config_name, values, reason = UNSUPPORTED[name]
    config = getattr(transformers, config_name)(**values)
    model = getattr(transformers, class_name)(config).train()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        patch(model)
    assert class_name in str(caught.value)
    assert snapshot(model) == before and not is_patched(model)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 60}, "head_dim is 60"),
        ({"head_dim": 8}, "head_dim is 8"),
        ({"head_dim": 272}, "head_dim is 272"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_unsupported_config(changes, reason, build_model, snapshot):
    model = build_model("llama", **changes)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        patch(model)
    assert snapshot(model) == before


def test_family_that_only_the_dry_run_finds_out(snapshot):
    """DiffLlama cuts its values up after the cache; nothing in its config says so."""
    config = transformers.DiffLlamaConfig(**_SMALL, num_key_value_heads=2)
    model = transformers.DiffLlamaForCausalLM(config)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="changes keys or values"):
        patch(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("thing", (nn.Linear(2, 2), "gpt2", None), ids=["module", "name", "none"])
def test_not_a_model(thing):
    with pytest.raises(TypeError, match=type(thing).__name__):
        patch(thing)


@pytest.mark.parametrize(
    ("recipe", "overrides", "error", "words"),
    [
        ("no-such-preset", {}, ValueError, "no-such-preset"),
        ("kv-compress", {"budget": 0.0}, ValueError, "budget"),
        ("kv-compress", {"budget": 1.01}, ValueError, "budget"),
        ("kv-compress", {"budget": -3}, ValueError, "budget"),
        ("kv-compress", {"budget": "12 parsecs"}, ValueError, "parsecs"),
        ("k8v4", {"tiers": "k9v9"}, ValueError, "k9v9"),
        ("k8v4", {"colour": "red"}, ValueError, "colour"),
        (7, {}, TypeError, "int"),
    ],
)
@pytest.mark.parametrize("already", (False, True))
def test_wrong_recipe(recipe, overrides, error, words, already, build_model, snapshot):
    model = build_model("llama")
    if already:
        patch(model, "lossless")
    before = snapshot(model)
    with pytest.raises(error, match=words):
        patch(model, recipe, **overrides)
    assert snapshot(model) == before


def test_page_size_too_small(build_model, prompt, run_generate):
    model = patch(build_model("llama"), "lossless")
    expected = run_generate(model, "greedy", 8)
    with pytest.raises(ValueError, match="page"):
        model.generate(prompt(), max_new_tokens=2, kvcompress={"tiers": "k8v4", "page_bytes": 64})
    assert torch.equal(run_generate(model, "greedy", 8), expected)


@pytest.mark.parametrize(("family", "route"), [("llama", "swap"), ("llama", "interface"), ("qwen3", "interface")])
@torch.no_grad()
def test_mask_of_another_width(family, route, build_model, prompt):
    model = patch(build_model(family), "lossless", route=route)
    ids = prompt(tokens=12)
    expected = model(ids, past_key_values=CompressedPagedCache(model.config, "lossless")).logits[:, -1]
    cache, other = (CompressedPagedCache(model.config, "lossless") for _ in range(2))
    for each in (cache, other):
        model(ids[:, :8], past_key_values=each)
    full_width = torch.ones(1, 1, 4, 12, dtype=torch.bool).tril(8)
    with pytest.raises(UnsupportedFeatureError, match="mask"):
        model(ids[:, 8:], attention_mask=full_width, past_key_values=cache)
    # The other cache goes on, and so does the one that was refused.
    for each in (other, cache):
        assert each.get_seq_length() == 8
        got = model(ids[:, 8:], past_key_values=each).logits[:, -1]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ("llama", "phi3"))
def test_cache_on_an_unpatched_model(family, build_model, prompt):
    model = build_model(family)
    with pytest.raises(UnsupportedFeatureError, match="patch"):
        model.generate(prompt(), max_new_tokens=4, **as_argument(model, CompressedPagedCache(model.config, "lossless")))


@pytest.mark.parametrize(("family", "route"), [("llama", "swap"), ("llama", "interface")])
def test_attention_dropout_in_training(family, route, build_model, prompt):
    model = patch(build_model(family, attention_dropout=0.1), "lossless", route=route).train()
    with pytest.raises(UnsupportedFeatureError, match="dropout"):
        model(prompt(), past_key_values=CompressedPagedCache(model.config, "lossless"))
    model(prompt(), labels=prompt()).loss.backward()  # without a compressed cache training goes on as always
    model.eval()
    model.generate(prompt(), max_new_tokens=2)


def test_arguments_with_a_meaning_are_refused():
    layer = nn.Linear(1, 1)
    check_call(layer, 0.0, {"position_ids": torch.zeros(1), "use_cache": True, "kwargs": {}, "position_bias": None})
    check_call(layer, 0.0, {"is_causal": True})
    for name, value in {
        "position_bias": torch.zeros(1, 1),
        "cu_seq_lens_q": torch.zeros(2),
        "is_causal": False,
        "indices": torch.zeros(1),
        "cache": object(),
        "some_new_argument": 3,
    }.items():
        with pytest.raises(UnsupportedFeatureError, match=name):
            check_call(layer, 0.0, {name: value})


@pytest.mark.parametrize("route", ("swap", "interface"))
def test_unknown_argument_of_a_forward(route, build_model, prompt):
    model = patch(build_model("llama"), "lossless", route=route)
    cache = CompressedPagedCache(model.config, "lossless")
    with pytest.raises(UnsupportedFeatureError, match="position_bias"), torch.no_grad():
        model(prompt(), past_key_values=cache, position_bias=torch.zeros(1))


class TestAttentionFunction:
    """The registered function itself, with keys and values that something has changed on the way."""

    @pytest.fixture
    def parts(self, build_model):
        model = build_model("qwen3")
        interface.register()
        cache = CompressedPagedCache(model.config, "lossless")
        query = torch.randn(1, 4, 5, 32)
        key, value = cache.update(torch.randn(1, 2, 5, 32), torch.randn(1, 2, 5, 32), 0)
        function = transformers.AttentionInterface()["kvcompress|sdpa"]
        return function, model.model.layers[0].self_attn, query, key, value

    def test_as_they_are(self, parts):
        function, module, query, key, value = parts
        output, weights = function(module, query, key, value, None, dropout=0.0, scaling=0.1)
        assert output.shape == (1, 5, 4, 32) and weights is None

    def test_value_changed(self, parts):
        function, module, query, key, value = parts
        with pytest.raises(UnsupportedFeatureError, match="changes keys or values"):
            function(module, query, key, value * 2, None, scaling=0.1)

    def test_key_changed(self, parts):
        function, module, query, key, value = parts
        with pytest.raises(UnsupportedFeatureError, match="changes keys or values"):
            function(module, query, key.clone(), value, None, scaling=0.1)

    def test_of_two_layers(self, parts):
        function, module, query, key, value = parts
        other = value.clone()
        other._kvc = KVHandle(value._kvc.cache, 1)
        with pytest.raises(UnsupportedFeatureError, match="changes keys or values"):
            function(module, query, key, other, None, scaling=0.1)

    def test_both_changed_is_noticed_at_the_next_token(self, parts):
        function, module, query, key, value = parts
        function(module, query, key.clone(), value.clone(), None, scaling=0.1)
        with pytest.raises(UnsupportedFeatureError):
            key._kvc.cache.update(key, value, 0)

    def test_dropout_passed_by_position(self, parts):
        function, module, query, key, value = parts
        function(module, query, key, value, None, 0.0, 0.1)

    def test_not_causal(self, parts):
        function, module, query, key, value = parts
        module.is_causal = False
        with pytest.raises(UnsupportedFeatureError, match="both directions"):
            function(module, query, key, value, None, scaling=0.1)
