"""What a patched model cannot compress, or cannot do right, is said."""

import warnings

import pytest
import torch
from transformers.cache_utils import DynamicCache

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import as_argument
from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.patches import patch, patched, prefill

ROUTES = [("llama", "swap"), ("qwen2", "interface")]


def _said(run):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in said if "kvcompress" in str(each.message)]


# -- nothing compressed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["config", "call"])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_stock_cache_asked_for_by_name_is_told_of_once(kind, where, build_model, prompt):
    model, more = patch(build_model("llama"), "k8v4", check=False), {}
    if where == "config":
        model.generation_config.cache_implementation = kind
    else:
        more = {"cache_implementation": kind}

    def run():
        return model.generate(prompt(), max_new_tokens=2, do_sample=False, disable_compile=True, **more)

    first = _said(run)
    assert len(first) == 1 and kind in first[0] and "cache_implementation" in first[0]
    assert _said(run) == []


@pytest.mark.parametrize(("family", "route"), ROUTES)
@pytest.mark.parametrize("use_cache", [None, True])
@pytest.mark.parametrize("inner", [False, True])
def test_a_loop_of_ones_own_is_told_of_once(inner, use_cache, family, route, build_model, prompt):
    model = patch(build_model(family), "k8v4", route=route, check=False)
    called = model.model if inner else model
    more = {} if use_cache is None else {"use_cache": use_cache}
    told = _said(lambda: called(prompt(), **more))
    assert len(told) == 1 and "CompressedPagedCache" in told[0] and "loop" in told[0]
    assert _said(lambda: called(prompt(), **more)) == []
    # Another model is another matter.
    assert len(_said(lambda: patch(build_model(family), check=False)(prompt()))) == 1


def test_what_was_meant_is_not_told_of(build_model, prompt):
    model, ids = patch(build_model("llama"), "k8v4"), prompt()
    given = DynamicCache(config=model.config)

    def run():
        model.generate(ids, max_new_tokens=2)
        model.generate(ids, max_new_tokens=2, **as_argument(model, given))
        model.generate(ids, max_new_tokens=2, use_cache=False)
        model.generate(ids, max_new_tokens=4, num_beams=2)
        model(ids, use_cache=False)
        model(ids, **as_argument(model, DynamicCache(config=model.config)))
        model(ids, **as_argument(model, CompressedPagedCache(model.config)))
        model.train()(ids, labels=ids)
        model.eval()

    assert _said(run) == []


# -- another attention implementation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "route"), ROUTES)
@pytest.mark.parametrize("name", ["flex_attention", "sdpa", "eager", "by hand"])
def test_an_implementation_set_after_patching(name, family, route, build_model, padded):
    model = build_model(family)
    arguments = {**padded, "max_new_tokens": 5, "do_sample": False}
    want = model.generate(**arguments)
    patch(model, "lossless", route=route, check=False)
    if name == "by hand":
        model.config._attn_implementation = "flash_attention_2"
    else:
        model.set_attn_implementation(name)
    past = prefill(build_model(family), padded["input_ids"][:, :3])
    if route == "swap" and name in ("sdpa", "eager"):
        assert torch.equal(model.generate(**arguments), want)
    else:
        for run in (
            lambda: model.generate(**arguments),
            lambda: model.generate(**arguments, kvcompress=past.fork()),
            lambda: model(padded["input_ids"], **as_argument(model, CompressedPagedCache(model.config))),
        ):
            with pytest.raises(UnsupportedFeatureError, match="after patching.*patch\\(model\\) again"):
                run()
        assert torch.equal(patch(model, "lossless").generate(**arguments), want)


# -- gradients ---------------------------------------------------------------------------------------------------------


def _gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(("family", "route"), ROUTES)
@pytest.mark.parametrize("recipe", ["lossless", "k8v4"])
@pytest.mark.parametrize("rest", [1, 8])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_behind_a_past_are_refused(mode, rest, recipe, family, route, build_model, prompt):
    model, ids = patch(build_model(family), recipe, route=route, check=False), prompt()
    cache = CompressedPagedCache(model.config, recipe)
    with mode():
        model(ids, **as_argument(model, cache))
    out = model(ids[:, :rest], **as_argument(model, cache))
    with pytest.raises(UnsupportedFeatureError, match="no gradients"):
        out.logits.sum().backward()
    with torch.no_grad():  # a loop without gradients goes on
        assert not model(ids[:, :1], **as_argument(model, cache)).logits.requires_grad


@pytest.mark.parametrize(("family", "route"), ROUTES)
@pytest.mark.parametrize("recipe", ["lossless", {"preset": "kv-compress", "budget": 0.25}])
def test_gradients_of_the_first_tokens_are_those_of_the_stock_model(recipe, family, route, build_model, padded):
    model = build_model(family).train()
    want = None
    for cache in (DynamicCache(config=model.config), CompressedPagedCache(model.config, recipe)):
        model.zero_grad()
        model(**padded, **as_argument(model, cache)).logits.pow(2).mean().backward()
        want = want or _gradients(model)
        patch(model, route=route, check=False)
    for got, stock in zip(_gradients(model), want, strict=True):
        torch.testing.assert_close(got, stock, rtol=1e-4, atol=1e-5)


def test_a_soft_prompt_in_the_past_of_a_frozen_model(build_model, prompt):
    """The new tokens themselves need no gradients: the loss would only miss those of the prompt."""
    model = patch(build_model("llama").requires_grad_(False), check=False)
    soft = torch.randn(1, 6, model.config.hidden_size, requires_grad=True)
    cache = CompressedPagedCache(model.config)
    first = model(inputs_embeds=soft, **as_argument(model, cache)).logits
    rest = model(prompt(), **as_argument(model, cache)).logits
    with pytest.raises(UnsupportedFeatureError, match="no gradients"):
        (first.sum() + rest.sum()).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_a_cache_is_refused(reentrant, build_model, prompt):
    model, ids = patch(build_model("llama"), "k8v4", check=False).train(), prompt()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with pytest.raises(UnsupportedFeatureError, match="checkpoints gradients"):
        model(ids, **as_argument(model, CompressedPagedCache(model.config)))
    # As GRPO does it: without gradients layers keep their cache.
    model.config.attention_dropout = 0.0
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)


# -- long rope ---------------------------------------------------------------------------------------------------------


def _long_rope(build_model, family):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    more = {"original_max_position_embeddings": 64} if family == "phi3" else {}
    return build_model(family, rope_parameters=rope, head_dim=16, hidden_size=64, **more)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize(("text", "new", "made"), [(50, 10, 3), (50, 10, 20), (50, 20, 5), (70, 5, 5), (50, 90, 5)])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("stored", [False, True])
def test_long_rope_factors_that_change(stored, padding, text, new, made, family, build_model, prompt, tmp_path):
    """By the whole text: right. By the new tokens alone: right, or refused where the factors change."""
    if (padding or stored) and family == "qwen2":
        pytest.skip("one family of a route is enough")
    model = patch(_long_rope(build_model, family), "lossless", check=False)
    ids = prompt(2, text + new)
    mask = torch.ones_like(ids)
    mask[0, :padding], ids[0, :padding] = 0, 0
    arguments = {"max_new_tokens": made, "do_sample": False}
    # The truth: every token made from a fresh cache.
    truth = ids
    for _ in range(made):
        full = torch.cat([mask, mask.new_ones(2, truth.shape[1] - ids.shape[1])], 1)
        more = {"max_new_tokens": 1, "do_sample": False}
        truth = model.generate(truth, attention_mask=full, **more)
    cache = prefill(model, ids[:, :text], attention_mask=mask[:, :text])
    if stored:
        cache.save(tmp_path / "cache")
        cache = CompressedPagedCache.load(tmp_path / "cache", model)
    if text == 50 and new == 20:
        with torch.no_grad(), pytest.raises(UnsupportedFeatureError, match="long rope"):
            model(ids[:, text:], attention_mask=mask, **as_argument(model, cache.fork()))
    whole = model.generate(ids, attention_mask=mask, kvcompress=cache.fork(), **arguments)
    assert torch.equal(whole, truth)
    crosses = text <= 64 < text + new + made - 1
    if crosses:
        with pytest.raises(UnsupportedFeatureError, match="long rope"):
            model.generate(ids[:, text:], attention_mask=mask, kvcompress=cache.fork(), **arguments)
    else:
        got = model.generate(ids[:, text:], attention_mask=mask, kvcompress=cache.fork(), **arguments)
        assert torch.equal(got[:, new:], truth[:, text + new :])


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_long_rope_elsewhere(family, build_model, prompt):
    model = patch(_long_rope(build_model, family), "lossless", check=False)
    for run in (
        lambda: prefill(model, prompt(tokens=80), chunk_size=30),
        lambda: model.generate(prompt(tokens=80), prefill_chunk_size=30, max_new_tokens=2),
    ):
        with pytest.raises(UnsupportedFeatureError, match="long rope"):
            run()
    cache = prefill(model, prompt(tokens=80))
    cache.reset()  # another text is another matter
    with torch.no_grad():
        model(prompt(tokens=20), **as_argument(model, cache))


# -- other weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_loop_learns_whose_its_cache_is(family, build_model, prompt):
    model = patch(build_model(family), check=False)
    cache = CompressedPagedCache(model.config)
    with torch.no_grad():
        model(prompt(), **as_argument(model, cache))
    assert cache.is_of(model) and not cache.is_of(build_model(family))
    with patched(build_model(family), check=False) as twin, torch.no_grad():  # the same weights, held by another object
        twin(prompt(), **as_argument(twin, cache))
    assert cache.is_of(twin)


# -- attention changed after patching ----------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_keys_that_no_attention_came_for_are_told_in_the_same_pass(family, route, last, build_model, prompt):
    """Somebody's own attention, put in after patching: it must not answer once from new tokens alone."""
    model = patch(build_model(family), "k8v4", route=route)
    layer = model.config.num_hidden_layers - 1 if last else 0
    attention = model.model.layers[layer].self_attn
    patched_forward = attention.forward

    def own(hidden_states, *args, **kwargs):
        cache = next(each for each in (*args, *kwargs.values()) if isinstance(each, CompressedPagedCache))
        states = hidden_states.new_zeros(1, 2, hidden_states.shape[1], attention.head_dim)
        cache.update(states, states, layer)
        return hidden_states, None

    cache = CompressedPagedCache(model.config, "k8v4")
    attention.forward = own
    try:
        with pytest.raises(UnsupportedFeatureError, match=f"Keys of layer {layer} .*never to its attention"):
            model(prompt(), use_cache=True, **as_argument(model, cache))
    finally:
        attention.forward = patched_forward
    assert cache.get_seq_length() == 0
    if not last and route == "swap":  # the last layer had ended the pass; by the interface the second layer notices
        with pytest.raises(RuntimeError, match=r"left out layers \[0\].*reset"):
            model(prompt(), use_cache=True, **as_argument(model, cache))
        cache.reset()
    model(prompt(), use_cache=True, **as_argument(model, cache))
    assert cache.get_seq_length() == prompt().shape[1]
