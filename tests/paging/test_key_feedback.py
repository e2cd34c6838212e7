"""How channels of rotated keys make good each other's errors: from queries to factors, and where factors go."""

import pytest
import torch

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument
from kvcompress_hf.kernels.quantize import dequantize, hadamard, quantize
from kvcompress_hf.paging.key_feedback import key_feedback
from kvcompress_hf.patches.second_reading import read_again


def peaked(tokens, batch=2, heads=4, dim=32, seed=0):
    """Queries that are large in three directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = 3 * torch.randn(3, dim, generator=generator)
    noise = torch.randn(batch, heads, tokens, dim, generator=generator)
    return torch.randn(batch, heads, tokens, 3, generator=generator) @ directions + 0.2 * noise


def logit_error(query, keys, feedback, bits):
    """Mean square error of the logits of quantised keys, `query` of one sequence and its one KV head."""
    turned = hadamard(keys, keys.shape[-1])
    codes, scale, offset, _ = quantize(turned, bits, feedback=feedback)
    noise = hadamard(dequantize(codes, scale, offset) - turned, keys.shape[-1])
    return float((query @ noise.T).square().mean())


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_logits_of_other_queries_of_the_same_kind_gain(bits, seed):
    query = peaked(600, batch=1, heads=2, seed=seed)
    keys = torch.randn(300, 32, generator=torch.Generator().manual_seed(seed))
    feedback = key_feedback(query[:, :, :400], 1)[0, 0].float()
    others = query[0, :, 400:].flatten(0, 1)
    with_feedback, alone = (logit_error(others, keys, how, bits) for how in (feedback, None))
    assert with_feedback < 0.4 * alone


def test_queries_alike_in_all_directions_leave_codes_as_good_as_they_were():
    query = torch.randn(1, 2, 600, 32, generator=torch.Generator().manual_seed(3))
    keys = torch.randn(300, 32, generator=torch.Generator().manual_seed(4))
    feedback = key_feedback(query[:, :, :400], 1)[0, 0].float()
    others = query[0, :, 400:].flatten(0, 1)
    assert logit_error(others, keys, feedback, 4) < 1.1 * logit_error(others, keys, None, 4)


def test_zero_factors_round_each_channel_for_itself():
    keys = torch.randn(50, 32, generator=torch.Generator().manual_seed(5))
    for got, wanted in zip(quantize(keys, 4, feedback=torch.zeros(2, 4, 32)), quantize(keys, 4), strict=True):
        assert torch.equal(got, wanted)


def test_padding_counts_for_nothing():
    short, long = peaked(100, batch=1), peaked(260, batch=1, seed=1)
    both = torch.cat([torch.nn.functional.pad(short, (0, 0, 160, 0), value=torch.nan), long])
    real = torch.ones(2, 260, dtype=torch.bool)
    real[0, :160] = False
    together = key_feedback(both, 2, real)
    for row, alone in enumerate((short, long)):
        torch.testing.assert_close(together[row], key_feedback(alone, 2)[0], atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    "query", [peaked(63), torch.zeros(2, 4, 200, 32)], ids=["few tokens", "no queries to speak of"]
)
def test_what_says_nothing_gives_no_feedback(query):
    feedback = key_feedback(query, 2)
    assert feedback.shape == (2, 2, 2, 4, 32) and feedback.dtype == torch.bfloat16
    assert (feedback[:, :, 0].float() * feedback[:, :, 1].float()).abs().max() < 1e-5


def test_queries_of_any_size_give_finite_factors():
    for size in (1e-12, 1e-3, 1e6):
        query = peaked(200) * size
        query[:, 0] = query[:, 0, :1]  # of one direction only
        assert key_feedback(query, 4).isfinite().all()


@pytest.fixture(scope="module")
def model(tiny_llama):
    return kvc.patch(tiny_llama(vocab_size=96, num_hidden_layers=2), "lossless")


@torch.no_grad()
def filled(model, recipe, count=90):
    cache = kvc.CompressedPagedCache(model.config, recipe)
    ids = torch.randint(3, 96, (2, count), generator=torch.Generator().manual_seed(0))
    model(ids, use_cache=True, **as_argument(model, cache))
    return cache


def test_it_is_settled_where_all_is_kept_in_few_bits_and_counted(model):
    for recipe in ("k8v4", "auto"):  # nothing to round so; better things to do with the room
        assert filled(model, recipe).inspect().stores[0].key_feedback is None
    cache = filled(model, "k4v4")
    feedback = cache.inspect().stores[0].key_feedback
    assert feedback.flatten(3).any(-1).all()  # of every layer, sequence and head
    assert cache.memory().metadata >= feedback.nbytes


@pytest.mark.parametrize("budget", [1 / 16, 1 / 4])  # keys enter a tier of 4 bits, or are lowered to one
def test_recipes_that_evict_round_prompts_so_and_forget_how(model, budget, monkeypatch):
    recipe = kvc.get_preset("auto").with_overrides(budget=budget)
    cache = filled(model, recipe, 400)
    with monkeypatch.context() as patched:
        patched.setattr(kvc.Recipe, "feeds_back", False)
        plain = filled(model, recipe, 400)
    (store,), (other,) = cache.inspect().stores, plain.inspect().stores
    assert store.key_feedback is None and cache.memory() == plain.memory()
    assert torch.equal(store.lengths, other.lengths) and int(store.lengths[1:].sum())
    assert not torch.equal(store.arena.slabs[0], other.arena.slabs[0])


@pytest.mark.parametrize("recipe", ["k4v4", "auto-kvzip"])  # the second lowers keys at its second reading
def test_a_saved_cache_comes_back_with_it(model, recipe, tmp_path):
    cache = filled(model, recipe)
    cache.save(tmp_path / "cache.safetensors")
    loaded = kvc.CompressedPagedCache.load(tmp_path / "cache.safetensors", model)
    assert torch.equal(loaded.inspect().stores[0].key_feedback, cache.inspect().stores[0].key_feedback)
    if cache.awaits_second_reading:
        read_again(model, loaded, torch.randint(3, 96, (2, 90), generator=torch.Generator().manual_seed(0)), None)
        assert loaded.inspect().stores[0].key_feedback is None
