"""TriAttention and R-KV: what they keep is what dense loops over the papers' formulas would keep, from the model's own
projections; and what is remembered of queries lives the life of the cache."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument
from kvcompress_hf.observers import Look
from kvcompress_hf.paging.key_turn import Rotation, turn
from kvcompress_hf.paging.queries import Queries, band_norms

HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 16, 2
GROUP = HEADS // KV_HEADS
FREQUENCIES = 10000.0 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
SIZES = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, head_dim=DIM)


@pytest.fixture
def model():
    torch.manual_seed(3)
    config = LlamaConfig(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rope_theta=10000.0, **SIZES)
    return LlamaForCausalLM(config).eval()


def read(model, ids, mask, recipe, decoded):
    """A cache that has read a prompt and then tokens one by one; and the projections of all tokens, by layer:
    queries and keys before rotary embedding, `[batch, tokens, heads, head_dim]`."""
    heard = {f"{what}{layer}": [] for what in "qk" for layer in range(LAYERS)}
    hooks = []
    for layer, block in enumerate(model.model.layers):
        for what, module in (("q", block.self_attn.q_proj), ("k", block.self_attn.k_proj)):
            into = heard[f"{what}{layer}"]
            hooks.append(module.register_forward_hook(lambda _, __, out, into=into: into.append(out.detach())))
    batch, tokens = ids.shape
    prompt = tokens - decoded
    with kvc.patched(model, recipe), torch.no_grad():
        kvc.prefill(model, ids[:1, :4], recipe)  # how position turns queries is learnt by a pass of its own
        for each in heard.values():
            each.clear()
        cache = kvc.prefill(model, ids[:, :prompt], recipe, attention_mask=mask[:, :prompt])
        for at in range(prompt, tokens):
            model(
                ids[:, at : at + 1],
                attention_mask=mask[:, : at + 1],
                position_ids=mask[:, : at + 1].sum(1, keepdim=True) - 1,
                use_cache=True,
                **as_argument(model, cache),
            )
    for hook in hooks:
        hook.remove()
    joined = {name: torch.cat(parts, dim=1).unflatten(-1, (-1, DIM)).double() for name, parts in heard.items()}
    return cache, joined


def kept_positions(cache, layer, sequence, head):
    """Positions that a row holds, ascending."""
    (store,) = cache.inspect().stores
    return store.positions()[(layer * store.batch + sequence) * KV_HEADS + head].tolist()


def bands(vector):
    """The pairs of Llama's channels as complex numbers."""
    return [complex(vector[i], vector[i + DIM // 2]) for i in range(DIM // 2)]


def triattention_scores(queries, keys, offsets):
    """The paper's formulas word by word, for one KV head: `queries` `[group, tokens, head_dim]` and `keys`
    `[tokens, head_dim]` before rotary embedding; the newest query is the last token's."""
    tokens = keys.shape[0]
    of_heads = []
    for head in queries:
        rows = [bands(query) for query in head]
        mean = [sum(row[f] for row in rows) / tokens for f in range(DIM // 2)]
        mean_norm = [sum(abs(row[f]) for row in rows) / tokens for f in range(DIM // 2)]
        scores = []
        for place, key in enumerate(keys):
            k, total = bands(key), 0.0
            for offset in range(offsets + 1):
                distance = tokens - 1 + 2**offset - place
                for f in range(DIM // 2):
                    angle = math.atan2(mean[f].imag, mean[f].real) - math.atan2(k[f].imag, k[f].real)
                    total += abs(mean[f]) * abs(k[f]) * math.cos(float(FREQUENCIES[f]) * distance + angle)
            series = total / (offsets + 1)
            norms = sum((1 - abs(mean[f]) / mean_norm[f]) * mean_norm[f] * abs(k[f]) for f in range(DIM // 2))
            scores.append(series + norms)
        scores = torch.tensor(scores, dtype=torch.float64)
        of_heads.append((scores - scores.mean()) / scores.std(unbiased=False))
    return torch.stack(of_heads).amax(0)


def rkv_scores(queries, keys, window, weight, pool, threshold):
    """R-KV for one KV head, in loops: `queries` `[group, tokens, head_dim]`, `keys` `[tokens, head_dim]`, both turned."""
    tokens = keys.shape[0]
    older = tokens - window
    importance = torch.zeros(tokens, dtype=torch.float64)
    for at in range(older, tokens):
        logits = torch.stack([query[at] @ keys.T / DIM**0.5 for query in queries]).amax(0)
        importance[:older] += logits[:older].softmax(0) / window
    pooled = torch.stack([importance[max(0, j - pool // 2) : j + pool // 2 + 1].max() for j in range(tokens)])
    unit = keys / keys.norm(dim=-1, keepdim=True)
    alike = unit @ unit.T
    for i in range(tokens):
        alike[i, i] = 0
        near = [j for j in range(tokens) if j != i and alike[i, j] > threshold]
        if near:
            alike[i, near[-1]] = 0  # the most recent of the near-duplicates is not redundant
    redundancy = alike.mean(0).softmax(0)
    return weight * pooled - (1 - weight) * redundancy


def padded(tokens=(40, 29), seed=0):
    ids = torch.randint(3, 64, (len(tokens), max(tokens)), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, count in enumerate(tokens):
        mask[row, : max(tokens) - count] = 0
    return ids, mask


def turned(states):
    """`[tokens, ..., head_dim]` as rotary embedding leaves them."""
    at = torch.arange(states.shape[0])
    return turn(states, at if states.dim() == 2 else at[:, None], FREQUENCIES.float()).double()


CASES = [
    (kvc.QueryCentres(), kvc.Protect(), 8),
    (kvc.QueryCentres(offsets=3), kvc.Protect(), 0),
    (kvc.RedundancyAware(), kvc.Protect(recent=8), 8),
    (kvc.RedundancyAware(window=4, weight=0.6, pool=3, threshold=0.1), kvc.Protect(recent=4), 0),
]


@pytest.mark.parametrize("observer, protect, decoded", CASES, ids=str)
def test_it_keeps_what_the_formulas_keep(model, observer, protect, decoded):
    """One plan at the end, over a prompt and what was decoded after it; padded, grouped queries."""
    lengths = (40, 29)
    ids, mask = padded(lengths)
    left = 20
    recipe = kvc.Recipe(
        "formulas",
        observer=observer,
        protect=protect,
        budget=kvc.Budget(left),
        plan=kvc.LowestPlan(),
        when=kvc.When(every=max(decoded, 1), prefill=not decoded),
    )
    cache, heard = read(model, ids, mask, recipe, decoded)
    for layer in range(LAYERS):
        for row, count in enumerate(lengths):
            first = ids.shape[1] - count
            queries, keys = (heard[f"{what}{layer}"][row, first:] for what in "qk")
            for head in range(KV_HEADS):
                mine = queries[:, head * GROUP : (head + 1) * GROUP]
                if isinstance(observer, kvc.QueryCentres):
                    scores = triattention_scores(mine.transpose(0, 1), keys[:, head], observer.offsets)
                else:
                    settings = (observer.window, observer.weight, observer.pool, observer.threshold)
                    scores = rkv_scores(turned(mine).transpose(0, 1), turned(keys[:, head]), *settings)
                scores[count - protect.recent :] = math.inf
                best = (scores.topk(left).indices.sort().values + first).tolist()
                assert kept_positions(cache, layer, row, head) == best
