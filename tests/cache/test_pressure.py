"""A cache at its max_bytes: it compresses harder, and when that is not enough it says so and stays usable."""

import pytest
import torch

import kvcompress_hf as kvc


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama()


def ids(tokens, batch=1):
    return torch.randint(3, 64, (batch, tokens), generator=torch.Generator().manual_seed(1))


def page_bytes(cache):
    return sum(arena.nbytes for arena in cache.inspect().arenas)


def feed(model, cache, tokens, chunk):
    with torch.no_grad():
        for part in tokens.split(chunk, dim=1):
            yield model(part, past_key_values=cache, use_cache=True).logits


LIMIT = 192 * 1024
# Recipes whose own budget would never bite here: only pressure does.
GENEROUS = {
    "kv-compress": {"budget": 100_000},
    "h2o": {"budget": 100_000},
    "ada-snapkv": {"budget": 100_000, "observer": {"decode": True}, "when": {"decode": True, "every": 16}},
    "roco": {"budget": "1GiB"},
    "leankv": {},
    "auto": {"budget": "1GiB"},
    "scissorhands": {"budget": 1.0},
}


@pytest.mark.parametrize("preset", GENEROUS)
@pytest.mark.parametrize("batch", [1, 3])
def test_it_compresses_harder_instead_of_growing(model, preset, batch):
    tokens = ids(480, batch)
    limit = int(LIMIT * batch * {"leankv": 0.5, "auto": 0.55}.get(preset, 1))
    changes = GENEROUS[preset]
    with kvc.patched(model, preset, **changes):
        free = kvc.CompressedPagedCache(model.config, kvc.get_preset(preset).with_overrides(**changes))
        tight = kvc.CompressedPagedCache(model.config, free.recipe, max_bytes=limit)
        for _ in feed(model, free, tokens, 40):
            pass
        for step in feed(model, tight, tokens, 40):
            assert page_bytes(tight) <= limit and step.isfinite().all()
        assert page_bytes(free) > limit or preset == "leankv"  # its thresholds alone leave less than that here
        assert page_bytes(tight) > 0.5 * limit  # it is used, not emptied
        for step in feed(model, tight, ids(70, batch), 1):
            assert page_bytes(tight) <= limit and step.isfinite().all()
    assert tight.get_seq_length() == 550


def test_nothing_changes_below_the_limit(model):
    outputs = []
    for limit in (None, "64MiB"):
        with kvc.patched(model, "kv-compress", budget=64):
            cache = kvc.CompressedPagedCache(model.config, kvc.get_preset("kv-compress"), max_bytes=limit)
            outputs.append(torch.cat(list(feed(model, cache, ids(200), 50)), dim=1))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("chunk", [40, 1])
def test_when_all_is_protected_it_says_so_and_the_cache_stays_usable(model, chunk):
    recipe = kvc.get_preset("h2o").with_overrides(protect={"recent": 600}, budget=1000)
    tokens = ids(800)
    with kvc.patched(model, recipe):
        cache = kvc.CompressedPagedCache(model.config, recipe, max_bytes=LIMIT)
        steps = [40, *[chunk] * (760 // chunk)]
        position = 0
        with pytest.raises(kvc.CacheMemoryError, match="max_bytes"), torch.no_grad():
            for count in steps:
                model(tokens[:, position : position + count], past_key_values=cache, use_cache=True)
                position += count
        assert position > 80 and cache.get_seq_length() == position  # as before the failed pass
        fork = cache.fork()
        reference = kvc.CompressedPagedCache(model.config, recipe)
        with torch.no_grad():
            for part in tokens[:, :position].split([40, *[chunk] * ((position - 40) // chunk)], dim=1):
                model(part, past_key_values=reference, use_cache=True)
            # What it holds is whole: the same next token as a cache that never met a limit.
            last = tokens[:, position : position + 1]
            fork._attention.max_bytes = None
            for arena in fork.inspect().arenas:
                arena.max_bytes = None
            expected = model(last, past_key_values=reference, use_cache=True).logits
            torch.testing.assert_close(model(last, past_key_values=fork, use_cache=True).logits, expected)


def test_a_recipe_without_a_plan_only_says_so(model):
    with kvc.patched(model, "k8v4"):
        cache = kvc.CompressedPagedCache(model.config, "k8v4", max_bytes=LIMIT)
        with pytest.raises(kvc.CacheMemoryError):
            for _ in feed(model, cache, ids(2000), 100):
                pass
        assert 0 < cache.get_seq_length() < 2000 and page_bytes(cache) <= LIMIT
