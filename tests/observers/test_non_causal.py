"""Prompts judged as if they came again, against the same attention computed densely, query by query."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig

import kvcompress_hf as kvc
from kvcompress_hf.kernels import Logits, get_backend
from kvcompress_hf.kernels.non_causal import SAMPLE
from kvcompress_hf.observers.base import Chunk
from kvcompress_hf.observers.non_causal import non_causal_scores
from kvcompress_hf.paging.key_turn import Rotation
from kvcompress_hf.paging.new_tokens import NewTokens

KV_HEADS, GROUP, DIM = 2, 3, 16
INV_FREQ = 1 / 100.0 ** (torch.arange(0, 12, 2) / 12)  # of the first 12 channels
SCALE = DIM**-0.5


def states(tokens, seed=0, batch=1):
    g = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(batch, heads, tokens, DIM, generator=g) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)]


def a_chunk(query, key, value, **changes):
    """A chunk of these states; what `changes` names is a field of it, of its new tokens, or of their logits."""
    parts, places = {**changes}, ({"rotation": Rotation(INV_FREQ)}, {}, {"scale": SCALE})
    for part, owner in zip(places, (Chunk, NewTokens, Logits), strict=True):
        part |= {each.name: parts.pop(each.name) for each in dataclasses.fields(owner) if each.name in parts}
    assert not parts
    of_chunk, of_new, of_logits = places
    new = NewTokens(query, key, value, Logits(**of_logits), **of_new)
    return Chunk(store=WithBackend, layer=0, new=new, **of_chunk)


class WithBackend:
    """As much of a store as a first chunk needs."""

    backend = get_backend("cpu")


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
    others = torch.tensor([4 + (2 * s + 1) * (tokens - 4) // (2 * SAMPLE) for s in range(SAMPLE)])
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


def test_it_finds_what_will_be_looked_up_and_the_window_does_not():
    """A head that looks for the key of its own token: every token is found, whatever the last queries look at."""
    g = torch.Generator().manual_seed(3)
    key = 4 * torch.nn.functional.normalize(torch.randn(1, KV_HEADS, 400, DIM, generator=g), dim=-1)
    query = 10 * key.repeat_interleave(GROUP, 1)
    query[:, :, -32:] = query[:, :, 100:101]  # the window wants one token
    chunk = a_chunk(query, key, torch.zeros_like(key), rotation=Rotation(torch.zeros(6)))
    found = non_causal_scores(chunk).sum(2)[0]
    # Half of its attention stays where it stands, the other half finds the key from behind.
    assert found[:, :360].median() > 0.2 * GROUP
    seen = torch.einsum("hsd,hnd->hsn", query[0, ::GROUP, -32:] * SCALE, key[0]).softmax(-1).square().sum(1)
    assert seen[:, :100].max() < 0.2


class APatch:
    installed = True


PATCH = APatch()
LLAMA = Rotation(1 / 10000.0 ** (torch.arange(0, DIM, 2) / DIM))


def cache_with(observer, rotation=LLAMA):
    recipe = kvc.Recipe(observer=observer, budget=kvc.Budget(10**6), plan=kvc.LowestPlan(), when=kvc.When(every=8))
    cache = kvc.CompressedPagedCache(llama(), recipe)
    cache.begin_pass(PATCH, (), [rotation])
    return cache


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
        cache = cache_with(observer)
        attend(cache, parts)
        scores.append(stored(cache))
    again = non_causal_scores(a_chunk(*parts, rotation=LLAMA)).sum(2)[0]
    assert again.min() > 0
    torch.testing.assert_close(scores[1] - scores[0], again, atol=1e-5, rtol=1e-4)


def test_later_chunks_keep_what_earlier_ones_found():
    query, key, value = states(200)
    cache = cache_with(kvc.WindowScores(window=8, pool=1, non_causal=True))
    attend(cache, [x[:, :, :120] for x in (query, key, value)])
    before = stored(cache)
    attend(cache, [x[:, :, 120:] for x in (query, key, value)])
    after = stored(cache)
    window = cache_with(kvc.WindowScores(window=8, pool=1))
    for part in (slice(0, 120), slice(120, 200)):
        attend(window, [x[:, :, part] for x in (query, key, value)])
    torch.testing.assert_close(after[:, :120], torch.maximum(before, stored(window)[:, :120]))
    # The new tokens' own part is what it is without a past, less what looks at the past.
    alone = non_causal_scores(a_chunk(*(x[:, :, 120:] for x in (query, key, value)), rotation=LLAMA)).sum(2)[0]
    share = ((after - stored(window))[:, 120:] / alone).sqrt()
    assert share.min() > 0.2 and share.max() < 0.7  # 80 of 200 keys are new


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_may_lie_anywhere(start, interleaved):
    query = states(7)[0]
    by = torch.arange(7) * 100
    found = Rotation(-INV_FREQ, start, interleaved).turn(query, by)
    channels = torch.arange(start, start + 12)
    pairs = channels.view(6, 2) if interleaved else channels.view(2, 6).T
    for (first, second), frequency in zip(pairs.tolist(), INV_FREQ.tolist(), strict=True):
        turned = torch.complex(query[..., first], query[..., second]) * torch.exp(-1j * by * frequency)
        torch.testing.assert_close(found[..., first], turned.real, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[..., second], turned.imag, atol=1e-4, rtol=1e-4)
    others = [i for i in range(DIM) if not start <= i < start + 12]
    assert torch.equal(found[..., others], query[..., others])


@pytest.mark.parametrize("tokens, window", [(200, 61), (60, 61), (60, 90), (60, 120), (60, 400)])
def test_a_sliding_layer_looks_at_what_is_still_within_reach(tokens, window):
    parts = states(tokens)
    found = non_causal_scores(a_chunk(*parts, window=window))
    gone = max(0, tokens - window + 1)
    assert not found[..., :gone].any()
    inside = non_causal_scores(a_chunk(*(x[:, :, gone:] for x in parts)))
    # A question may come after each of the next `tokens` tokens: how often does it still see a slot?
    shares = [sum(tokens + m - at < window for m in range(tokens)) / tokens for at in range(gone, tokens)]
    torch.testing.assert_close(found[..., gone:], inside * torch.tensor(shares))


def test_layers_that_cannot_be_turned_have_the_window_alone():
    assert non_causal_scores(a_chunk(*states(50), rotation=None)) is None
    parts = states(50)
    scores = []
    for non in (False, True):
        cache = cache_with(kvc.WindowScores(window=8, non_causal=non), rotation=None)
        attend(cache, parts)
        scores.append(stored(cache))
    assert torch.equal(*scores)


def test_probabilities_are_refused():
    with pytest.raises(ValueError, match="power=2"):
        kvc.WindowScores(power=1, non_causal=True)
