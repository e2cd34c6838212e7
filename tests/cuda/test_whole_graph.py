"""Whole decode steps of a model, captured and replayed: the very same tokens, and the same cache afterwards."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import kvcompress_hf as kvc
from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.patches import graph
from kvcompress_hf.runtime import packing
from kvcompress_hf.runtime.attention import PagedAttention

NEW = 45


@pytest.fixture(scope="module")
def model(tiny_llama):
    sizes = dict(vocab_size=101, head_dim=64, initializer_range=0.5, pad_token_id=0, bos_token_id=1)
    return tiny_llama(**sizes).half()


@pytest.fixture
def no_python(monkeypatch, capturers):
    """While a step is replayed, nothing of a cache may run on the host."""
    attend = PagedAttention.attend

    def checked(self, *args):
        assert not any(each.replaying for each in capturers)
        return attend(self, *args)

    monkeypatch.setattr(PagedAttention, "attend", checked)


def patched(model, preset, **options):
    """Linear layers as on a GPU: the kernel that takes them on a CPU is no operation of PyTorch, and not recorded."""
    return kvc.patched(model, preset, linears="stock", **options)


def prompt(batch=2, padding=9):
    ids = torch.randint(3, 101, (batch, 50), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, replayed, inputs=None, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return model.generate(
            **(prompt() if inputs is None else inputs),
            return_dict_in_generate=True,
            output_logits=True,
            kvcompress={"graph": replayed},
            **options,
        )


def inside(cache):
    """All that a cache holds and believes: slots, host counts, and what the device has."""
    parts, attention = cache.inspect(), cache._attention
    for store in parts.stores:
        assert torch.equal(store.lengths_on_host(), store.lengths)
    for layer in attention.layers:
        tails = layer.store.tail_lengths[layer.index]
        assert layer.seen == cache.get_seq_length() and layer.tail_used == int(tails.max())
        plan = layer.store.tensors.plans.get(layer.index)
        if plan is not None:
            assert int(plan._clock) == layer.seen == plan._time and plan._used == layer.tail_used
    positions = [each.tolist() for store in parts.stores for each in store.positions() or []]
    statistics = parts.statistics
    return positions, [s.tolist() for s in cache.slots()], statistics.packings, statistics.plans, cache.get_seq_length()


@pytest.mark.parametrize(
    "preset, changes",
    [
        ("lossless", {"when": {"every": 8}}),
        ("k8v4", {"when": {"every": 8}}),
        ("k4v2", {"when": {"every": 8}}),
        ("auto", {"budget": 0.3, "when": {"every": 8}, "protect": {"recent": 8}}),
        ("kv-compress", {"budget": 0.5}),
        ("roco", {"budget": 24}),
        ("tova", {"budget": 24}),
        ("leankv", {}),
    ],
)
def test_the_very_same_tokens(model, capturers, no_python, preset, changes):
    with patched(model, preset, **changes):
        plain, replayed = (generate(model, each) for each in (False, True))
        assert torch.equal(replayed.sequences, plain.sequences)
        assert all(map(torch.equal, replayed.logits, plain.logits))
        caches = [kvc.cache_of(each) for each in (plain, replayed)]
        assert inside(caches[1]) == inside(caches[0])
        events = caches[1].inspect().statistics
        # The first token comes of the prompt, and the second of a step that is run.
        assert events.replays == NEW - 2 and caches[0].inspect().statistics.replays == 0
        decoded = events.packings - (1 if preset in ("lossless", "k8v4", "k4v2") else 0)
        assert 1 <= events.captures <= decoded + 1
        assert f"{NEW - 2} steps replayed from {events.captures} captures" in str(kvc.report(model))
        # And on it goes, in steps that are run.
        more = [model(plain.sequences[:, -1:], past_key_values=each).logits for each in caches]
        assert torch.equal(*more)


def test_one_sequence_without_a_mask_and_sampling(model, capturers, no_python):
    with patched(model, "k8v4", when={"every": 16}):
        inputs = {"input_ids": prompt()["input_ids"][1:]}
        for options in ({"do_sample": True}, {"repetition_penalty": 1.3}, {"prefill_chunk_size": 16}):
            plain, replayed = (generate(model, each, inputs, **options) for each in (False, True))
            assert torch.equal(replayed.sequences, plain.sequences)
            assert kvc.cache_of(replayed).inspect().statistics.replays == NEW - 2


def test_a_cache_goes_on_across_calls_and_forks(model, capturers):
    with patched(model, "k8v4", when={"every": 8}):
        ends = []
        for replayed in (False, True):
            cache = kvc.CompressedPagedCache(model.config, "k8v4")
            ids = prompt()["input_ids"]
            forks = []
            for _ in range(3):
                ids = generate(model, replayed, {"input_ids": ids}, past_key_values=cache, max_new_tokens=11).sequences
                forks.append(cache.fork())  # which reads the same tail, until one of them writes
            logits = [model(ids[:, -1:], past_key_values=each).logits for each in forks]
            ends.append([ids, *logits])
        assert all(map(torch.equal, *ends))
        assert cache.inspect().statistics.replays == 3 * 9


class Hurried(LogitsProcessor):
    """Takes the cache's lock away at some step: as a fork in another thread would."""

    def __init__(self, cache, at):
        self.cache, self.at, self.forks = cache, at, []

    def __call__(self, ids, scores):
        if ids.shape[1] in self.at:
            self.forks.append(copy.copy(self.cache))
        return scores


def test_a_fork_in_the_middle_is_not_written_to(model, capturers):
    with patched(model, "kv-compress", budget=0.5):
        ends = []
        for replayed in (False, True):
            cache = kvc.CompressedPagedCache(model.config, "kv-compress")
            hurried = Hurried(cache, (60, 71))
            out = generate(
                model, replayed, past_key_values=cache, logits_processor=LogitsProcessorList([hurried])
            ).sequences
            ends.append([out, *(model(out[:, -1:], past_key_values=each).logits for each in hurried.forks)])
        assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("preset, closes", [("k8v4", False), ("kv-compress", True)])
def test_an_interrupt_leaves_nothing_half_done(model, capturers, monkeypatch, preset, closes):
    cache = kvc.CompressedPagedCache(model.config, preset)
    grows, at = type(cache._attention.layers[0]).grows, 60

    def stopping(self, tokens, valid):
        if self.seen == at + 1 and tokens == 1:
            raise KeyboardInterrupt
        grows(self, tokens, valid)

    with patched(model, preset):
        monkeypatch.setattr(type(cache._attention.layers[0]), "grows", stopping)
        with pytest.raises(KeyboardInterrupt):
            generate(model, True, past_key_values=cache)
        monkeypatch.undo()
        if closes:
            with pytest.raises(RuntimeError, match="A replayed step was stopped in the middle"):
                model(torch.tensor([[5], [6]]), past_key_values=cache)
            return
        tails = cache.inspect().stores[0].tail_lengths
        assert cache.get_seq_length() == at and int(tails.max()) == cache._attention.layers[0].tail_used


def test_out_of_memory_takes_the_step_back(model, capturers):
    ends = []
    for replayed in (False, True):
        cache = kvc.CompressedPagedCache(model.config, "k8v4", max_bytes=150_000)
        with patched(model, "k8v4"), pytest.raises(kvc.CacheMemoryError) as error:
            generate(model, replayed, past_key_values=cache, max_new_tokens=400)
        ends.append((str(error.value), inside(cache)))
    assert ends[0] == ends[1]


def test_a_step_that_fails_behind_its_replay_is_taken_back(model, capturers, monkeypatch):
    """Statistics too: those that the token has added to are what they were."""
    ends = []
    pack = packing.pack_tails

    def failing(state):
        if state.seen == 63:
            raise OSError("of a test")
        pack(state)

    monkeypatch.setattr(packing, "pack_tails", failing)
    for replayed in (False, True):
        cache = kvc.CompressedPagedCache(model.config, kvc.get_preset("h2o").with_overrides(when={"every": 13}))
        with patched(model, "h2o"), pytest.raises(OSError, match="of a test"):
            generate(model, replayed, past_key_values=cache)
        (store,) = cache.inspect().stores
        ends.append((inside(cache), store.read_field(0, cache.recipe.observer.sum_field), store.tail_fields))
    assert ends[0][0] == ends[1][0] and ends[0][0][-1] == 62
    torch.testing.assert_close(ends[1][1], ends[0][1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(*(tail[..., :12].view(torch.float32) for *_, tail in ends), rtol=1e-3, atol=1e-4)


def test_a_cache_from_a_file_goes_on(model, capturers, tmp_path):
    tokens = []
    with patched(model, "k8v4"):
        cache = kvc.prefill(model, prompt(padding=0)["input_ids"], "k8v4")
        for token in range(6):
            model(torch.full((2, 1), 7 + token), past_key_values=cache)
        cache.save(tmp_path / "it.kvc.safetensors")
        for replayed in (False, True):
            cache = kvc.CompressedPagedCache.load(tmp_path / "it.kvc.safetensors", model)
            cache.crop(-3)
            ids = torch.full((2, 54), 9)
            tokens.append(generate(model, replayed, {"input_ids": ids}, past_key_values=cache).sequences)
    assert torch.equal(*tokens) and cache.inspect().statistics.replays == NEW - 2
    attention = cache._attention
    assert all(plan is not None for plan in attention.plans())
    attention.layers[0].plan_room = attention.layers[0].tail_used  # as if the tail had room for no more
    assert attention.plans()[0] is None


def test_what_a_step_returned_stays(model, capturers, monkeypatch):
    kept, call = [], graph.GraphSteps.__call__
    monkeypatch.setattr(graph.GraphSteps, "__call__", lambda *a, **k: kept.append(call(*a, **k)) or kept[-1])
    with patched(model, "k8v4"):
        out = generate(model, True)
    assert len(kept) == NEW - 1
    steps = zip(kept, out.logits[1:], strict=True)
    assert all(torch.equal(each.logits[:, -1].float(), logits) for each, logits in steps)


# -- what is not replayed ----------------------------------------------------------------------------------------------


def told(model, inputs=None, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            out = model.generate(
                **(prompt() if inputs is None else inputs),
                do_sample=False,
                **{"max_new_tokens": 6, "kvcompress": {"graph": True}, **options},
            )
    said = [str(each.message) for each in caught if "graph" in str(each.message)]
    assert len(said) == 1, "it is said once"
    return out, said[0]


@pytest.mark.parametrize(
    "options, why",
    [
        ({"num_beams": 2}, "steps of beam search are not replayed"),
        ({"prompt_lookup_num_tokens": 3}, "steps of assisted generation are not replayed"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states=True was asked for"),
        ({"kvcompress": {"preset": "r-kv", "graph": True}}, "RedundancyAware looks at every step on the host"),
    ],
    ids=lambda each: str(each)[:24],
)
def test_what_cannot_be_replayed_is_run_and_said(model, capturers, options, why):
    inputs = {name: each[1:] for name, each in prompt().items()} if "prompt_lookup_num_tokens" in options else None
    with patched(model, "k8v4"):
        out, said = told(model, inputs, **options)
        plain = {name: each for name, each in options.items() if name != "kvcompress"}
        if "kvcompress" in options:
            plain["kvcompress"] = {"preset": options["kvcompress"]["preset"]}
        expected = model.generate(
            **(prompt() if inputs is None else inputs), do_sample=False, max_new_tokens=6, **plain
        )
    assert why in said and "one by one" in said
    got, wanted = (each if isinstance(each, torch.Tensor) else each.sequences for each in (out, expected))
    assert torch.equal(got, wanted)
    assert not any(each.tape for each in capturers)


def test_hooks_and_other_routes_are_said(model, capturers, tiny_llama):
    with patched(model, "k8v4"):
        handle = model.lm_head.register_forward_hook(lambda *args: None)
        try:
            assert "a hook on a Linear" in told(model)[1]
        finally:
            handle.remove()
    with patched(model, "k8v4", route="interface"):
        assert "not of the families of Llama's shape" in told(model)[1]
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    other = tiny_llama(vocab_size=101, rope_parameters=scaled, pad_token_id=0).half()
    with patched(other, "k8v4"):
        assert "of type 'dynamic' changes with the length" in told(other)[1]


def test_without_kernels_for_it_steps_are_run(model, monkeypatch):
    with patched(model, "k8v4"):
        assert "there are no graphs on a cpu device" in told(model)[1]
    monkeypatch.setattr(graph, "capturer_for", lambda device: object())
    with patched(model, "k8v4"):
        assert "cannot be replayed" in told(model)[1]


def test_a_step_that_asks_the_device_says_what_to_do(model, capturers, monkeypatch):
    forward = type(model.model.norm).forward

    def asking(self, x):
        return forward(self, x) if bool(x.isfinite().any()) else x

    monkeypatch.setattr(type(model.model.norm), "forward", asking)
    cache = kvc.CompressedPagedCache(model.config, "k8v4")
    with patched(model, "k8v4"):
        with pytest.raises(UnsupportedFeatureError, match=r'not permitted when stream.*kvcompress=\{"graph": False\}'):
            generate(model, True, past_key_values=cache)
        before = inside(cache)
        assert cache.get_seq_length() == 51  # the prompt, and the step that was run
        monkeypatch.undo()
        assert before[-1] == 51


def test_what_is_not_allowed(model, capturers):
    ids = prompt()["input_ids"]
    with patched(model, "k8v4"):
        with pytest.raises(TypeError, match="it must be True or False"):
            model.generate(ids, kvcompress={"graph": "yes"})
        with pytest.raises(ValueError, match="one of its rows"):
            model.generate(ids, kvcompress=[{"graph": True}, {"graph": True}])
        with pytest.raises(ValueError, match="this call has none"):
            model.generate(ids, kvcompress={"graph": True}, use_cache=False)
