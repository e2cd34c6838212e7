"""With the `lossless` recipe a patched model says what the stock model says, in every family and way of generating."""

import functools

import pytest
import torch
from transformers.cache_utils import DynamicCache

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import as_argument, cache_of, find_cache
from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.paging.store import PagedStore
from kvcompress_hf.patches import patch, patched

# (family, route, new tokens)
LONG = [
    ("llama", "swap", 256),
    ("llama", "interface", 256),
    ("mistral", "swap", 256),
    ("mistral", "interface", 64),
    ("qwen2", "interface", 64),
    ("qwen3", "interface", 64),
    ("gemma2", "interface", 64),
    ("phi3", "interface", 64),
]
FAMILIES = (
    "llama",
    "llama-mha",
    "mistral",
    "mistral-full",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "gemma2",
    "gemma3",
    "gemma3n",
    "gemma4",
    "phi3",
    "phi3-longrope",
    "gpt-oss",
    "phimoe",
    "cohere2",
    "starcoder2",
    "mixtral",
    "qwen3-moe",
    "granite",
    "olmo2",
    "smollm3",
    "glm4",
    "stablelm",
    "gpt-neox",
    "exaone4",
    "gpt2",
)
MODES = (
    "greedy",
    "padded",
    "chunked",
    "beams",
    "sampling",
    "returned",
    "lookup",
    "assisted",
    "early-exit",
    "streamed",
    "stopped",
    "guided",
    "embeddings",
    "continued",
    "continued-new",
    "prefix-beams",
)
# Their stock models fail with fewer layers than they were made with.
NO_EARLY_EXIT = {"cohere2", "exaone4", "gemma3n", "gemma4", "gpt-neox", "gpt-oss", "gpt2", "stablelm"}
# Their factors change while generate() has no ids of the whole text; stock goes on and mixes the two kinds of keys.
REFUSED = {("phi3-longrope", "embeddings"), ("phi3-longrope", "continued-new")}
# Stock verifies drafts across the border with keys of both kinds, and its tokens are not its own greedy ones.
AS_GREEDY = {("phi3-longrope", "assisted")}
GRID = [
    (family, "auto", mode)
    for family in FAMILIES
    for mode in MODES
    if (mode != "early-exit" or family not in NO_EARLY_EXIT) and (family, mode) not in REFUSED | AS_GREEDY
] + [(family, "interface", mode) for family in ("llama", "mistral") for mode in MODES]


@pytest.fixture(scope="module")
def stock(build_model, run_generate):
    """What the stock model of a family generates, computed once."""

    @functools.cache
    def tokens(family: str, mode: str, new_tokens: int) -> torch.Tensor:
        return run_generate(build_model(family), mode, new_tokens)

    return tokens


@pytest.fixture(scope="module")
def lossless(build_model):
    """A patched model of a family, made once per route."""

    @functools.cache
    def model(family: str, route: str):
        return patch(build_model(family), "lossless", route=route)

    return model


@pytest.mark.parametrize(("family", "route", "mode"), GRID)
def test_same_tokens(family, route, mode, stock, lossless, run_generate):
    assert torch.equal(run_generate(lossless(family, route), mode, 12), stock(family, mode, 12))


@pytest.mark.parametrize("family", sorted(family for family, _ in AS_GREEDY))
def test_drafts_do_not_change_the_tokens(family, build_model, lossless):
    patched_model = lossless(family, "auto")
    ids = torch.randint(3, 160, (1, 40), generator=torch.Generator().manual_seed(2))
    arguments = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = build_model(family).generate(ids, **arguments)
    assert torch.equal(patched_model.generate(ids, assistant_model=patched_model, **arguments), expected)


@pytest.mark.parametrize(("family", "mode"), sorted(REFUSED))
def test_refused_in_words(family, mode, lossless, run_generate):
    with pytest.raises(UnsupportedFeatureError, match="long rope"):
        run_generate(lossless(family, "auto"), mode, 12)


@pytest.mark.parametrize("mode", ("greedy", "padded"))
@pytest.mark.parametrize(("family", "route", "new_tokens"), LONG)
def test_same_tokens_for_long(family, route, new_tokens, mode, stock, lossless, run_generate):
    expected = stock(family, mode, new_tokens)
    assert expected.shape[1] >= 40 + new_tokens
    assert torch.equal(run_generate(lossless(family, route), mode, new_tokens), expected)


def test_the_grid_is_as_large_as_it_says(request):
    assert len(FAMILIES) >= 18 and len(MODES) >= 8
    assert set(MODES) == set(request.getfixturevalue("modes")) and len(set(FAMILIES)) == len(FAMILIES)


@pytest.mark.parametrize(("family", "route"), [(family, route) for family, route, _ in LONG])
def test_logits_within_1e_4(family, route, build_model, padded):
    """Every step's logits, fed with the same tokens, for a padded batch."""
    model = build_model(family)
    more = torch.randint(3, 160, (3, 12), generator=torch.Generator().manual_seed(5))
    # Verification-like blocks and single steps.
    steps = [more[:, :1], more[:, 1:6], more[:, 6:7], more[:, 7:12]]

    def logits(cache):
        mask, past = padded["attention_mask"], as_argument(model, cache)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            out = [model(padded["input_ids"], attention_mask=mask, position_ids=positions, **past).logits]
            for step in steps:
                mask = torch.cat([mask, torch.ones_like(step)], 1)
                positions = (mask.cumsum(-1) - 1)[:, -step.shape[1] :]
                out.append(model(step, attention_mask=mask, position_ids=positions, **past).logits)
        # What the padding itself would say is nobody's business.
        return torch.cat([out[0][:, -1:], *out[1:]], 1)

    expected = logits(DynamicCache(config=model.config))
    with patched(model, "lossless", route=route):
        got = logits(CompressedPagedCache(model.config, "lossless"))
    assert expected.abs().max() > 1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize(("family", "route"), [("llama", "swap"), ("mistral", "swap"), ("qwen3", "interface")])
def test_half_precision_logits(family, route, dtype, build_model, prompt):
    model = build_model(family).to(dtype)
    ids = prompt(tokens=48)

    def logits(cache):
        with torch.no_grad():
            past = as_argument(model, cache)
            model(ids[:, :32], **past)
            return torch.cat([model(ids[:, i : i + 4], **past).logits for i in range(32, 48, 4)], 1)

    expected = logits(DynamicCache(config=model.config)).float()
    with patched(model, "lossless", route=route):
        got = logits(CompressedPagedCache(model.config, "lossless")).float()
    assert (got - expected).abs().max() <= 0.05 * expected.abs().max()


def _attend_changed(monkeypatch, change):
    """Lets `change(attention_mask, kwargs)` rewrite what reaches the cache."""
    attend = CompressedPagedCache.attend

    def changed(self, layer_idx, query, key, value, attention_mask, **kwargs):
        mask, kwargs = change(attention_mask, kwargs)
        return attend(self, layer_idx, query, key, value, mask, **kwargs)

    monkeypatch.setattr(CompressedPagedCache, "attend", changed)


@pytest.mark.parametrize(
    ("family", "route"),
    [("mistral", "swap"), ("mistral", "interface"), ("gemma2", "interface"), ("phi3", "interface")],
)
def test_dropping_the_window_is_noticed(family, route, stock, lossless, run_generate, monkeypatch):
    model = lossless(family, route)
    _attend_changed(monkeypatch, lambda mask, kwargs: (mask, kwargs | {"sliding_window": None}))
    assert not torch.equal(run_generate(model, "greedy", 64), stock(family, "greedy", 64))


@pytest.mark.parametrize(("family", "route"), [("llama", "swap"), ("llama", "interface"), ("qwen3", "interface")])
def test_ignoring_padding_is_noticed(family, route, stock, lossless, run_generate, monkeypatch):
    model = lossless(family, route)
    _attend_changed(monkeypatch, lambda mask, kwargs: (None, kwargs))
    assert not torch.equal(run_generate(model, "padded", 64), stock(family, "padded", 64))


def test_dropping_the_soft_cap_is_noticed(stock, lossless, run_generate, monkeypatch):
    model = lossless("gemma2", "interface")
    _attend_changed(monkeypatch, lambda mask, kwargs: (mask, kwargs | {"softcap": None}))
    assert not torch.equal(run_generate(model, "greedy", 64), stock("gemma2", "greedy", 64))


def test_dropping_the_sinks_is_noticed(stock, lossless, run_generate, monkeypatch):
    model = lossless("gpt-oss", "interface")
    _attend_changed(monkeypatch, lambda mask, kwargs: (mask, kwargs | {"sinks": None}))
    assert not torch.equal(run_generate(model, "padded", 32), stock("gpt-oss", "padded", 32))


# -- and the grid notices when the cache does something wrong ----------------------------------------------------------

SOME = ("llama", "qwen3", "gemma2", "gemma3n", "gpt-oss")
DROPPING = ("greedy", "padded", "chunked", "beams", "lookup", "guided", "continued-new", "prefix-beams")


def _differs(model, mode, expected, run_generate, new_tokens=12):
    try:
        return not torch.equal(run_generate(model, mode, new_tokens), expected)
    except (RuntimeError, ValueError, IndexError, NotImplementedError):
        return True  # a wrong cache may also just not fit any more


@pytest.mark.parametrize(
    "mode", ("greedy", "padded", "chunked", "beams", "lookup", "guided", "continued-new", "prefix-beams")
)
@pytest.mark.parametrize("family", SOME)
def test_a_dropped_slot_is_noticed(family, mode, build_model, stock, run_generate, monkeypatch):
    model = patch(build_model(family), "lossless")
    pack = PagedStore.pack

    def dropping(self, tier, *args, **kwargs):
        pack(self, tier, *args, **kwargs)
        self.truncate(tier, (self.lengths[tier] - 1).clamp(min=0))

    monkeypatch.setattr(PagedStore, "pack", dropping)
    assert _differs(model, mode, stock(family, mode, 12), run_generate)


@pytest.mark.parametrize("mode", ("greedy", "padded", "chunked", "lookup", "embeddings"))
@pytest.mark.parametrize("family", SOME)
def test_a_wrong_position_is_noticed(family, mode, lossless, stock, run_generate, monkeypatch):
    model = lossless(family, "auto")
    forward = type(model).forward

    def shifted(*args, position_ids=None, **kwargs):
        cache = find_cache(kwargs)
        if cache is not None and cache.get_seq_length():
            position_ids = position_ids + 5
        return forward(model, *args, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(model, "forward", shifted)
    assert _differs(model, mode, stock(family, mode, 12), run_generate)


@pytest.mark.parametrize(
    ("method", "mode"),
    [
        ("crop", "lookup"),
        ("crop", "assisted"),
        ("crop", "early-exit"),
        ("reorder_cache", "beams"),
        ("reorder_cache", "prefix-beams"),
        ("batch_repeat_interleave", "prefix-beams"),
    ],
)
@pytest.mark.parametrize("family", ("llama", "qwen3", "gemma2"))
def test_a_method_that_does_nothing_is_noticed(family, method, mode, lossless, stock, run_generate, monkeypatch):
    if (family, mode) == ("gemma2", "lookup"):
        pytest.skip("none of its drafts is refused, so nothing is cropped")
    model = lossless(family, "auto")
    monkeypatch.setattr(CompressedPagedCache, method, lambda self, *args: None)
    assert _differs(model, mode, stock(family, mode, 24), run_generate, 24)


def test_long_rope_keeps_its_compressed_cache(lossless, run_generate):
    """Phi-3 drops its cache where the rotary factors change; ours must be there, and full, afterwards."""
    out = run_generate(lossless("phi3-longrope", "auto"), "greedy", 32, return_dict_in_generate=True)
    assert isinstance(cache_of(out), CompressedPagedCache)
    assert cache_of(out).get_seq_length() == out.sequences.shape[1] - 1


@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
def test_both_stock_implementations(implementation, build_model, run_generate):
    model = build_model("llama")
    model.set_attn_implementation(implementation)
    expected = run_generate(model, "padded", 32)
    for route in ("swap", "interface"):
        with patched(model, "lossless", route=route):
            assert torch.equal(run_generate(model, "padded", 32), expected)
    assert model.config._attn_implementation == implementation
