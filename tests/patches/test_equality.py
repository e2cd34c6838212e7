"""With the `lossless` recipe a patched model says what the stock model says, in every family and way of generating."""

import functools

import pytest
import torch
from transformers.cache_utils import DynamicCache

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.patches import patch, patched

# (family, route, new tokens)
MAIN = [
    ("llama", "swap", 256),
    ("llama", "interface", 256),
    ("mistral", "swap", 256),
    ("mistral", "interface", 64),
    ("qwen2", "interface", 64),
    ("qwen3", "interface", 64),
    ("gemma2", "interface", 64),
    ("phi3", "interface", 64),
]
MODES = ("greedy", "padded", "chunked", "beams", "sampling", "lookup")
OTHERS = (
    "llama-mha",
    "mistral-full",
    "qwen2-window",
    "phi3-longrope",
    "gpt-oss",
    "phimoe",
    "gemma3",
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "route", "new_tokens"), MAIN)
def test_same_tokens(family, route, new_tokens, mode, stock, lossless, run_generate):
    # 256 tokens where they cost least; beams and speculation show what they can show in fewer.
    new_tokens = new_tokens if mode in ("greedy", "padded") else 64
    expected = stock(family, mode, new_tokens)
    assert expected.shape[1] >= 40 + new_tokens
    assert torch.equal(run_generate(lossless(family, route), mode, new_tokens), expected)


@pytest.mark.parametrize("mode", ("padded", "chunked"))
@pytest.mark.parametrize("family", OTHERS)
def test_same_tokens_in_other_families(family, mode, stock, lossless, run_generate):
    assert torch.equal(run_generate(lossless(family, "auto"), mode, 32), stock(family, mode, 32))


@pytest.mark.parametrize(("family", "route"), [(family, route) for family, route, _ in MAIN])
def test_logits_within_1e_4(family, route, build_model, padded):
    """Every step's logits, fed with the same tokens, for a padded batch."""
    model = build_model(family)
    more = torch.randint(3, 160, (3, 12), generator=torch.Generator().manual_seed(5))
    # Verification-like blocks and single steps.
    steps = [more[:, :1], more[:, 1:6], more[:, 6:7], more[:, 7:12]]

    def logits(cache):
        mask = padded["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            out = [
                model(padded["input_ids"], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
            ]
            for step in steps:
                mask = torch.cat([mask, torch.ones_like(step)], 1)
                positions = (mask.cumsum(-1) - 1)[:, -step.shape[1] :]
                out.append(model(step, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
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
            model(ids[:, :32], past_key_values=cache)
            return torch.cat([model(ids[:, i : i + 4], past_key_values=cache).logits for i in range(32, 48, 4)], 1)

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


def test_long_rope_keeps_its_compressed_cache(lossless, run_generate):
    """Phi-3 drops its cache where the rotary factors change; ours must be there, and full, afterwards."""
    out = run_generate(lossless("phi3-longrope", "auto"), "greedy", 32, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, CompressedPagedCache)
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1


@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
def test_both_stock_implementations(implementation, build_model, run_generate):
    model = build_model("llama")
    model.set_attn_implementation(implementation)
    expected = run_generate(model, "padded", 32)
    for route in ("swap", "interface"):
        with patched(model, "lossless", route=route):
            assert torch.equal(run_generate(model, "padded", 32), expected)
    assert model.config._attn_implementation == implementation
