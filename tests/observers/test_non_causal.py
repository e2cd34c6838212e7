"""Prompts judged as if they came again, against the same attention computed densely, query by query."""

import dataclasses
import importlib

import pytest
import torch
from transformers import CONFIG_MAPPING, GPT2Config, LlamaConfig

import kvcompress_hf as kvc
from kvcompress_hf import rotary
from kvcompress_hf.kernels import Logits
from kvcompress_hf.observers import non_causal
from kvcompress_hf.observers.base import Chunk
from kvcompress_hf.observers.non_causal import non_causal_scores
from kvcompress_hf.paging.new_tokens import NewTokens

KV_HEADS, GROUP, DIM = 2, 3, 16
INV_FREQ = 1 / 100.0 ** (torch.arange(0, 12, 2) / 12)  # of the first 12 channels
SCALE = DIM**-0.5


def states(tokens, seed=0, batch=1):
    g = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(batch, heads, tokens, DIM, generator=g) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)]


def a_chunk(query, key, value, **changes):
    """A chunk of these states; what `changes` names is a field of it, of its new tokens, or of their logits."""
    parts, places = {**changes}, ({"inv_freq": INV_FREQ}, {}, {"scale": SCALE})
    for part, owner in zip(places, (Chunk, NewTokens, Logits), strict=True):
        part |= {each.name: parts.pop(each.name) for each in dataclasses.fields(owner) if each.name in parts}
    assert not parts
    of_chunk, of_new, of_logits = places
    new = NewTokens(query, key, value, Logits(**of_logits), **of_new)
    return Chunk(store=None, layer=0, new=new, **of_chunk)


def rotate(query, by):
    """One query `[head_dim]` turned on by some positions, as complex numbers."""
    turned = query.clone().double()
    pairs = torch.complex(turned[:6].clone(), turned[6:12].clone()) * torch.exp(1j * by * INV_FREQ.double())
    turned[:6], turned[6:12] = pairs.real, pairs.imag
    return turned


def by_hand(query, key, softcap=None, sinks=None):
    """Scores `[kv_heads, group, tokens]` of one sequence, one query after the other."""
    heads, tokens, _ = query.shape
    result = torch.zeros(heads, tokens, dtype=torch.float64)
    others = torch.tensor(
        [4 + (2 * s + 1) * (tokens - 4) // (2 * non_causal._SAMPLE) for s in range(non_causal._SAMPLE)]
    )
    for head in range(heads):
        keys = key[head // GROUP].double()

        def logits(q, keys=keys):
            found = keys @ q * SCALE
            return found if softcap is None else softcap * torch.tanh(found / softcap)

        for i in range(tokens):
            ahead, here = logits(rotate(query[head, i], tokens - i)), logits(query[head, i].double())
            near = (torch.arange(tokens) - i).abs() <= 16
            total = ahead[near].exp().sum() + here[near & (torch.arange(tokens) <= i)].exp().sum()
            first = ~near & (torch.arange(tokens) < 4)
            total += ahead[first].exp().sum()
            drawn = others[~near[others]]
            if len(drawn):
                total += (tokens - near.sum() - first.sum()) * ahead[drawn].exp().mean()
            if sinks is not None:
                total += sinks[head].double().exp()
            result[head, near] += (ahead[near].exp() / total).square()
    return result.unflatten(0, (KV_HEADS, GROUP)).float()


@pytest.mark.parametrize("tokens", [5, 31, 64, 200])
@pytest.mark.parametrize("changes", [{}, {"softcap": 3.0}, {"sinks": torch.linspace(-1, 4, KV_HEADS * GROUP)}])
def test_scores_are_those_of_dense_attention(tokens, changes):
    query, key, value = states(tokens)
    found = non_causal_scores(a_chunk(query, key, value, **changes))
    torch.testing.assert_close(found[0], by_hand(query[0], key[0], **changes), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    query, key, value = states(150, batch=2)
    alone = [
        non_causal_scores(a_chunk(*(x[i : i + 1, :, :n] for x in (query, key, value)))) for i, n in ((0, 150), (1, 77))
    ]
    valid = torch.ones(2, 150, dtype=torch.bool)
    real = slice(73, None) if side == "left" else slice(0, 77)
    valid[1] = False
    valid[1, real] = True
    for x in (query, key, value):
        x[1, :, real] = x[1, :, :77].clone()
        x[1][:, ~valid[1]] = torch.nan
    found = non_causal_scores(a_chunk(query, key, value, valid=valid))
    torch.testing.assert_close(found[:1], alone[0])
    torch.testing.assert_close(found[1:, ..., real], alone[1])
    assert not found[1][..., ~valid[1]].any()


def test_it_does_not_depend_on_how_much_is_worked_on_at_once(monkeypatch):
    chunk = a_chunk(*states(300))
    whole = non_causal_scores(chunk)
    monkeypatch.setattr(non_causal, "_NUMBERS", {"cpu": 1})
    torch.testing.assert_close(non_causal_scores(chunk), whole)


def test_it_finds_what_will_be_looked_up_and_the_window_does_not():
    """A head that looks for the key of its own token: every token is found, whatever the last queries look at."""
    g = torch.Generator().manual_seed(3)
    key = 4 * torch.nn.functional.normalize(torch.randn(1, KV_HEADS, 400, DIM, generator=g), dim=-1)
    query = 10 * key.repeat_interleave(GROUP, 1)
    query[:, :, -32:] = query[:, :, 100:101]  # the window wants one token
    chunk = a_chunk(query, key, torch.zeros_like(key), inv_freq=torch.zeros(6))
    found = non_causal_scores(chunk).sum(2)[0]
    # Half of its attention stays where it stands, the other half finds the key from behind.
    assert found[:, :360].median() > 0.2 * GROUP
    seen = torch.einsum("hsd,hnd->hsn", query[0, ::GROUP, -32:] * SCALE, key[0]).softmax(-1).square().sum(1)
    assert seen[:, :100].max() < 0.2


def cache_with(observer, config):
    recipe = kvc.Recipe(observer=observer, budget=kvc.Budget(10**6), plan=kvc.LowestPlan(), when=kvc.When(every=8))
    return kvc.CompressedPagedCache(config, recipe)


def stored(cache):
    store = cache.inspect().stores[0]
    positions = store.read_field(0, "position").view(KV_HEADS, -1)
    return store.read_field(0, "score").view(KV_HEADS, -1).gather(-1, positions.long().argsort(dim=-1))


def attend(cache, parts):
    cache.attend(0, *parts, None, scaling=SCALE, dense=lambda: torch.zeros(1))


def llama(**changes):
    shape = dict(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=DIM, num_hidden_layers=1)
    return LlamaConfig(**shape, **changes)


def test_the_window_and_every_query_add_up():
    parts = states(120)
    window = kvc.WindowScores(window=16, pool=3)
    both = kvc.WindowScores(window=16, pool=3, non_causal=True)
    scores = []
    for observer in (window, both):
        cache = cache_with(observer, llama())
        attend(cache, parts)
        scores.append(stored(cache))
    inv_freq = 1 / 10000.0 ** (torch.arange(0, DIM, 2) / DIM)
    again = non_causal_scores(a_chunk(*parts, inv_freq=inv_freq)).sum(2)[0]
    assert again.min() > 0
    torch.testing.assert_close(scores[1] - scores[0], again, atol=1e-5, rtol=1e-4)


def test_later_chunks_keep_what_earlier_ones_found():
    query, key, value = states(200)
    cache = cache_with(kvc.WindowScores(window=8, pool=1, non_causal=True), llama())
    attend(cache, [x[:, :, :120] for x in (query, key, value)])
    before = stored(cache)
    attend(cache, [x[:, :, 120:] for x in (query, key, value)])
    after = stored(cache)
    window = cache_with(kvc.WindowScores(window=8, pool=1), llama())
    for part in (slice(0, 120), slice(120, 200)):
        attend(window, [x[:, :, part] for x in (query, key, value)])
    torch.testing.assert_close(after[:, :120], torch.maximum(before, stored(window)[:, :120]))
    # The new tokens' own part is what it is without a past, less what looks at the past.
    inv_freq = 1 / 10000.0 ** (torch.arange(0, DIM, 2) / DIM)
    alone = non_causal_scores(a_chunk(*(x[:, :, 120:] for x in (query, key, value)), inv_freq=inv_freq)).sum(2)[0]
    share = ((after - stored(window))[:, 120:] / alone).sqrt()
    assert share.min() > 0.2 and share.max() < 0.7  # 80 of 200 keys are new


def test_layers_and_models_that_cannot_be_turned_have_the_window_alone():
    chunk = a_chunk(*states(50), window=20)
    assert non_causal_scores(chunk) is None
    parts = states(50)
    scores = []
    config = GPT2Config(n_embd=96, n_head=6, n_layer=1)
    for non in (False, True):
        cache = cache_with(kvc.WindowScores(window=8, non_causal=non), config)
        attend(cache, parts)
        scores.append(stored(cache))
    assert torch.equal(*scores)


@pytest.mark.parametrize("family", sorted(rotary._FAMILIES | rotary._QUERIES))
def test_queries_are_turned_as_the_model_would(family):
    """Every family that is said to be known, against its own rotary embedding at two positions."""
    config = CONFIG_MAPPING[family]()
    inv_freq = kvc.CompressedPagedCache(config, "auto").inspect().inv_freq
    package = type(config).__module__.rsplit(".", 1)[0]
    code = importlib.import_module(f"{package}.modeling_{package.rsplit('.', 1)[1]}")
    embedding = next(c for name, c in vars(code).items() if name.endswith("RotaryEmbedding"))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query = torch.randn(1, 1, 3, head_dim, generator=torch.Generator().manual_seed(0))
    rotated = []
    for places in ([3, 50, 1000], [3 + 200, 50 + 1, 1000 + 3000]):
        cos, sin = embedding(config)(query, torch.tensor([places]))
        part = query[..., : 2 * inv_freq.numel()]
        turned = code.apply_rotary_pos_emb(part, part, cos, sin)[0]
        rotated.append(torch.cat([turned, query[..., 2 * inv_freq.numel() :]], -1))
    found = non_causal._turned(rotated[0], torch.tensor([[200, 1, 3000]]), inv_freq)
    torch.testing.assert_close(found, rotated[1], atol=2e-3, rtol=1e-3)


def test_probabilities_are_refused():
    with pytest.raises(ValueError, match="power=2"):
        kvc.WindowScores(power=1, non_causal=True)
