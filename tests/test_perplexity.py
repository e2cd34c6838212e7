"""Perplexity through compressed caches."""

import pytest
import torch
import torch.nn.functional as F

import kvcompress_hf as kvc

TOKENS = 300


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(eos_token_id=2, vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=3)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 128, (2, TOKENS), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def stock(model, ids, skip):
    logits = model(ids[:, :-1]).logits[:, skip - 1 :]
    return float(F.cross_entropy(logits.flatten(0, 1), ids[:, skip:].flatten()))


@pytest.mark.parametrize(("stride", "skip"), [(1, 1), (64, 1), (64, 100), (77, 100), (512, 100)])
def test_lossless_is_stock(model, ids, stride, skip):
    report = kvc.perplexity(model, ids, "lossless", stride=stride, skip=skip)
    assert report.nll == pytest.approx(stock(model, ids, skip), abs=1e-4)
    assert report.perplexity == pytest.approx(torch.tensor(report.nll).exp().item())


@pytest.mark.parametrize("recipe", ["lossless", "k8v4", "h2o", "streaming", "kv-compress", "leankv"])
@pytest.mark.parametrize("stride", [50, 128])
def test_same_tokens_for_every_recipe(model, ids, recipe, stride):
    report = kvc.perplexity(model, ids, recipe, stride=stride, skip=120)
    assert report.tokens == 2 * (TOKENS - 120)
    assert report.nll > 0 and report.peak_bytes >= report.memory.total > 0


@pytest.mark.parametrize("recipe", ["h2o", "roco", "tova", "streaming", "snapkv", "kv-compress"])
def test_int_budget_acts(model, ids, recipe):
    full = kvc.perplexity(model, ids, "lossless", stride=50)
    small = kvc.perplexity(model, ids, recipe, stride=50, budget=96)
    assert small.memory.total < 0.7 * full.memory.total
    assert abs(small.nll - full.nll) > 1e-3


def test_budget_that_holds_everything_loses_nothing(model, ids):
    full = kvc.perplexity(model, ids, "lossless", stride=50)
    same = kvc.perplexity(model, ids, "h2o", stride=50, budget=TOKENS)
    assert same.nll == pytest.approx(full.nll, abs=1e-4)


def test_rows_of_a_batch_are_read_alone(model, ids):
    both = kvc.perplexity(model, ids, "snapkv", stride=64, budget=64)
    alone = [kvc.perplexity(model, ids[i : i + 1], "snapkv", stride=64, budget=64) for i in range(2)]
    assert both.nll == pytest.approx(sum(report.nll for report in alone) / 2, abs=1e-4)


def test_leaves_the_model_as_it_was(model, ids):
    before = kvc.perplexity(model, ids, "k8v4", stride=64)
    with kvc.patched(model, "snapkv"):
        assert kvc.perplexity(model, ids, "k8v4", stride=64) == before
    assert stock(model, ids, 1) == pytest.approx(kvc.perplexity(model, ids, "lossless").nll, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"stride": 0}, "stride is 0"), ({"skip": 0}, "skip is 0"), ({"skip": TOKENS}, f"skip is {TOKENS}")],
)
def test_refuses(model, ids, arguments, message):
    with pytest.raises(ValueError, match=message):
        kvc.perplexity(model, ids, **arguments)


def test_refuses_ids_of_another_shape(model):
    with pytest.raises(ValueError, match=r"ids has shape \(5,\)"):
        kvc.perplexity(model, torch.arange(5))
