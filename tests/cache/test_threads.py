"""One cache per thread at a time; any number of forks and caches in parallel (docs/how_it_works.md, "Threads")."""

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch

import kvcompress_hf as kvc
from kvcompress_hf.paging.arena import Arena

THREADS = 8


@pytest.fixture(autouse=True)
def often_switched():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return kvc.patch(
        tiny_llama(eos_token_id=2, hidden_size=32, intermediate_size=32, head_dim=16, pad_token_id=0), "k8v4"
    )


def ids(seed, tokens, batch=1):
    return torch.randint(3, 64, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def talk(model, cache, seed):
    """A chunk and decode steps beyond three packings; every logit."""
    out = [model(ids(seed, 5 + seed % 3), past_key_values=cache).logits[:, -1]]
    for step in range(12):
        out.append(model(out[-1].argmax(-1, keepdim=True), past_key_values=cache).logits[:, -1])
        if step == 6:
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.batch_select_indices(torch.tensor([0]))
    return torch.cat(out)


def in_parallel(work, threads=THREADS):
    """Runs `work(i)` in as many threads; returns what they raised."""
    raised = []

    def guarded(i):
        try:
            work(i)
        except BaseException as error:  # the test reports it
            raised.append(error)

    running = [threading.Thread(target=guarded, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(120)
    assert not any(thread.is_alive() for thread in running), "threads wait for each other"
    return raised


def pages_named(cache):
    return sum(store.live_ids().numel() for store in cache.inspect().stores)


RECIPES = {
    "k8v4": {"when": {"every": 4}},
    "roco": {"budget": 0.5, "when": {"every": 4}},
    "scissorhands": {"budget": 0.5, "when": {"every": 4}, "observer": {"window": 8}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_forks_of_one_cache(model, name):
    """Every fork gives the very logits it gives alone, and afterwards the arena holds the parent's pages only."""
    base = kvc.prefill(model, ids(0, 90), kvc.get_preset(name).with_overrides(**RECIPES[name]))
    alone = [talk(model, base.fork(), seed) for seed in range(3)]
    gc.collect()
    arena, before = base.inspect().arenas[0], base.inspect().arenas[0].live

    def work(i):
        assert torch.equal(talk(model, base.fork(), i % 3), alone[i % 3]), f"thread {i}"

    assert in_parallel(work) == []
    gc.collect()
    assert arena.live == before == pages_named(base)
    assert all(torch.equal(talk(model, base.fork(), seed), alone[seed]) for seed in range(3))


def test_caches_dropped_by_the_collector_of_another_thread(model):
    base = kvc.prefill(model, ids(0, 90), kvc.get_preset("k8v4").with_overrides(when={"every": 4}))
    alone, before = talk(model, base.fork(), 1), base.inspect().arenas[0].live
    stop = threading.Event()

    def work(i):
        if i == 0:
            while not stop.is_set():
                gc.collect()
            return
        try:
            for _ in range(2):
                cycle = [base.fork()]
                cycle.append(cycle)  # only the collector finds it
                assert torch.equal(talk(model, cycle[0], 1), alone)
                del cycle
        finally:
            left.discard(i)
            if not left:
                stop.set()

    left = set(range(1, 4))
    gc.freeze()  # what is there already takes a second to go through, while nobody else runs
    try:
        assert in_parallel(work, 4) == []
    finally:
        gc.unfreeze()
    gc.collect()
    assert base.inspect().arenas[0].live == before


def test_a_file_loaded_twice_and_a_cache_saved_while_its_forks_run(model, tmp_path):
    base = kvc.prefill(model, ids(0, 90), kvc.get_preset("k8v4").with_overrides(when={"every": 4}))
    alone = talk(model, base.fork(), 2)
    base.save(tmp_path / "cache")

    def work(i):
        if i % 4 == 0:
            loaded = kvc.CompressedPagedCache.load(tmp_path / "cache", model)
            assert torch.equal(talk(model, loaded, 2), alone)
        elif i % 4 == 1:
            fork = base.fork()
            fork.save(tmp_path / f"fork{i}")
            assert torch.equal(talk(model, kvc.CompressedPagedCache.load(tmp_path / f"fork{i}", model), 2), alone)
        elif i % 4 == 2:
            fork = base.fork()
            assert fork.memory().total > 0
            assert torch.equal(talk(model, fork, 2), alone)
            assert fork.memory().total > 0
        else:
            assert torch.equal(talk(model, base.fork(), 2), alone)

    assert in_parallel(work) == []


def test_a_limit_holds_whoever_asks(model):
    """Forks that fill an arena together are refused one by one; nobody's answer and nobody's page suffers."""
    base = kvc.prefill(model, ids(0, 90), kvc.get_preset("k8v4").with_overrides(when={"every": 4}))
    alone, arena = talk(model, base.fork(), 0), base.inspect().arenas[0]
    gc.collect()
    before = arena.live
    arena.max_bytes = arena.nbytes + 12 * arena.page_bytes
    refused = []

    def work(i):
        for _ in range(2):
            try:
                assert torch.equal(talk(model, base.fork(), 0), alone)
            except kvc.CacheMemoryError:
                refused.append(i)

    assert in_parallel(work) == []
    gc.collect()
    assert refused and arena.live == before and arena.nbytes <= arena.max_bytes
    arena.max_bytes = None
    assert torch.equal(talk(model, base.fork(), 0), alone)


def test_pages_stay_where_they_are_while_a_cache_is_saved(model, tmp_path, monkeypatch):
    """Forks come and go in other threads meanwhile, and the arena gives back what they held."""
    early = [kvc.prefill(model, ids(2, 200))]
    cache = early[0].fork()
    for seed in range(3):  # pages of its own behind those of a cache that goes away
        with torch.no_grad():
            model(ids(seed, 300), past_key_values=cache)
    cache.save(tmp_path / "before")
    arena, read, trims = cache.inspect().arenas[0], Arena.read, []
    other = early[0].fork()
    with torch.no_grad():
        model(ids(9, 900), past_key_values=other)

    def read_slowly(self, pages):
        if not trims:  # the first block of pages is about to be read
            trims.append(self.pages)
            thread = threading.Thread(target=lambda: (other.reset(), self.trim(room=0)))
            thread.start()
            thread.join(60)
            trims.append(self.pages)
        return read(self, pages)

    monkeypatch.setattr(Arena, "read", read_slowly)
    cache.save(tmp_path / "during")
    assert trims == [trims[0]] * 2  # nothing was given back, so nothing has moved
    arena.trim(room=0)
    assert arena.pages < trims[0]  # now it can be
    assert (tmp_path / "during").read_bytes() == (tmp_path / "before").read_bytes()


PROCESS = """
import os, threading, torch, kvcompress_hf as kvc
from kvcompress_hf.presets import resolve_rows
from kvcompress_hf.kernels import Logits
from kvcompress_hf.runtime.attention import PagedAttention
from kvcompress_hf.runtime.call import AttentionCall

logits = Logits(0.125)

def shapes(tokens):
    return [torch.randn(2, heads, tokens, 64, generator=random) for heads in (8, 2, 2)]

def run(recipe, attention=None, tokens=(2000, 40, *[1] * 20)):
    attention = attention or PagedAttention(resolve_rows(recipe), [None])
    found = []
    for n in tokens:
        q, k, v = (each[:, :, :n] for each in drawn)
        found.append(attention.attend(0, AttentionCall(q, k, v, logits), None, lambda: q.transpose(1, 2)))
    return torch.cat(found, 1), attention

random = torch.Generator().manual_seed(0)
drawn = shapes(2000)
assert torch.get_num_threads() == 2
for recipe in ("k8v4", "auto", "h2o"):
    expected, attention = run(recipe)
    outputs = [None] * 3
    def work(i):
        outputs[i], _ = run(recipe)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    print("same bits", all(torch.equal(each, expected) for each in outputs), flush=True)
    fork = attention.fork()
    if os.fork() == 0:
        torch.set_num_threads(1)
        one, _ = run(recipe, attention, (40, 1, 1))
        torch.save(one, "of_the_child")
        os._exit(0)
    print("child", os.wait()[1], flush=True)
    torch.set_num_threads(1)
    one, _ = run(recipe, fork, (40, 1, 1))
    torch.set_num_threads(2)
    print("same bits", torch.equal(torch.load("of_the_child"), one), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_the_same_bits_in_other_threads_and_forked_processes(tmp_path):
    """What docs/caches.md promises, with two OpenMP threads."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", PROCESS]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout.splitlines() == ["same bits True", "child 0", "same bits True"] * 3, done.stderr[-2000:]
