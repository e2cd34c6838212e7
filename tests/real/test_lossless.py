"""`lossless` on real weights in float32: the stock model's tokens, however the prompt comes and the tokens are made."""

import pytest
import torch
from transformers import DynamicCache

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument

TOKENS, NEW = 2000, 256


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def read(request, load, prose):
    """A model, a prompt, and what the stock model goes on with: read once, shared by all tests."""
    model, tokenizer = load(request.param, torch.float32)
    ids = prose(tokenizer, TOKENS)
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        model(ids[:, :-1], use_cache=True, logits_to_keep=1, **as_argument(model, cache))
        stock = go_on(model, ids, NEW, **as_argument(model, cache))
    return model, tokenizer, ids, stock


def go_on(model, ids, new, **kwargs):
    """The greedy continuation, `[batch, new]`."""
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    out = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **kwargs)
    return out[:, ids.shape[1] :]


def test_the_models_are_what_they_should_be(read):
    model = read[0]
    config = model.config
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    if config.model_type == "llama":
        assert heads == (9, 3, 64) and config.num_hidden_layers == 30
    else:
        assert heads == (4, 1, 256) and config.sliding_window == 512
        assert config.layer_types.count("sliding_attention") == 15 and len(config.layer_types) == 18


def test_greedy_gives_the_stock_tokens(read):
    model, _, ids, stock = read
    assert stock.unique().numel() > 20  # a model that only repeats itself would show nothing
    with kvc.patched(model, "lossless"):
        cache = kvc.prefill(model, ids[:, :-1])
        assert torch.equal(go_on(model, ids, NEW, kvcompress=cache), stock)
        assert cache.memory().ratio < 1.1


def test_prompt_lookup_gives_the_stock_tokens(read, prose):
    # On a cache of its own: continuing a given one, transformers' prompt lookup strays from greedy decoding by itself.
    model, tokenizer, _, _ = read
    ids = prose(tokenizer, 560, skip=60_000)
    stock = go_on(model, ids, 48)
    with kvc.patched(model, "lossless"):
        assert torch.equal(go_on(model, ids, 48, prompt_lookup_num_tokens=4), stock)


def test_a_prompt_in_chunks_gives_the_stock_tokens(read):
    model, _, ids, stock = read
    with kvc.patched(model, "lossless"):
        assert torch.equal(go_on(model, ids, 48, prefill_chunk_size=600), stock[:, :48])


def test_a_padded_batch_gives_the_stock_tokens(read, prose):
    model, tokenizer, _, _ = read
    long, short = prose(tokenizer, 560, skip=60_000), prose(tokenizer, 211, skip=90_000)
    pad = long.shape[1] - short.shape[1]
    ids = torch.cat([long, torch.nn.functional.pad(short, (pad, 0), value=tokenizer.pad_token_id)])
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    stock = go_on(model, ids, 32, attention_mask=mask)
    with kvc.patched(model, "lossless"):
        assert torch.equal(go_on(model, ids, 32, attention_mask=mask), stock)
