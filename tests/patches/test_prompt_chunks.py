"""Long prompts are read in chunks where the recipe evicts, so that a cache never holds the whole of one."""

import pytest
import torch

import kvcompress_hf as kvc
from kvcompress_hf.patches.prompt_chunks import CHUNK, LONG, chunk_for

TOKENS = LONG + 300


@pytest.fixture(scope="module")
def model(tiny_llama):
    one = dict(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    llama = tiny_llama(**one, max_position_embeddings=2 * TOKENS, pad_token_id=0)
    return kvc.patch(llama, "kv-compress", budget=1 / 8, check=False)


def _tokens(input_ids=None, inputs_embeds=None, **_):
    return (inputs_embeds if input_ids is None else input_ids).shape[1]


@pytest.fixture
def passes(model):
    """Tokens of every forward pass."""
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(_tokens(*args, **kwargs)), with_kwargs=True
    )
    yield seen
    hook.remove()


def _ids(tokens=TOKENS):
    return torch.randint(3, 64, (1, tokens), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_generate_never_holds_a_long_prompt(model, passes):
    chunked = model.generate(_ids(), max_new_tokens=3, do_sample=False)
    assert passes == [CHUNK, CHUNK, TOKENS - 2 * CHUNK, 1, 1]
    peak = kvc.report(model).statistics.peak_bytes
    passes.clear()
    whole = model.generate(_ids(), max_new_tokens=3, do_sample=False, prefill_chunk_size=TOKENS)
    assert passes == [TOKENS, 1, 1]
    assert peak < 0.75 * kvc.report(model).statistics.peak_bytes
    assert chunked.shape == whole.shape


@torch.no_grad()
def test_prefill_likewise(model, passes):
    cache = kvc.prefill(model, _ids())
    assert passes == [CHUNK, CHUNK, TOKENS - 2 * CHUNK] and cache.get_seq_length() == TOKENS
    passes.clear()
    kvc.prefill(model, _ids(), chunk_size=TOKENS)
    assert passes == [TOKENS]


@pytest.mark.parametrize(
    "recipe, tokens, chunk",
    [
        ("kv-compress", TOKENS, CHUNK),
        ("auto", TOKENS, CHUNK),
        ("auto", LONG, None),
        ("auto", None, None),
        ("k4v4", TOKENS, None),
        ("auto-kvzip", TOKENS, None),  # nothing goes before the prompt has been read twice
    ],
)
def test_only_where_it_saves_memory(recipe, tokens, chunk):
    assert chunk_for([kvc.get_preset(recipe)], tokens) == chunk


@torch.no_grad()
def test_calls_that_stock_cannot_split_are_left_alone(model, passes):
    model.generate(_ids(), max_new_tokens=2, prompt_lookup_num_tokens=2, do_sample=False)
    assert passes[0] == TOKENS
    embedded = model.get_input_embeddings()(_ids())
    passes.clear()
    model.generate(inputs_embeds=embedded, max_new_tokens=2, do_sample=False)
    assert passes == [TOKENS, 1]


@torch.no_grad()
def test_positions_of_the_callers_own_go_with_their_chunk(model, passes):
    positions = torch.arange(TOKENS)[None]
    given = model.generate(_ids(), position_ids=positions, max_new_tokens=2, do_sample=False)
    assert passes[0] == CHUNK
    assert torch.equal(given, model.generate(_ids(), max_new_tokens=2, do_sample=False))


@torch.no_grad()
def test_a_batch_of_two_lengths(model, passes):
    ids = _ids().repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :5000] = 0
    out = model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
    assert passes[:2] == [CHUNK, CHUNK] and out.shape == (2, TOKENS + 2)
    alone = model.generate(_ids()[:, 5000:], max_new_tokens=2, do_sample=False, kvcompress="lossless")
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, kvcompress="lossless")
    assert torch.equal(padded[0, -2:], alone[0, -2:])
