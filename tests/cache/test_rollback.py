"""A change of a cache that is stopped, wherever that happens, leaves it as it was before, or closed with an error."""

import dis
import gc
import linecache
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import kvcompress_hf as kvc
from kvcompress_hf import units

LAYERS, HEADS, KV_HEADS, DIM, EVERY = 2, 4, 2, 16, 4
ROOT = Path(units.__file__).parent  # as code names its file: an editable install comes here through a link
ROOMS = tuple(str(ROOT / room) for room in ("runtime", "paging", "plans", "observers"))
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM, hidden_size=64
)


class Stopped(BaseException):
    """Stands for an interrupt, an allocator that gives up, a cancelled task: nothing catches it by its class."""


def nothing_can_raise(frame):
    """Whether a line is one before which Python lets no interrupt in, so that a test must not either.

    That is `try`, and leaving a `with` block before `__exit__` is called; neither lies in the block that it belongs to.
    """
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    if not line.startswith("with "):
        return line == "try:"
    here = next(one for one in dis.get_instructions(frame.f_code) if one.offset >= frame.f_lasti)
    return here.opname in ("LOAD_CONST", "POP_BLOCK", "SWAP", "ROT_TWO")  # who enters one loads what manages it


class StopAt:
    """Raises `Stopped` when the n-th line of the package's inner rooms is about to run; counts them otherwise."""

    def __init__(self, line=None):
        self.line, self.count, self.place = line, 0, None

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *error):
        sys.settrace(self._before)

    def _call(self, frame, event, argument):
        return self._local if frame.f_code.co_filename.startswith(ROOMS) else None

    def _local(self, frame, event, argument):
        if event == "line":
            self.count += 1
            if self.line is not None and self.count >= self.line and not nothing_can_raise(frame):
                sys.settrace(None)
                self.place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise Stopped
        return self._local


def recipe(preset, **changes):
    preset = kvc.get_preset(preset)
    return preset.with_overrides(**{"when": {"every": EVERY}, **changes})


RECIPES = {
    "lossless": recipe("lossless"),
    "k4v2": recipe("k4v2"),
    "h2o": recipe("h2o", budget=24, protect={"recent": 4}),
    "kv-compress": recipe("kv-compress", budget=0.4, protect={"recent": 4}),
    "auto": recipe("auto", budget=0.3, protect={"recent": 4}),
    "keydiff": recipe("keydiff", budget=0.5, protect={"recent": 4}),
    "means stay": recipe("kv-compress", budget=0.4, protect={"recent": 4}, evicted="mean"),
}
KVZIP = recipe("kvzip", budget=0.5)


def tokens(count, seed, batch=2):
    g = torch.Generator().manual_seed(seed)
    return [
        [torch.randn((batch, h, count, DIM), generator=g) for h in (HEADS, KV_HEADS, KV_HEADS)] for _ in range(LAYERS)
    ]


def forward(cache, new):
    """One forward pass; returns the layers' outputs."""
    outputs = []
    for layer, (q, k, v) in enumerate(new):

        def dense(q=q, k=k, v=v):
            k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1).transpose(1, 2)

        outputs.append(cache.attend(layer, q, k, v, None, scaling=DIM**-0.5, dense=dense))
    return outputs


def contents(cache, scores=True):
    """Everything that can be seen of what is stored: which slots, their codes, fields and the tail."""
    held = [cache.get_seq_length(), cache.batch_size]
    for store in cache.inspect().stores:
        held += [store.lengths.clone(), store.tail_lengths.clone(), store.arena.live]
        if not scores:
            continue
        for tier in range(len(store.layout.tiers)):
            width = store.width(tier)
            held += [*store.backend.read_slots(store.rows(), tier, width)] if width else []
            held += [store.read_field(tier, name, width) for name in store.layout.fields] if width else []
        for name, each in store.tensors.declared.items():
            value = store.tensors.values.get(name)
            if name in ("sums", "summed", "key_shift", "evicted_means", "evicted_counts"):
                held.append(torch.zeros(0) if value is None else value.clone())
            elif "slots" in each.dims and value is not None:
                used = int(store.tail_lengths.max())
                filled = torch.arange(used) < store.tail_lengths[..., None]
                shape = [n if dim in ("layers", "batch") else 1 for dim, n in zip(each.dims, value.shape, strict=True)]
                shape[each.dims.index("slots")] = used
                part = value.narrow(each.dims.index("slots"), 0, used)
                held.append(torch.where(filled.view(shape), part, 0))
    return held


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(first, second, strict=True)
    )


def check_pages(cache):
    """No page is lost, and none is named that is free."""
    for arena in cache.inspect().arenas:
        stores = [store for store in cache.inspect().stores if store.arena is arena]
        named = torch.cat([store.live_ids() for store in stores])
        assert arena.live == named.unique().numel()
        assert [slab.data_ptr() for slab in arena.slabs if slab.shape[0]] == [
            a for a in arena.slab_addresses.tolist() if a
        ]


def make(name, decoded):
    cache = kvc.CompressedPagedCache(CONFIG, RECIPES.get(name, KVZIP))
    forward(cache, tokens(40, seed=0))
    for step in range(decoded):
        forward(cache, tokens(1, seed=100 + step))
    return cache


STEPS = {"decoded": (1, 1), "packing": (EVERY - 1, 1), "chunk": (2, 17)}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_forward_pass_stopped_anywhere_can_be_repeated(name, kind):
    decoded, count = STEPS[kind]
    new = tokens(count, seed=7)
    cache = make(name, decoded)
    # What a decoded token has added to scores stays when it is taken back.
    observer = RECIPES[name].observer
    exact = count > 1 or observer is None or not (observer.sum_field or observer.square_field)
    before = contents(cache, exact)
    with StopAt() as counter:
        expected = forward(cache, new)
    after = contents(cache, exact)
    closed = 0
    lines = sorted({1, 2, counter.count, *range(3, counter.count, max(1, counter.count // 9))})
    for line in lines:
        cache = make(name, decoded)
        with pytest.raises(Stopped), StopAt(line) as stop:
            forward(cache, new)
        if cache._attention.rollback.note is None and cache.get_seq_length() == 40 + decoded + count:
            # It was through; nothing is left to repeat.
            assert line > counter.count - 3, stop.place
            continue
        try:
            got = forward(cache, new)
        except RuntimeError as error:
            if "closed" in str(error):
                closed += 1
                assert cache.get_seq_length() == 0 and not cache.inspect().arenas
                cache.reset()
                forward(cache, tokens(40, seed=0))  # as good as new
                continue
            assert "half way" in str(error), stop.place
            assert same(contents(cache, exact), before), stop.place
            got = forward(cache, new)
        assert same(got, expected), stop.place
        assert same(contents(cache, exact), after), stop.place
        check_pages(cache)
    assert closed < len(lines) if RECIPES[name].evicts else not closed


def recorded(name):
    cache = make(name, 1)
    cache.activate_past_recording()
    for step in range(5):
        forward(cache, tokens(1, seed=200 + step))
    return cache


def chunk_on_a_fork(cache):
    fork = cache.fork()
    forward(fork, tokens(9, seed=5))
    fork.reset()


def read_again(cache):
    with cache.second_reading():
        forward(cache, tokens(40, seed=0))


#: What is done to a cache, to which, and whether it may have to be closed.
CHANGES = {
    "beams": (lambda: make("k4v2", 2), lambda cache: cache.reorder_cache(torch.tensor([1, 0])), False),
    "fewer rows": (lambda: make("h2o", 2), lambda cache: cache.batch_select_indices(torch.tensor([1])), False),
    "more rows": (lambda: make("means stay", 2), lambda cache: cache.batch_repeat_interleave(3), False),
    "crop": (lambda: make("lossless", 2), lambda cache: cache.crop(-5), False),
    "commit": (lambda: recorded("kv-compress"), lambda cache: cache.crop(-1), True),
    "commit, means": (lambda: recorded("means stay"), lambda cache: cache.crop(-1), True),
    "commit, packing": (lambda: recorded("k4v2"), lambda cache: cache.crop(-1), False),
    "fork": (lambda: make("auto", 2), lambda cache: cache.fork().reset(), False),
    "a fork's chunk": (lambda: make("h2o", 2), chunk_on_a_fork, False),
    "second reading": (lambda: make("kvzip", 0), read_again, True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_any_other_change_stopped_anywhere_can_be_repeated(name):
    prepare, change, may_close = CHANGES[name]
    cache = prepare()
    before = contents(cache)
    with StopAt() as counter:
        change(cache)
    after, live = contents(cache), [arena.live for arena in cache.inspect().arenas]
    stopped = 0
    for line in sorted({1, 2, counter.count, *range(3, counter.count, max(1, counter.count // 11))}):
        cache = prepare()
        try:
            with StopAt(line) as stop:
                change(cache)
        except Stopped:
            stopped += 1
        else:
            continue  # a finalizer was stopped, which nobody notices
        gc.collect()  # what the change had made is gone
        if cache.inspect().closed is not None:
            assert may_close, stop.place
            with pytest.raises(RuntimeError, match="closed"):
                forward(cache, tokens(1, seed=1))
            assert not cache.inspect().arenas
            continue
        if same(contents(cache), after) and not same(after, before):
            assert line > 0.9 * counter.count, stop.place  # it was through
        else:
            assert same(contents(cache), before), stop.place
            check_pages(cache)
            change(cache)
        gc.collect()
        assert same(contents(cache), after), stop.place
        assert [arena.live for arena in cache.inspect().arenas] == live, stop.place
        check_pages(cache)
    assert stopped > 8
