"""Queries as if each token knew the next one: found again where some of them really did."""

import pytest
import torch

import kvcompress_hf as kvc
from kvcompress_hf.kernels import Logits, get_backend
from kvcompress_hf.kernels.rotation import Rotation
from kvcompress_hf.observers.foreseen import find_maps, foreseen_queries, foreseen_scores

KV_HEADS, GROUP, DIM = 2, 2, 16
ROTATION = Rotation(0.01 / 1e5 ** (torch.arange(0, 12, 2) / 12))  # of the first 12 channels; slow, as where heads copy
LOGITS = Logits(scale=DIM**-0.5)
BACKEND = get_backend("cpu")


def copying(tokens, guessed, batch=1, seed=0):
    """Queries and keys of heads that look for the next token, what the queries would be if all knew it, and which do.

    Only a share of the queries is made from the next key; the others, which guessed wrong, are made from other keys.
    """
    g = torch.Generator().manual_seed(seed)
    key = torch.randn(batch, KV_HEADS, tokens, DIM, generator=g)
    mapping = 3 * torch.eye(DIM) + 0.3 * torch.randn(KV_HEADS, GROUP, DIM, DIM, generator=g)
    wanted = (key[:, :, None] @ mapping).flatten(1, 2)
    others = torch.randint(0, tokens, (tokens - 1,), generator=g)
    right = torch.rand(tokens - 1, generator=g) < guessed
    seen = torch.where(right, torch.arange(1, tokens), others)
    query = torch.cat((wanted[:, :, seen], wanted[:, :, :1]), 2)
    place = torch.arange(tokens)
    return ROTATION.turn(query, place), ROTATION.turn(key, place), ROTATION.turn(wanted[:, :, 1:], place[:-1]), right


def queries(query, key):
    return foreseen_queries(query, key, find_maps(query, key, ROTATION), ROTATION)


def scores(query, key, **given):
    given = {"logits": LOGITS, "rotation": ROTATION, **given}
    return foreseen_scores(BACKEND, query, key - key.mean(2, keepdim=True), key, **given)


def likeness(a, b):
    return torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "guessed"), [(300, 0.6), (1500, 0.4)])
def test_wrong_guesses_are_made_right(dtype, tokens, guessed):
    query, key, wanted, right = copying(tokens, guessed)
    found = queries(query.to(dtype), key.to(dtype))
    assert found.dtype == dtype and found.shape == query.shape
    before, after = (likeness(each[:, :, :-1], wanted)[..., ~right].mean() for each in (query, found))
    assert before < 0.2  # they looked for something else
    assert after > 0.7
    assert torch.equal(found[:, :, -1], query[:, :, -1].to(dtype))  # nothing comes after the last


def test_what_surprised_a_head_is_scored_too():
    query, key, _, right = copying(600, 0.7)
    first = BACKEND.non_causal_scores(query, key, logits=LOGITS, rotation=ROTATION)[:, :, 1:]
    added = scores(query, key)[:, :, 1:]
    assert first[..., right].mean() > 3 * first[..., ~right].mean()
    assert added[..., ~right].mean() > 0.8 * added[..., right].mean()
    assert added[..., ~right].mean() > 5 * first[..., ~right].mean()


def test_heads_that_do_not_copy_are_left_alone():
    query, key, _, _ = copying(300, 0.8)
    query[:, GROUP:] = 0.1 * torch.randn(1, GROUP, 300, DIM)  # of the second KV head: look at nothing in particular
    found = scores(query, key)
    assert bool((found[:, :GROUP].amax(-1) > 0).all()) and not bool(found[:, GROUP:].any())
    together = scores(torch.cat((query, query.flip(1))), torch.cat((key, key.flip(1))))  # each other's opposite
    torch.testing.assert_close(together[:1], found)
    torch.testing.assert_close(together[1:, GROUP:].flip(1), found[:, :GROUP])
    assert not bool(together[1:, :GROUP].any())


def test_sinks_go_with_their_heads():
    query, key, _, _ = copying(300, 0.8)
    query[:, :GROUP] = 0.0
    sinks = torch.tensor([9.0, 9.0, -9.0, 16.0])
    found = scores(query, key, logits=Logits(scale=LOGITS.scale, sinks=sinks))
    free = scores(query, key)
    torch.testing.assert_close(found[:, 2], free[:, 2], rtol=0.01, atol=1e-4)  # a sink of nothing
    assert bool((found[:, 3] <= free[:, 3]).all()) and found[:, 3].mean() < 0.9 * free[:, 3].mean()


def test_whole_keys_in_float32_are_those_of_the_model():
    query, key, _, _ = (each.bfloat16() for each in copying(300, 0.8))
    found = foreseen_scores(BACKEND, query, key, key.float(), logits=LOGITS, rotation=ROTATION)
    assert torch.equal(found, foreseen_scores(BACKEND, query, key, key, logits=LOGITS, rotation=ROTATION))
    assert bool(found.any())


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(left):
    tokens, padding = 200, 37
    query, key, _, _ = copying(tokens, 0.8, batch=2)
    noise = [torch.randn(2, each.shape[1], padding, DIM) for each in (query, key)]
    pairs = [(rest, own) if left else (own, rest) for rest, own in zip(noise, (query, key), strict=True)]
    valid = torch.ones(2, tokens + padding, dtype=torch.bool)
    valid[:, :padding] &= not left
    valid[:, tokens:] &= left
    padded_query, padded_key = (torch.cat(pair, 2) for pair in pairs)
    whole = padded_key - key.mean(2, keepdim=True)
    padded = foreseen_scores(BACKEND, padded_query, whole, padded_key, logits=LOGITS, rotation=ROTATION, valid=valid)
    torch.testing.assert_close(padded[:, :, valid[0]], scores(query, key))
    assert not bool(padded[:, :, ~valid[0]].any())


@pytest.mark.parametrize("tokens", [1, 2, 3, 20])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_short_prompts_are_finite(tokens, softcap):
    query, key = torch.randn(1, KV_HEADS * GROUP, tokens, DIM), torch.randn(1, KV_HEADS, tokens, DIM)
    logits = Logits(scale=0.25, softcap=softcap)
    for keys in (key, torch.ones_like(key)):  # the second cannot be told apart
        found = foreseen_scores(BACKEND, query, keys, keys, logits=logits, rotation=ROTATION)
        assert found.shape == query.shape[:3] and bool(found.isfinite().all())


def test_foreseeing_needs_the_second_look():
    with pytest.raises(ValueError, match="non_causal=True"):
        kvc.WindowScores(foresee=True, power=2)
