"""A tensor of a store is declared once; beams, forks, files, going back and byte counts follow from that."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvcompress_hf as kvc
from kvcompress_hf.paging import stored_rows
from kvcompress_hf.paging.sequence_tensors import Declared

SIZES = dict(vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=2, head_dim=16)
CONFIG = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SIZES)
DIMS = [("layers", "batch", "kv_heads"), ("batch", 3, "layers"), ("tiers", "rows"), (2, "layers", "batch", "head_dim")]


@pytest.fixture
def declare(monkeypatch):
    """Adds one declaration to those of every store made from now on."""

    def add(**what):
        known = stored_rows.declare
        made_up = Declared("made_up", **what)
        monkeypatch.setattr(stored_rows, "declare", lambda *arguments: [*known(*arguments), made_up])

    return add


def fill(cache, count, seed=0, batch=2):
    g = torch.Generator().manual_seed(seed)
    for layer in range(2):
        q, k, v = (torch.randn((batch, heads, count, 16), generator=g) for heads in (4, 2, 2))
        out = torch.zeros((batch, count, 4, 16))
        cache.attend(layer, q, k, v, None, scaling=0.25, dense=lambda out=out: out)
    return cache


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_a_made_up_tensor_lives_the_life_of_the_cache(declare, dims, tmp_path):
    plain = fill(kvc.CompressedPagedCache(CONFIG, "k8v4"), 20)
    declare(dtype=torch.float32, dims=dims, kind="metadata", always=True)
    cache = fill(kvc.CompressedPagedCache(CONFIG, "k8v4"), 20)
    (store,) = cache.inspect().stores
    value = store.tensors.values["made_up"]
    value.copy_(torch.arange(value.numel()).view(value.shape))
    kept = value.clone()

    assert cache.memory().total == plain.memory().total + value.nbytes
    assert cache.memory().metadata == plain.memory().metadata + value.nbytes

    fork = cache.fork()
    fork.inspect().stores[0].tensors.values["made_up"].add_(1)
    assert torch.equal(store.tensors.values["made_up"], kept)
    assert torch.equal(fork.inspect().stores[0].tensors.values["made_up"], kept + 1)

    state = store.state(1)["made_up"]
    one_layer = kept.unflatten(1, (2, 4))[:, 0] if "rows" in dims else kept.narrow(dims.index("layers"), 0, 1)
    assert torch.equal(state, one_layer)

    cache.reorder_cache(torch.tensor([1, 1, 0]))
    new = store.tensors.values["made_up"]
    if "rows" in dims:
        old, new = kept.unflatten(1, (2, 2, 2)), new.unflatten(1, (2, 3, 2))
        assert torch.equal(new, old[:, :, [1, 1, 0]])
    else:
        assert torch.equal(new, kept.index_select(dims.index("batch"), torch.tensor([1, 1, 0])))

    cache.save(tmp_path / "made-up")
    loaded = kvc.CompressedPagedCache.load(tmp_path / "made-up", LlamaForCausalLM(CONFIG))
    (there,) = loaded.inspect().stores
    assert torch.equal(there.tensors.values["made_up"], store.tensors.values["made_up"])

    cache.reset()
    assert not cache.inspect().stores


@pytest.mark.parametrize("changed_by", ["step", "packing", "statistics"])
def test_a_made_up_tensor_is_taken_back(declare, monkeypatch, changed_by):
    declare(dtype=torch.int32, dims=("layers", "batch"), changed_by=changed_by, always=True)
    cache = fill(kvc.CompressedPagedCache(CONFIG, kvc.get_preset("h2o").with_overrides(budget=100)), 20)
    store = cache.inspect().stores[0]
    backend = type(store.backend)
    real = backend.window_scores

    def change_and_stop(self, *arguments, **options):
        store.tensors.values["made_up"] += 1
        real(self, *arguments, **options)
        raise MemoryError("simulated")

    monkeypatch.setattr(backend, "window_scores", change_and_stop)
    monkeypatch.setattr(backend, "column_scores", change_and_stop)
    with pytest.raises(MemoryError, match="simulated"):
        fill(cache, 5, seed=1)
    assert not store.tensors.values["made_up"].any()
    assert cache.get_seq_length() == 20
