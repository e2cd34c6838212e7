"""The first tokens of a cache: read by its own kernel where that is faster, else by the model's attention."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument
from kvcompress_hf.kernels.cpu.backend import CpuBackend
from kvcompress_hf.runtime.call import Mask

WINDOW, TOKENS = 24, 150


@pytest.fixture(scope="module")
def stock():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.2,
        sliding_window=WINDOW,
        pad_token_id=0,
        eos_token_id=None,
    )
    return MistralForCausalLM(config).eval()


@pytest.fixture
def native(monkeypatch):
    """Every chunk that the kernel is given, as the position of its first query; on any machine it reads prompts."""
    calls, real = [], CpuBackend.chunk_attention

    def chunk_attention(self, *args, **kwargs):
        calls.append((kwargs["position"], kwargs["allowed"] is not None))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(CpuBackend, "chunk_attention", chunk_attention)
    monkeypatch.setattr(CpuBackend, "reads_prompts", lambda self, dtype, tokens: tokens >= 32)
    return calls


def _patched(model, dtype, route, implementation="sdpa"):
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(implementation)
    return model, kvc.patch(copy.deepcopy(model), "lossless", route=route, check=False)


def _ids(batch=2, tokens=TOKENS):
    return torch.randint(3, 64, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("route", ["swap", "interface"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_logits_are_as_right_as_those_of_the_models_own_attention(stock, native, dtype, implementation, route):
    model, patched = _patched(stock, dtype, route, implementation)
    cache = kvc.CompressedPagedCache(patched.config, "lossless")
    ours = patched(_ids(), **as_argument(patched, cache)).logits
    theirs, exact = model(_ids()).logits, copy.deepcopy(model).double()(_ids()).logits
    assert native == [(0, False)] * 2  # once a layer, without a mask though one was made for the window
    assert (ours - exact).norm() < 1.3 * (theirs - exact).norm()


@torch.no_grad()
def test_a_few_first_tokens_are_the_models_own_to_the_bit(stock, native):
    model, patched = _patched(stock, torch.float32, "swap")
    cache = kvc.CompressedPagedCache(patched.config, "lossless")
    ours = patched(_ids(tokens=12), **as_argument(patched, cache)).logits
    assert not native
    torch.testing.assert_close(ours, model(_ids(tokens=12)).logits, rtol=0, atol=0)


@pytest.mark.parametrize("padding", [7, 100])
@torch.no_grad()
def test_padded_prompts_too(stock, native, padding):
    model, patched = _patched(stock, torch.float32, "swap")
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[0, :padding] = 0
    given = dict(attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(patched.generate(_ids(), **given), model.generate(_ids(), **given))
    assert native == [(0, True)] * 2


def test_gradients_of_the_first_tokens_are_the_models(stock, native):
    model, patched = _patched(stock, torch.float32, "swap")
    grads = []
    for each in (model, patched):
        cache = {} if each is model else as_argument(each, kvc.CompressedPagedCache(each.config, "lossless"))
        each(_ids(), labels=_ids(), **cache).loss.backward()
        grads.append(each.get_input_embeddings().weight.grad)
    assert not native
    torch.testing.assert_close(*grads)


@torch.no_grad()
def test_a_later_chunk_needs_no_mask_for_its_window_either(stock, native):
    model, patched = _patched(stock, torch.float32, "swap")
    cache = kvc.CompressedPagedCache(patched.config, "lossless")
    for part in _ids().split(TOKENS // 2, dim=1):
        last = patched(part, **as_argument(patched, cache)).logits[:, -1]
    torch.testing.assert_close(last, model(_ids()).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert [position for position, _ in native] == [0, 0, TOKENS // 2, TOKENS // 2]
    assert not any(masked for _, masked in native)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_mask_is_left_out_only_if_it_says_nothing(data):
    tokens = data.draw(st.sampled_from([1, 5, 40, 300]), label="tokens")
    window = data.draw(st.one_of(st.none(), st.integers(1, tokens + 2)), label="window")
    at = torch.arange(tokens)
    allowed = at[:, None] >= at
    if window is not None:
        allowed &= at[:, None] - at < window
    allowed = allowed.expand(data.draw(st.integers(1, 2), label="rows"), -1, -1).clone()
    changed = data.draw(st.sampled_from(["nothing", "one", "bias"]), label="changed")
    if changed == "one":
        row, query, key = (data.draw(st.integers(0, size - 1)) for size in allowed.shape)
        allowed[row, query, key] ^= True
    tensor = allowed[:, None]
    if changed == "bias" or data.draw(st.booleans(), label="additive"):
        tensor = torch.where(tensor, 0.0, torch.finfo(torch.float32).min)
        if changed == "bias":
            tensor[0, 0, -1, -1] = 0.5
    assert Mask(tensor).says_nothing(window) == (changed == "nothing")
    assert Mask(tensor).says_nothing((window or tokens) + 1) is (changed == "nothing" and (window or tokens) >= tokens)
