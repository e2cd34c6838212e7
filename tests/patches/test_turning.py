"""How position turns queries, learned from models of every family, against what the models do; and what comes of it."""

import copy

import pytest
import torch

import kvcompress_hf as kvc
from kvcompress_hf.cli.tiny_models import tiny_model
from kvcompress_hf.compat import as_argument
from kvcompress_hf.patches.generation import record_of
from kvcompress_hf.patches.turning import Turning, _Listener, _Way, learn_turning

TABLE = [
    *("llama", "mistral", "qwen2-window", "gemma2", "phi3", "phi3-longrope", "gpt-oss", "phimoe", "gemma3", "cohere2"),
    *("starcoder2", "mixtral", "granite", "smollm3", "glm4", "stablelm", "gpt-neox", "exaone4", "gemma3n", "gemma4"),
    "gpt2",
]
#: Beyond the table: several axes, interleaved pairs, the other way round, a table instead of a module.
TINY = ["cohere", "gptj", "qwen2_5_vl", "nanochat", "olmo", "opt", "ernie4_5"]
#: Layers that position does not turn, by place.
UNTURNED = {"smollm3": [1], "cohere2": [1], "exaone4": [1], "gpt2": [0, 1], "opt": [0, 1]}
NON_CAUSAL = kvc.WindowScores(window=4, pool=1, non_causal=True)


@pytest.fixture(scope="module", params=[*TABLE, *TINY])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family, build_model):
    if family not in TINY:
        return kvc.patch(build_model(family), "lossless", check=False)
    try:
        return kvc.patch(tiny_model(family), "lossless", check=False)
    except kvc.UnsupportedModelError as error:  # GPT-J's attention came to the interface with 5.24
        pytest.skip(str(error))


def ids_of(tokens, seed=0):
    return torch.randint(3, 150, (1, tokens), generator=torch.Generator().manual_seed(seed))


def queries_at(model, ids, start):
    listener = _Listener(model)
    places = torch.arange(start, start + ids.shape[1])[None]
    with torch.no_grad():
        model(ids, position_ids=places, use_cache=True, **as_argument(model, listener))
    return {layer: query for layer, (query, _) in listener.heard.items()}


def test_queries_are_turned_as_the_model_would(model, family):
    rotations = learn_turning(model).rotations(37 + 6)
    before, after = queries_at(model, ids_of(6, 1), 3), queries_at(model, ids_of(6, 1), 37)
    unturned = [layer for layer in before if not rotations[layer].width]
    assert unturned == UNTURNED.get(family, [])
    for layer, query in before.items():
        if family not in ("gpt2", "opt"):  # which add positions to the states instead
            found = rotations[layer].turn(query, torch.tensor([34]))
            torch.testing.assert_close(found, after[layer], atol=2e-3, rtol=1e-3)


def scores(model, observer, tokens=60):
    recipe = kvc.Recipe(observer=observer, budget=kvc.Budget(10**6), plan=kvc.LowestPlan())
    cache = kvc.prefill(model, ids_of(tokens), recipe)
    result = []
    for store in cache.inspect().stores:
        for tier in range(len(store.layout.tiers)):
            order = store.read_field(tier, "position").long().argsort(-1)
            result.append(store.read_field(tier, "score").gather(-1, order))
    return result


def test_the_second_look_happens_in_every_layer(model):
    window = kvc.WindowScores(window=4, pool=1)
    for alone, both in zip(scores(model, window), scores(model, NON_CAUSAL), strict=True):
        assert both.shape == alone.shape and both.numel()
        assert (both >= alone).all()
        # What a window of four cannot know of the others is most of what is known now. In a sliding layer it counts by
        # how long a slot stays within reach, which is little for the oldest.
        if both.shape[-1] == 60:
            assert (both > 2 * alone).float().mean() > 0.3
        else:
            assert (both > alone).float().mean() > 0.9
            newest = slice(both.shape[-1] // 2, None)
            assert (both[:, newest] > 2 * alone[:, newest]).float().mean() > 0.15


def test_long_rope_follows_the_length(build_model):
    model = kvc.patch(build_model("phi3-longrope"), "lossless", check=False)
    turning = learn_turning(model)
    assert turning.varies
    short, long = turning.rotations(30)[0], turning.rotations(60)[0]
    torch.testing.assert_close(short.inv_freq, long.inv_freq * 1.5)


def test_it_is_learned_once_and_leaves_the_model_as_it_was(build_model, snapshot, recwarn):
    model = build_model("gemma3")
    before = snapshot(model)
    rng = torch.get_rng_state()
    with kvc.patched(model, NON_CAUSAL_RECIPE):
        kvc.prefill(model, ids_of(40))
        turning = record_of(model).turning
        assert [each.width for each in turning.rotations(1)] == [16, 16]
        kvc.prefill(model, ids_of(40))
        assert record_of(model).turning is turning
        assert record_of(copy.deepcopy(model)).turning is None
    assert snapshot(model) == before and torch.equal(torch.get_rng_state(), rng)


NON_CAUSAL_RECIPE = kvc.Recipe(observer=NON_CAUSAL, budget=kvc.Budget(10**6), plan=kvc.LowestPlan())


def turned_otherwise(monkeypatch, model):
    """Makes a model turn its queries by a place of its own, which no rotary module tells of."""
    rotary = next(module for module in model.modules() if "Rotary" in type(module).__name__)
    forward = type(rotary).forward
    monkeypatch.setattr(
        type(rotary),
        "forward",
        lambda self, x, position_ids, *rest: forward(self, x, position_ids + (position_ids > 5) * position_ids, *rest),
    )


def test_where_it_cannot_be_learned_that_is_said_and_nothing_is_evicted_that_fits(build_model, monkeypatch):
    model = build_model("llama")
    turned_otherwise(monkeypatch, model)
    told = []
    monkeypatch.setattr("kvcompress_hf.patches.turning.logger.warning_once", told.append)
    with kvc.patched(model, "auto", check=False):
        # In float32 8-bit keys of all do not fit into a sixth of the dense bytes, 4-bit ones do.
        cache = kvc.prefill(model, ids_of(600), budget=0.17)
        assert cache.memory().ratio <= 0.17 and fewest_slots(cache) == 600
        assert fewest_slots(kvc.prefill(model, ids_of(600), budget=0.1)) < 600
    assert len(told) == 1 and "3 of its 3 layers" in told[0] and "reads the prompt twice" in told[0]
    monkeypatch.undo()
    assert fewest_slots(kvc.prefill(model, ids_of(600), "auto", budget=0.17)) < 600


def fewest_slots(cache):
    return min(int(heads.min()) for heads in cache.slots())


def test_a_rope_that_varies_is_asked_once_per_length_and_never_for_a_decoded_token():
    asked = []

    def angles(length):
        asked.append(length)
        return torch.full((4,), 1.0 / length)

    turning = Turning([(_Way(angles), 16)] * 2, varies=True)
    first = turning.rotations(100)
    assert turning.rotations(100) is first and turning.rotations(None) is first and asked == [100]
    assert turning.rotations(200)[1].inv_freq[0] == 1 / 200 and asked == [100, 200]
