"""The seam to transformers: caches are found by type, under any name, and nothing is lost on the way."""

import logging
import time
import warnings

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

import kvcompress_hf as kvc
from kvcompress_hf import compat
from kvcompress_hf.compat import as_argument, cache_argument, find_cache, generate_argument, move_cache
from kvcompress_hf.errors import UnsupportedFeatureError, UnsupportedModelError
from kvcompress_hf.patches import generation, is_patched, patch, prefill, swap, unpatch
from kvcompress_hf.patches.generation import record_of

NAMES = ("cache", "past_key_values")
BOTH = [("llama", "swap"), ("llama", "interface"), ("gemma2", "interface")]


def lossless(model):
    return kvc.CompressedPagedCache(model.config, "lossless")


@pytest.fixture
def no_future_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        yield


# -- both names, on every supported version ----------------------------------------------------------------------------


@pytest.mark.usefixtures("no_future_warnings")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("family", "route"), BOTH)
@torch.no_grad()
def test_forward_takes_the_cache_under_either_name(family, route, name, build_model, prompt):
    model, ids = build_model(family), prompt()
    expected = model(ids).logits[:, -1]
    patch(model, "lossless", route=route)
    for inner in (model, model.model):  # a part of the model called by itself is no way around
        cache = lossless(model)
        inner(ids[:, :30], **{name: cache})
        inner(ids[:, 30:35], cache=cache, past_key_values=None)
        out = inner(ids[:, 35:], cache=None, past_key_values=cache)
        assert cache.get_seq_length() == ids.shape[1] and kvc.cache_of(out) is cache
    cache = lossless(model)
    model(ids[:, :30], **{name: cache})
    torch.testing.assert_close(model(ids[:, 30:], **{name: cache}).logits[:, -1], expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")  # of the caller's own old name
@pytest.mark.parametrize("name", (*NAMES, "kvcompress"))
@pytest.mark.parametrize(("family", "route"), BOTH)
def test_generate_takes_the_cache_under_any_name(family, route, name, build_model, run_generate):
    model = build_model(family)
    expected = run_generate(model, "greedy", 12)
    patch(model, "k2v2", route=route)
    cache = lossless(model)
    out = run_generate(model, "greedy", 12, return_dict_in_generate=True, **{name: cache})
    assert torch.equal(out.sequences, expected) and kvc.cache_of(out) is cache


@pytest.mark.usefixtures("no_future_warnings")
@pytest.mark.parametrize("mode", ("greedy", "chunked", "lookup", "assisted", "beams"))
@pytest.mark.parametrize("route", ("swap", "interface"))
def test_our_own_calls_are_not_deprecated(route, mode, build_model, run_generate, prompt):
    model = patch(build_model("llama"), "auto", budget=1 / 2, route=route)
    run_generate(model, mode, 8)
    prefill(model, prompt(), "auto", chunk_size=16)
    kvc.perplexity(model, prompt(), "k8v4", stride=8)


@pytest.mark.parametrize(("family", "route"), BOTH)
@torch.no_grad()
def test_two_caches_in_one_call(family, route, build_model, prompt):
    model = patch(build_model(family), "lossless", route=route)
    for other in (DynamicCache(config=model.config), lossless(model)):
        mine = lossless(model)
        for first, second in (NAMES, NAMES[::-1]):
            with pytest.raises(ValueError, match=r"One call has one cache.*CompressedPagedCache as `.*` and a"):
                model(prompt(), **{first: mine, second: other})
        with pytest.raises(ValueError, match="One call has one cache"):
            model.generate(prompt(), max_new_tokens=2, kvcompress=mine, **as_argument(model, other))
        assert mine.get_seq_length() == other.get_seq_length() == 0
    same = lossless(model)
    model(prompt(), cache=same, past_key_values=same)
    assert same.get_seq_length() == prompt().shape[1]


@pytest.mark.parametrize(("family", "route"), BOTH)
@torch.no_grad()
def test_foreign_caches_are_left_alone(family, route, build_model, prompt):
    model = build_model(family)
    expected = model(prompt()).logits
    patch(model, "k2v2", route=route)
    for theirs in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)):
        out = model(prompt(), **as_argument(model, theirs))
        assert kvc.cache_of(out) is theirs and int(theirs.get_seq_length()) == prompt().shape[1]
        torch.testing.assert_close(out.logits, expected)
    arguments = {"cache": object(), "past_key_values": None}
    assert move_cache("past_key_values", kvc.CompressedPagedCache, (), arguments) is arguments


def test_kvcompress_takes_no_other_cache(build_model, prompt):
    model = patch(build_model("llama"), "lossless")
    with pytest.raises(TypeError, match="DynamicCache"):
        model.generate(prompt(), max_new_tokens=2, kvcompress=DynamicCache(config=model.config))


# -- what comes out ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_cache_of_any_output(build_model, prompt):
    model = patch(build_model("llama"), "k8v4")
    cache = lossless(model)
    past = as_argument(model, cache)
    assert kvc.cache_of(model(prompt(), **past)) is cache
    assert kvc.cache_of(model(prompt(), return_dict=False, **past)) is cache
    assert kvc.cache_of(dict(model(prompt(), **past))) is cache
    out = model.generate(prompt(), max_new_tokens=2, return_dict_in_generate=True, num_beams=2)
    assert isinstance(kvc.cache_of(out), kvc.CompressedPagedCache)
    with pytest.raises(TypeError, match="return_dict_in_generate"):
        kvc.cache_of(out.sequences)
    with pytest.raises(ValueError, match="use_cache=False"):
        kvc.cache_of(model(prompt(), use_cache=False))


def test_repr_is_cheap(build_model, prompt, monkeypatch):
    """transformers formats both caches into a warning at every call that is given two names."""
    model = build_model("llama")
    cache = prefill(model, prompt(2, 64), "k4v2")
    assert repr(cache) == "CompressedPagedCache(recipe='k4v2', layers=3, batch=2, tokens=64)"
    monkeypatch.setattr(kvc.CompressedPagedCache, "memory", None)
    monkeypatch.setattr(kvc.CompressedPagedCache, "slots", None)
    start = time.perf_counter()
    for _ in range(1000):
        repr(cache)
    assert time.perf_counter() - start < 1


# -- names by signature ------------------------------------------------------------------------------------------------


class OldName(LlamaForCausalLM):
    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        return super().forward(input_ids, **as_argument(super(), past_key_values), **kwargs)


class NewName(LlamaForCausalLM):
    def forward(self, input_ids=None, cache=None, **kwargs):
        return super().forward(input_ids, **as_argument(super(), cache), **kwargs)


class NoName(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("kind", (OldName, NewName, NoName))
def test_classes_that_name_the_cache_themselves(kind, build_model, run_generate, snapshot):
    """Under a name that `generate` does not use, the cache is lost on the stock model too: refused, with the reason."""
    model = kind(build_model("llama").config).eval()
    own = {OldName: "past_key_values", NewName: "cache", NoName: generate_argument()}[kind]
    assert cache_argument(model) == own
    if own == generate_argument():
        expected = run_generate(model, "greedy", 6)
        assert torch.equal(run_generate(patch(model, "lossless"), "greedy", 6), expected)
        return
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=f"takes the cache as {own}.*as {generate_argument()}"):
        patch(model)
    assert snapshot(model) == before and not is_patched(model)


# -- falling back, and failing closed ----------------------------------------------------------------------------------


class Broken(Exception):
    pass


def _raise(*args, **kwargs):
    raise Broken("on purpose")


@pytest.mark.parametrize("target", ("raises", "forward", "wrong"))
def test_a_broken_swap_route_falls_back(target, build_model, run_generate, monkeypatch, caplog):
    model = build_model("llama")
    expected = [run_generate(model, mode, 16) for mode in ("greedy", "chunked", "beams", "lookup")]
    if target == "forward":
        monkeypatch.setattr(swap.PagedForward, "forward", _raise)
    else:
        replaced = {"raises": _raise, "wrong": lambda module, cache, states, *rest: (states, None)}[target]
        monkeypatch.setattr(swap, "_paged_attention", replaced)
    compat.logging.get_logger("kvcompress_hf.patches.core").warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, "kvcompress_hf"):
        patch(model, "lossless")
        unpatch(model)
        patch(model, "lossless")
    told = [record.getMessage() for record in caplog.records if "interface" in record.getMessage()]
    assert len(told) == 1 and "LlamaForCausalLM" in told[0] and "\n" not in told[0]
    assert record_of(model).route == "interface"
    got = [run_generate(model, mode, 16) for mode in ("greedy", "chunked", "beams", "lookup")]
    assert all(torch.equal(ours, stock) for ours, stock in zip(got, expected, strict=True))
    unpatch(model)
    with pytest.raises(UnsupportedModelError):
        patch(model, "lossless", route="swap")  # asked for by name, it is not replaced by another
    assert not is_patched(model)


@pytest.mark.parametrize("method", ("_prefill", "_get_candidate_generator"))
@pytest.mark.parametrize("route", ("swap", "interface"))
def test_a_cache_that_vanished_is_an_error(route, method, build_model, prompt, monkeypatch):
    model = patch(build_model("llama"), "lossless", route=route)
    wrapper = getattr(generation, method)

    def losing(*args, **kwargs):
        for arguments in (*args, *kwargs.values()):
            if isinstance(arguments, dict) and find_cache(arguments) is not None:
                arguments.pop(generate_argument())
        return wrapper(*args, **kwargs)

    monkeypatch.setitem(model.__dict__, method, lambda *args, **kwargs: losing(model, *args, **kwargs))
    lookup = {} if method == "_prefill" else {"prompt_lookup_num_tokens": 2}
    with pytest.raises(UnsupportedFeatureError, match="lost it"):
        model.generate(prompt(), max_new_tokens=4, do_sample=False, **lookup)


def test_a_model_that_makes_caches_of_its_own_is_told_so(build_model, prompt, monkeypatch):
    model = patch(build_model("llama"), "lossless")

    def own(self, generation_config, model_kwargs, *args):
        model_kwargs[generate_argument()] = StaticCache(config=self.config, max_cache_len=64)

    monkeypatch.setattr(type(model), "_prepare_cache_for_generation", own)
    with pytest.raises(UnsupportedFeatureError, match="StaticCache"):
        model.generate(prompt(), max_new_tokens=2)


def test_unpatch_removes_the_hooks(build_model):
    model = build_model("llama")
    patch(model)
    assert all(len(part._forward_pre_hooks) == 1 for part in (model, model.model))
    unpatch(model)
    for part in model.modules():
        assert not part._forward_pre_hooks and not part._forward_pre_hooks_with_kwargs


# -- the installed version ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("5.23.0", True),
        ("5.24.1", True),
        ("5.18.9", False),
        ("5.25.0", False),
        ("5.24.0.dev0", False),
        ("6.0.0", False),
    ],
)
def test_the_tested_window(version, tested):
    assert compat.is_tested(version) is tested
