"""What other cache libraries are known to get wrong, and several caches, models and threads at once."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cache_utils import DynamicCache

from kvcompress_hf import get_preset, presets
from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import as_argument, cache_of
from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.patches import last_run_report, patch, patched, prefill, unpatch

#: Presets that evict. `random` draws once for the whole batch, so a row depends on its neighbours by design.
EVICTING = sorted(name for name in presets() if get_preset(name).evicts and name != "random")
ROUTES = [("llama", "swap"), ("qwen3", "interface")]


def _left_padded(prompts, total):
    ids = torch.cat([torch.cat([torch.zeros(1, total - p.shape[1], dtype=torch.long), p], 1) for p in prompts])
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        mask[row, total - prompt.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


# -- padding -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(build_model):
    return build_model("llama", num_hidden_layers=2)


@pytest.mark.parametrize("preset", [*EVICTING, "k8v4", "k4v2"])
def test_a_padded_row_is_what_it_is_alone(preset, plain, prompt):
    """Tokens, and which slots each head keeps, with the same budget per row."""
    prompts = [prompt(tokens=tokens, seed=tokens) for tokens in (200, 130, 64)]
    arguments = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    # At a fourth of float32, everything fits into the lower tiers of `auto` and `think`; budgets of papers are larger.
    budgets = {"auto": 0.15, "think": 0.15, "r-kv": 48, "triattention": 48}
    changes = {"budget": budgets[preset], "when": {"every": 8}} if preset in budgets else {}
    with patched(plain, preset, **changes):
        together = plain.generate(**_left_padded(prompts, 200), **arguments)
        for row, alone in enumerate(prompts):
            out = plain.generate(alone, attention_mask=torch.ones_like(alone), **arguments)
            assert torch.equal(together.sequences[row, 200:], out.sequences[0, alone.shape[1] :])
            for mine, theirs in zip(cache_of(together).slots(), cache_of(out).slots(), strict=True):
                assert torch.equal(mine[row], theirs[0])
    if get_preset(preset).budget is not None:
        assert sum(int(layer[0].sum()) for layer in cache_of(together).slots()) < 4 * 219


def test_padding_is_never_stored(plain, prompt):
    prompts = [prompt(tokens=tokens, seed=tokens) for tokens in (120, 30, 3)]
    with patched(plain, "lossless"):
        for chunk_size in (None, 16):
            out = plain.generate(
                **_left_padded(prompts, 120),
                max_new_tokens=5,
                do_sample=False,
                return_dict_in_generate=True,
                prefill_chunk_size=chunk_size,
            )
            for layer in cache_of(out).slots():
                assert layer.tolist() == [[124, 124], [34, 34], [7, 7]]


# -- chunks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ("kv-compress", "snapkv", "h2o", "roco", "streaming", "keydiff"))
def test_every_chunk_is_compressed(preset, plain, prompt):
    """Not the first alone: after each chunk the cache is within its budget, and never holds all that was seen."""
    ids, chunk, seen = prompt(tokens=600), 100, []

    def note(module, arguments, kwargs, output):
        cache = cache_of(output)
        if not isinstance(cache, CompressedPagedCache):  # the check of the patch
            return
        seen.append((cache.get_seq_length(), _mean(cache)))

    hook = plain.register_forward_hook(note, with_kwargs=True)
    try:
        prefill(plain, ids, preset, chunk_size=chunk, budget=100)
    finally:
        hook.remove()
    seen = [entry for entry in seen if entry[0] >= chunk]
    assert [tokens for tokens, _ in seen] == [100, 200, 300, 400, 500, 600]
    assert all(mean <= 110 for _, mean in seen[1:])


def _mean(cache):
    slots = torch.cat([layer.flatten() for layer in cache.slots()])
    return float(slots.float().mean())


# -- several at once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ("lossless", "k8v4", "kv-compress", "h2o"))
def test_two_live_caches_with_heads_of_uneven_length(preset, plain, prompt):
    """An older cache, longer or shorter, is not disturbed by what runs in between."""
    first, second, step = prompt(tokens=300, seed=2), prompt(tokens=90, seed=3), prompt(tokens=1, seed=4)
    with patched(plain, preset), torch.no_grad():
        expected = plain(step, past_key_values=prefill(plain, first)).logits
        kept = prefill(plain, first)
        other = prefill(plain, second)
        plain(step, past_key_values=other)
        assert torch.equal(plain(step, past_key_values=kept).logits, expected)


@pytest.mark.parametrize("routes", [("swap", "interface"), ("interface", "swap"), ("swap", "swap")])
@pytest.mark.parametrize("preset", ("lossless", "k8v4", "kv-compress"))
def test_a_cache_goes_from_one_patched_copy_to_another(routes, preset, plain, prompt):
    first, second = (patch(copy.deepcopy(plain), preset, route=route) for route in routes)
    turn, arguments = prompt(tokens=9, seed=3), {"max_new_tokens": 12, "do_sample": False}

    def two_turns(one, two):
        cache = CompressedPagedCache(one.config, preset)
        opening = one.generate(prompt(tokens=80), kvcompress=cache, **arguments)
        return two.generate(torch.cat([opening, turn], 1), kvcompress=cache, **arguments)

    assert torch.equal(two_turns(first, second), two_turns(first, first))


@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_four_threads_with_recipes_of_their_own(family, route, build_model, prompt):
    """One patched model; each thread has another recipe per call, and one reads a prompt in between."""
    model = patch(build_model(family), "lossless", route=route)
    recipes = ("lossless", "k8v4", "kv-compress", "h2o")

    def work(i):
        ids = prompt(1 + i % 2, 60 + 9 * i, seed=i)
        cache = prefill(model, ids[:, :40], recipes[i])
        said = model.generate(ids, kvcompress=cache, max_new_tokens=16, do_sample=False)
        fresh = model.generate(ids, kvcompress=recipes[i], max_new_tokens=16, do_sample=False)
        return torch.cat([said, fresh], 1)

    expected = [work(i) for i in range(4)]
    before = model._kvcompress_patch.recipe
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            for got, want in zip(pool.map(work, range(4)), expected, strict=True):
                assert torch.equal(got, want)
    assert model._kvcompress_patch.recipe is before


# -- taking back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ("lossless", "k8v8", "k8v4", "k2v2"))
@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_crop_leaves_the_right_length(family, route, preset, build_model, prompt):
    """Where a stock quantised cache keeps its old length, and fails: -4 after 3, 20 and 70 decoded tokens."""
    model = patch(build_model(family), preset, route=route)
    for decoded in (3, 20, 70):
        cache = CompressedPagedCache(model.config, preset)
        ids = model.generate(prompt(), kvcompress=cache, max_new_tokens=decoded + 1, do_sample=False)
        length = cache.get_seq_length()
        assert length == 40 + decoded
        cache.crop(-4)
        assert cache.get_seq_length() == length - 4
        assert {int(count) for layer in cache.slots() for count in layer.flatten()} == {length - 4}
        assert cache.get_mask_sizes(3, 0) == (3, length - 4)
        rest = ids[:, : length - 3]
        again = model.generate(
            rest, attention_mask=torch.ones_like(rest), kvcompress=cache, max_new_tokens=4, do_sample=False
        )
        if preset == "lossless":
            assert torch.equal(again, ids[:, : length + 1])


# -- leaving nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ("llama", "mistral", "qwen3", "gemma2", "gemma3n", "gpt-oss", "phi3-longrope"))
def test_unpatch_is_bit_identical(family, build_model, padded):
    """Logits of the stock cache to the last bit, forwards and types of all modules, and the generation config."""
    model = build_model(family)

    def run():
        out = model.generate(
            **padded,
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **as_argument(model, DynamicCache(config=model.config)),
        )
        return torch.stack(out.logits)

    def state():
        return (
            [
                (name, type(module), type(module).forward, "forward" in vars(module))
                for name, module in model.named_modules()
            ],
            sorted(vars(model)),
            sorted(vars(model.generation_config)),
            model.generation_config.to_dict(),
            sorted(vars(model.config)),
            model.config.to_dict(),
        )

    logits, before = run(), state()
    patch(model, "kv-compress", budget=0.5)
    model.generate(**padded, max_new_tokens=3, kvcompress={"tiers": "k8v4"})
    prefill(model, padded["input_ids"])
    assert last_run_report(model) is not None
    unpatch(model)
    assert state() == before
    assert torch.equal(run(), logits)


def test_a_forward_hook_that_fails_leaves_a_usable_model(plain, prompt):
    """An interrupted call: the model stays patched, the next call has a fresh cache."""
    with patched(plain, "k8v4"):
        expected = plain.generate(prompt(), max_new_tokens=8, do_sample=False)
        steps = []

        def stop(*_):
            steps.append(1)
            if len(steps) == 4:
                raise KeyboardInterrupt

        hook = plain.model.layers[1].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            plain.generate(prompt(), max_new_tokens=8, do_sample=False)
        hook.remove()
        assert torch.equal(plain.generate(prompt(), max_new_tokens=8, do_sample=False), expected)


def test_a_first_forward_that_stops_half_way_is_not_taken_for_a_past(plain, prompt):
    ids = prompt()
    with patched(plain, "k8v4"), torch.no_grad():
        expected = plain(ids, past_key_values=CompressedPagedCache(plain.config, "k8v4")).logits
        cache = CompressedPagedCache(plain.config, "k8v4")

        def stop(*_):
            raise KeyboardInterrupt

        hook = plain.model.layers[0].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            plain(ids, past_key_values=cache)
        hook.remove()
        with pytest.raises(RuntimeError, match="layer 1 has not seen the first 40 tokens"):
            plain(ids[:, :1], past_key_values=cache)
        assert cache.get_seq_length() == 0 and cache.memory().total == 0
        assert torch.equal(plain(ids, past_key_values=cache).logits, expected)


BATCHED = {
    "generation_config": GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0),
    # Else it takes most of the machine's memory.
    "continuous_batching_config": ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64),
}


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_continuous_batching_says_that_it_cannot(family, build_model, prompt):
    """Elsewhere its thread dies and an empty answer comes back."""
    model = patch(build_model(family), "k8v4", route="interface")
    for start in (
        lambda: model.generate_batch([prompt()[0].tolist()], **BATCHED),
        lambda: model.init_continuous_batching(**BATCHED),
    ):
        with pytest.raises(UnsupportedFeatureError, match=r"has a paged cache of its own.*unpatch\(model\)"):
            start()
    out = model.generate(prompt(), max_new_tokens=2, return_dict_in_generate=True)
    assert isinstance(cache_of(out), CompressedPagedCache)


def test_continuous_batching_of_swapped_modules_is_that_of_the_stock_model(build_model, prompt):
    texts = [prompt()[0].tolist(), prompt()[0, :9].tolist()]

    def answers(model):
        done = model.generate_batch(texts, **BATCHED)
        return sorted(each.generated_tokens for each in done.values())

    expected = answers(build_model("llama"))
    assert [len(each) for each in expected] == [3, 3]
    model = patch(build_model("llama"), "k2v2", route="swap")
    with pytest.warns(UserWarning, match="compresses nothing here: continuous batching"):
        assert answers(model) == expected
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compresses nothing")
        assert answers(model) == expected  # said once
    unpatch(model)
    assert answers(model) == expected and "init_continuous_batching" not in model.__dict__
