"""One model in several threads: patched, unpatched and used by all of them at once, in any order."""

import contextvars
import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.cache_utils import DynamicCache

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import as_argument, cache_of
from kvcompress_hf.errors import UnsupportedFeatureError, UnsupportedModelError
from kvcompress_hf.patches import is_patched, patch, patched, prefill, unpatch
from kvcompress_hf.patches.generation import record_of

ROUTES = [("llama", "swap"), ("qwen2", "interface")]
RECIPES = ["lossless", "k8v4", "k4v4", "k4v2"]


def _answer(model, ids, **more):
    return model.generate(ids, max_new_tokens=6, do_sample=False, **more)


def _recipe(model, ids):
    """The recipe of the cache that a call makes, `None` for a stock cache."""
    out = model.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    cache = cache_of(out)
    return cache.recipe.name if isinstance(cache, CompressedPagedCache) else None


def _at_once(count, run):
    with ThreadPoolExecutor(count) as pool:
        return [future.result(timeout=120) for future in [pool.submit(run, i) for i in range(count)]]


@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_every_thread_has_the_recipe_of_its_own_block(family, route, build_model, prompt, snapshot):
    model = build_model(family)
    before, meet, ids = snapshot(model), threading.Barrier(4, timeout=60), prompt()
    want = [None] * len(RECIPES)
    for i, recipe in enumerate(RECIPES):
        with patched(model, recipe, route=route):
            want[i] = _answer(model, ids).tolist()

    def run(i):
        with patched(model, RECIPES[i], route=route):
            meet.wait()
            return _recipe(model, ids), _answer(model, ids).tolist()

    assert _at_once(4, run) == [(recipe, want[i]) for i, recipe in enumerate(RECIPES)]
    assert not is_patched(model) and snapshot(model) == before


@pytest.mark.parametrize(("family", "route"), ROUTES)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
@pytest.mark.parametrize("over", [False, True])
def test_blocks_are_left_in_any_order(over, order, family, route, build_model, prompt, snapshot):
    model = build_model(family)
    if over:
        patch(model, "k2v2", route=route)
    before, ids = snapshot(model), prompt()
    blocks = [patched(model, recipe, route=route, check=False) for recipe in RECIPES[:3]]
    for block in blocks:
        block.__enter__()
    left = list(range(3))
    for i in order:
        assert _recipe(model, ids) == RECIPES[left[-1]]
        blocks[i].__exit__(None, None, None)
        left.remove(i)
    assert _recipe(model, ids) == ("k2v2" if over else None)
    assert snapshot(model) == before


def test_a_block_may_be_left_by_another_thread(build_model, snapshot):
    model = build_model("llama")
    before, block = snapshot(model), patched(model, "k8v4", check=False)
    block.__enter__()
    _at_once(1, lambda _: block.__exit__(None, None, None))
    assert not is_patched(model) and snapshot(model) == before


def test_threads_outside_of_a_block(build_model, prompt):
    model, ids = build_model("llama"), prompt()
    with patched(model, "k8v4", check=False):
        # As TextIteratorStreamer wants it: the thread is started inside the block.
        assert _at_once(1, lambda _: _recipe(model, ids)) == ["k8v4"]
    patch(model, "k4v4", check=False)
    with patched(model, "k8v4"):
        assert _at_once(1, lambda _: _recipe(model, ids)) == ["k4v4"]
        context = contextvars.copy_context()
        assert _at_once(1, lambda _: context.run(_recipe, model, ids)) == ["k8v4"]
        # A patch of another thread's outlives the block.
        _at_once(1, lambda _: patch(model, "k2v2"))
        assert _recipe(model, ids) == "k8v4"
    assert _recipe(model, ids) == "k2v2"


def test_unpatch_of_another_thread_waits_for_the_blocks(build_model, prompt, snapshot):
    model, ids = build_model("llama"), prompt()
    before = snapshot(model)
    patch(model, "k4v4", check=False)
    with patched(model, "k8v4"):
        _at_once(1, lambda _: unpatch(model))
        assert _recipe(model, ids) == "k8v4"
        unpatch(model)  # the block's own thread ends it
        assert not is_patched(model) and _recipe(model, ids) is None
        # and may open another one
        with patched(model, "k4v2", check=False):
            assert _recipe(model, ids) == "k4v2"
    assert snapshot(model) == before


@pytest.mark.parametrize("how", ["patch", "patched", "prefill"])
@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_first_requests_arrive_together(how, family, route, build_model, prompt, snapshot):
    """Each is slow inside of the dry run, while the others are let in wherever they can be."""
    model, ids = build_model(family), prompt()
    want, before = _answer(model, ids), snapshot(model)
    handle = model.register_forward_pre_hook(lambda module, args: time.sleep(0.002))

    def run(i):
        if how == "patch":
            return _answer(patch(model, "lossless", route=route), ids)
        if how == "prefill":
            cache = prefill(model, ids[:, :-3], "lossless")
            with patched(model, "lossless", route=route):
                return _answer(model, ids, kvcompress=cache)
        with patched(model, "lossless", route=route):
            return _answer(model, ids)

    for got in _at_once(3, run):
        assert torch.equal(got, want)
    handle.remove()
    assert is_patched(model) is (how == "patch")
    assert torch.equal(_answer(unpatch(model), ids), want)
    assert snapshot(model) == before


@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_others_go_on_while_a_model_is_patched_and_unpatched(family, route, build_model, prompt):
    """With their own stock cache, with none, and by `generate`: the tokens are always stock's."""
    model, ids, stop = build_model(family), prompt(), threading.Event()
    want = _answer(model, ids)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits

    def others(i):
        rounds = 0
        while not stop.is_set() or not rounds:
            if i == 0:
                with torch.no_grad():
                    torch.testing.assert_close(model(ids, use_cache=False).logits, logits)
            else:
                more = as_argument(model, DynamicCache(config=model.config)) if i == 1 else {}
                try:
                    assert torch.equal(_answer(model, ids, **more), want)
                except UnsupportedFeatureError as error:  # begun while patched, by another, and that patch is gone
                    assert i == 2 and "not patched" in str(error)
            rounds += 1
        return rounds

    def patching(i):
        try:
            for _ in range(4):
                with patched(model, "lossless", route=route):
                    assert torch.equal(_answer(model, ids), want)
        finally:
            stop.set()

    _at_once(4, lambda i: patching(i) if i == 3 else others(i))
    assert not is_patched(model)


def test_a_refused_patch_leaves_the_blocks_of_others(build_model, prompt, monkeypatch):
    model, ids = build_model("llama"), prompt()
    with patched(model, "k8v4"):
        with monkeypatch.context() as broken:
            broken.setattr(
                "kvcompress_hf.patches.core.check_dry_run",
                lambda *a: (_ for _ in ()).throw(UnsupportedModelError("no")),
            )
            with pytest.raises(UnsupportedModelError):
                patch(model, "k4v4", route="interface")
            _at_once(1, lambda _: patch(model, "k2v2", route="interface"))  # the route stays: nothing to check
        assert record_of(model).route == "swap" and _recipe(model, ids) == "k8v4"
    assert record_of(model).route == "swap" and _recipe(model, ids) == "k2v2"


@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_a_pass_under_which_the_patch_is_taken_off_stops(family, route, build_model, prompt):
    model, ids = build_model(family), prompt()
    cache = prefill(patch(model, "lossless", route=route), ids)
    layers = model.model.layers
    handle = layers[0].register_forward_hook(lambda *a: unpatch(model) and None)
    with torch.no_grad(), pytest.raises(UnsupportedFeatureError, match="not patched"):
        model(ids[:, :2], use_cache=True, **as_argument(model, cache))
    handle.remove()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_that_is_not_patched_stops_in_the_same_pass(family, build_model, prompt):
    model, ids = build_model(family), prompt()
    cache = prefill(model, ids)
    with torch.no_grad(), pytest.raises(UnsupportedFeatureError, match="not patched"):
        model(ids[:, :2], use_cache=True, **as_argument(model, cache))


def test_unpatch_inside_of_nested_blocks(build_model, prompt, snapshot):
    model, ids = build_model("llama"), prompt()
    patch(model, "k2v2", check=False)
    with patched(model, "k8v4"):
        with patched(model, "k4v4"):
            unpatch(model)
            assert not is_patched(model)
        assert _recipe(model, ids) == "k8v4"
    assert _recipe(model, ids) == "k2v2"
    outer, inner = patched(model, "k8v4"), patched(model, "k4v4")
    outer.__enter__(), inner.__enter__()
    unpatch(model)
    outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert _recipe(model, ids) == "k2v2"
    unpatch(model)
    assert not is_patched(model)


def test_a_copy_made_inside_a_block_stays_patched(build_model, prompt):
    model = build_model("llama")
    with patched(model, "k8v4", check=False):
        twin = copy.deepcopy(model)
    assert _recipe(twin, prompt()) == "k8v4" and not is_patched(model)
    unpatch(twin)
    assert _recipe(twin, prompt()) is None
