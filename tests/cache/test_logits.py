"""How a layer makes logits is worked out once, and again when something of it changes."""

from unittest import mock

import pytest
import torch
from transformers import LlamaConfig

from kvcompress_hf import CompressedPagedCache
from kvcompress_hf.kernels import Logits

HEADS = (4, 2, 2)


def states(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, tokens, 32, generator=generator) for heads in HEADS]


def new_cache(**options):
    cache = CompressedPagedCache(LlamaConfig(num_hidden_layers=1), "kv-compress")  # which stores positions, for windows
    query, *new = states(20, seed=0)
    cache.attend(0, query, *new, None, scaling=0.2, dense=lambda: query.transpose(1, 2), **options)
    return cache


def step(cache, seed, **options):
    arguments = {"scaling": 0.2, "dense": lambda: torch.zeros(1)} | options
    return cache.attend(0, *states(1, seed), None, **arguments)


def plans_made(cache, steps):
    """How many decode plans these steps take, each a dict of options."""
    backend = cache.inspect().stores[0].backend
    with mock.patch.object(backend, "plan_decode", wraps=backend.plan_decode) as made:
        for seed, options in enumerate(steps, start=1):
            step(cache, seed, **options)
    return made.call_count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_plan_serves_all_steps(dtype):
    options = {"softcap": 30.0, "sinks": torch.zeros(4, dtype=dtype)}
    assert plans_made(new_cache(**options), [options] * 5) == 1


CHANGES = [{"scaling": 0.3}, {"softcap": 9.0}, {"sliding_window": 5}, {"sinks": torch.ones(4)}]


@pytest.mark.parametrize("changes", CHANGES, ids=["scaling", "softcap", "window", "sinks"])
def test_another_factor_cap_window_or_sink_is_noticed(changes):
    steps = [{}, {}, changes, changes]
    assert plans_made(new_cache(), steps) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["written to", "given other memory"])
def test_sinks_that_change_are_noticed(dtype, change):
    """A model's own parameter may be trained, loaded anew or moved; the cache must not go on with a copy of it."""
    sinks = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    cache = new_cache(sinks=sinks)
    step(cache, 1, sinks=sinks)
    other = torch.full((4,), 3.0, dtype=dtype)
    with torch.no_grad():
        if change == "written to":
            sinks.copy_(other)
        else:
            sinks.data = other
    fresh = new_cache(sinks=other)
    step(fresh, 1, sinks=other)
    assert torch.equal(step(cache, 2, sinks=sinks), step(fresh, 2, sinks=other))


def test_sinks_of_inference_mode():
    with torch.inference_mode():
        options = {"sinks": torch.zeros(4)}
        assert plans_made(new_cache(**options), [options] * 3) == 1


def test_logits_are_compared_without_a_look_at_tensors():
    first, second = Logits(1.0, sinks=torch.zeros(4)), Logits(1.0, sinks=torch.zeros(4))
    assert first == first and first != second and len({first, second}) == 2
